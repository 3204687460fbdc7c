"""`whaleflux check-config`: does a configuration of parallel training break one of ten rules? Works without a fleet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output

_MOST_GPUS = 1 << 20


def check_config(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Megatron's flags or script, torchtitan's TOML, DeepSpeed's JSON, a mesh.json."
        ),
    ],
    gpus: Annotated[
        int, typer.Option("--gpus", min=0, max=_MOST_GPUS, help="It runs on so many; 0: as the file says.")
    ] = 0,
    fmt: Output = Format.table,
) -> None:
    """Whether a configuration of parallel training can run: ten mistakes, each with its numbers and a fix. Needs no fleet.

    \b
      whaleflux check-config megatron.sh --gpus 64
      whaleflux check-config torchtitan.toml --gpus 64 -o json

    The rules: the GPUs divide by the degrees, interleaving has a pipeline, sequence parallelism has tensor parallelism, stages have a precision,
    heads divide, expert parallelism has experts, one 16-bit precision, experts' degrees divide too, the batch is whole micro-batches of each rank, the stages have all layers. The exit code is 1 where one is broken.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.planning.validity import RULES, check

    if fmt is not Format.table and not fmt.is_json:
        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a verdict; use table or json"))
    broken = check(_text(file), gpus or None)
    if fmt.is_json:
        output.say_json({"file": str(file), "valid": not broken, "broken": [asdict(one) for one in broken]}, fmt)
    elif broken:
        for one in broken:
            output.say(f"{one.rule}: {one.words}", f"  {one.fix}")
    else:
        output.say(f"{file} breaks none of the {len(RULES)} rules")
    if broken:
        raise typer.Exit(1)


def _text(file: Path) -> str:
    """Raises InvalidArgument where it cannot be read as text."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.planning.stated import MAX_BYTES

    try:
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        why = (
            "is no text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or "is no path"
        )
        raise InvalidArgument(FieldViolation("FILE", f"{str(file)[:200]} cannot be read: {why}; give a configuration")) from None  # fmt: skip
