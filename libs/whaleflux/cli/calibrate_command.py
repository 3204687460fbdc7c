"""`whaleflux calibrate`: what this machine's GPUs really do, for plans. And `--calibration` of the commands that plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output

if TYPE_CHECKING:
    from whaleflux.fleet.gpu_types import GpuType
    from whaleflux.planning.calibration import Calibrated, Ladder
    from whaleflux.planning.machine import Machine


def calibrate(
    file: Annotated[
        Path | None, typer.Option("--file", help="Write the ladder there, for --calibration of plan and fits.")
    ] = None,
    fmt: Output = Format.table,
) -> None:
    """Measures this machine's GPUs for a minute: multiplications, attention, memory, launches, whole layers, collectives.

    Run it on a node of the type that plans are for, with its GPUs idle. Needs PyTorch, and no fleet.

    \b
      whaleflux calibrate --file h200.json
      whaleflux fits llama-3.1-8b --gpu H200 --calibration h200.json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument

    if fmt is not Format.table and not fmt.is_json:
        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a ladder; use table or json"))
    if file is not None and not file.resolve().parent.is_dir():
        raise InvalidArgument(FieldViolation("--file", f"{file.parent} is no folder; make it first"))
    if file is not None:
        _writable(file)
    text = _measured()
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    if fmt.is_json:
        output.say_json(json.loads(text), fmt)
    else:
        _show(text)


def _writable(file: Path) -> None:
    """Known before a minute is spent; what is there stays. Raises InvalidArgument."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    new = not file.exists()
    try:
        file.open("a", encoding="utf-8").close()
        if new:
            file.unlink()
    except OSError as error:
        raise InvalidArgument(
            FieldViolation("--file", f"{str(file)[:200]} cannot be written: {error.strerror}; name a file in a folder of yours")
        ) from None  # fmt: skip


def _measured() -> str:
    from whaleflux.errors import FailedPrecondition
    from whaleflux.reasons import ErrorReason

    try:
        import torch
    except ImportError:
        raise FailedPrecondition(
            "calibration runs PyTorch, which is not installed here; run: pip install torch",
            reason=ErrorReason.PROGRAM_MISSING,
        ) from None
    if not torch.cuda.is_available():
        raise FailedPrecondition(
            "PyTorch sees no GPU on this machine; run whaleflux calibrate on a node that has the GPUs that plans are for",
            reason=ErrorReason.PROGRAM_MISSING,
        )
    from whaleflux.sdk.ladder import measure

    return json.dumps(asdict(measure(say=output.note)))


def _show(text: str) -> None:
    from whaleflux.planning.calibration import calibrated, ladder_from_text, shown
    from whaleflux.planning.machine import Machine

    ladder = ladder_from_text(text)
    sheet = Machine.of(type_of(ladder))
    rows = [
        [name, f"{now:.3g}", f"{before:.3g}"] for name, (now, before) in shown(calibrated(sheet, ladder), sheet).items()
    ]
    output.table([ladder.gpu, "MEASURED", "WITHOUT"], rows)


def type_of(ladder: Ladder) -> GpuType:
    """The type of the catalogue that was measured. Raises InvalidArgument."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.fleet.gpu_types import CATALOGUE

    found = CATALOGUE.types.get(CATALOGUE.name_of(ladder.gpu, int(ladder.memory_bytes)))
    if found is None or found.speed is None:
        raise InvalidArgument(
            FieldViolation("--calibration", f"of {ladder.gpu!r} the catalogue knows nothing; whaleflux fits --list")
        )
    return found


def calibration(path: Path, sheets: Mapping[str, Machine], software: str) -> Calibrated:
    """Of a file that `calibrate` wrote, for one of these types of GPU by name; layers that run as `software` says are among it. Raises InvalidArgument."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.planning.calibration import MAX_BYTES, calibrated, ladder_from_text

    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(FieldViolation("--calibration", f"{path} cannot be read: {error.strerror}")) from None
    if len(raw) > MAX_BYTES:
        raise InvalidArgument(
            FieldViolation("--calibration", f"{path} is longer than {MAX_BYTES} bytes: is it another file?")
        )
    ladder = ladder_from_text(raw.decode("utf-8", "replace"))
    measured = type_of(ladder).name
    if measured not in sheets:
        raise InvalidArgument(
            FieldViolation(
                "--calibration",
                f"{path} was measured on {measured}, not on {' or '.join(sheets)}; run whaleflux calibrate there",
            )
        )
    found = calibrated(sheets[measured], ladder)
    found.check(software)
    return found
