"""What `fits` and `plan` understand: a model, a type of GPU, numbers as people write them. Everything that is wrong is an InvalidArgument."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whaleflux.fleet.gpu_types import GpuType
    from whaleflux.planning.model_shape import ModelShape

MOST_GPUS = 131_072
MOST_TYPES = 8
_NUMBERS = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*")


class Method(StrEnum):
    """What is trained."""

    full = "full"
    lora = "lora"


class Again(StrEnum):
    """Which activations are computed again."""

    none = "none"
    selective = "selective"
    full = "full"


class Objectives(StrEnum):
    """What is made as small as it can be."""

    time = "time"
    cost = "cost"


class Software(StrEnum):
    """How layers run: compiled or fused, or as they are written; with 16-bit weights, or with 32-bit ones that are cast."""

    compiled = "compiled"
    eager = "eager"
    autocast = "autocast"
    autocast_compiled = "autocast compiled"


def run_as(said: Software | None, measured: object) -> Software:
    """Raises InvalidArgument where it is said without a calibration, which alone knows it."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if said is not None and not measured:
        raise InvalidArgument(
            FieldViolation("--software", "is known of what was measured only; give --calibration FILE, or leave it out")
        )
    return said or Software.compiled


class Precision(StrEnum):
    """Of linear layers."""

    bf16 = "bf16"
    fp8 = "fp8"


def need_numpy() -> None:
    import importlib.util

    from whaleflux.errors import FailedPrecondition
    from whaleflux.reasons import ErrorReason

    if importlib.util.find_spec("numpy") is None:
        raise FailedPrecondition(
            "planning needs NumPy, which is not installed here; run: pip install 'whaleflux[plan]'",
            reason=ErrorReason.PROGRAM_MISSING,
        )


def model_of(said: str) -> ModelShape:
    """A file where there is one of that name, else a known name. Raises InvalidArgument."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.planning.known_models import model_named
    from whaleflux.planning.model_files import MAX_BYTES

    if not said:
        raise InvalidArgument(
            FieldViolation("MODEL", "is missing: a name (whaleflux fits --list), a config.json or a YAML file")
        )
    path = Path(said)
    if not _is_file(path):
        if path.suffix in (".json", ".yaml", ".yml"):
            raise InvalidArgument(FieldViolation("MODEL", f"{said[:200]}: there is no such file"))
        with named({"model": "MODEL"}):
            return model_named(said)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InvalidArgument(
                FieldViolation(
                    "MODEL",
                    f"{said[:80]} is longer than {MAX_BYTES} bytes; a config.json has a few thousand: is it another file?",
                )
            )
        called = path.stem if path.stem != "config" else path.resolve().parent.name
        return _model_in(raw.decode("utf-8"), called, path.name[:80])
    except OSError as error:
        raise InvalidArgument(FieldViolation("MODEL", f"{said} cannot be read: {error.strerror}")) from None
    except UnicodeDecodeError:
        raise InvalidArgument(
            FieldViolation("MODEL", f"{said} is no text; give a config.json or a YAML file, not weights")
        ) from None


def _model_in(text: str, called: str, file: str) -> ModelShape:
    """Mistakes name the file too: its `sequence` is not `--sequence`."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.planning.model_files import model_from_text

    try:
        return model_from_text(text, called)
    except InvalidArgument as wrong:
        named = [FieldViolation(f"{file}: {one.field}", one.description) for one in wrong.violations]
        raise InvalidArgument(named) from None


def _is_file(path: Path) -> bool:
    """No where it cannot be looked at: names may be too long for any file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def named(options: Mapping[str, str]) -> Iterator[None]:
    """In the block refusals name what people type: `options` by the planner's name of a field."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        yield
    except InvalidArgument as wrong:
        renamed = [FieldViolation(options.get(one.field, one.field), one.description) for one in wrong.violations]
        raise InvalidArgument(renamed) from None


def gpu_of(said: str) -> GpuType:
    """Raises InvalidArgument with the nearest names."""
    from difflib import get_close_matches

    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.fleet.gpu_types import CATALOGUE

    by_name = {name.lower(): one for name, one in CATALOGUE.types.items() if one.speed}
    wanted = said.lower()
    if wanted in by_name:
        return by_name[wanted]
    if sizes := [one.name for name, one in by_name.items() if name.partition("-")[0] == wanted]:
        raise InvalidArgument(FieldViolation("--gpu", f"{said} is sold in several sizes: {', '.join(sizes)}"))
    near = get_close_matches(wanted, by_name, 3, 0.4)
    meant = ", ".join(by_name[one].name for one in near) or ", ".join(one.name for one in by_name.values())
    what = f"{said[:40]!r} is not known" if said else "is missing"
    raise InvalidArgument(FieldViolation("--gpu", f"{what}; take one of: {meant}"))


def gpus_of(said: str) -> list[GpuType]:
    """Several types, each an alternative."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    names = [one.strip() for one in said.split(",") if one.strip()] or [""]
    if len(names) > MOST_TYPES:
        raise InvalidArgument(
            FieldViolation("--gpu", f"names {len(names)} types; compare at most {MOST_TYPES} at once")
        )
    return [gpu_of(one) for one in dict.fromkeys(names)]


def numbers_of(said: str, node_gpus: int) -> list[int]:
    """128; 64,128; 8-128: the whole nodes between. Raises InvalidArgument."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.planning.offers import MOST_OFFERS, numbers_between

    wanted = f"a number from 1 to {MOST_GPUS}, several (64,128) or a range (8-128)"
    text = said.replace(" ", "")
    if not _NUMBERS.fullmatch(text):
        raise InvalidArgument(FieldViolation("--gpus", f"is {said[:40]!r}; it must be {wanted}"))
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        ends = int(low), int(high or low)
        if not 1 <= ends[0] <= ends[1] <= MOST_GPUS:
            raise InvalidArgument(FieldViolation("--gpus", f"has {part!r}; it must be {wanted}, the smaller one first"))
        found |= set(numbers_between(*ends, node_gpus) if high else ends)
    if len(found) > MOST_OFFERS:
        raise InvalidArgument(
            FieldViolation("--gpus", f"names {len(found)} numbers; at most {MOST_OFFERS} are compared at once")
        )
    return sorted(found)


def quantity_of(option: str, said: str, read: Callable[[object], float], most: float = 1e18) -> float:
    """What `read` makes of it; 0 where nothing was said. Raises InvalidArgument naming the option, also where it is 0 or too large."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.quantities import seconds

    if not said:
        return 0.0
    try:
        value = read(said)
    except ValueError as error:
        raise InvalidArgument(FieldViolation(option, f"is {said[:40]!r}; it {error}")) from None
    if not 0 < value <= most:
        unit = {seconds: " s", money: " dollars"}.get(read, "")
        raise InvalidArgument(
            FieldViolation(option, f"is {said[:40]!r}; it must be more than 0 and at most {most:.12g}{unit}")
        )
    return value


def money(said: object) -> float:
    """$2M, 2M USD or 2000000. Raises ValueError."""
    from whaleflux.quantities import count

    text = str(said).strip().removeprefix("$")
    try:
        return count(re.sub(r"\s*usd$", "", text, flags=re.IGNORECASE))
    except ValueError:
        raise ValueError("must be an amount such as 2M or $12000; other currencies are not converted") from None


def billions(count: float) -> str:
    """Parameters, for people."""
    return f"{count / 1e9:.3g} B"
