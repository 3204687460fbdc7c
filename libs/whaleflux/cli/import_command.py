"""Job files out of those of other systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from whaleflux.cli import output
from whaleflux.cli.files import read


def import_(
    file: Annotated[str, typer.Argument(help="File of another system, or - for stdin.")],
    to: Annotated[str, typer.Option("-o", "--output", help="Where to write it; - for stdout.")] = "-",
    source: Annotated[
        str, typer.Option("--from", help="sbatch, skypilot, dstack, accelerate or torchrun; found out when left out.")
    ] = "",
    run: Annotated[str, typer.Option("--run", help="What a configuration of accelerate is to run.")] = "",
) -> None:
    """Makes a job file of an sbatch script, a SkyPilot or dstack file, or a configuration of accelerate.

    \b
      whaleflux import train.sbatch -o job.yaml
      whaleflux import task.yaml | less
      whaleflux import accelerate.yaml --run 'train.py --lr 1e-4' -o job.yaml

    What has no equivalent is a comment in the file and a note on stderr. What would mean something else here is refused
    with the reason, and nothing is written. docs/guide/import.md has a table of both.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.manifests.importing.formats import FORMATS, imported
    from whaleflux.manifests.yaml_files import job_from_yaml, model_from_yaml

    if source not in ("", *FORMATS):
        raise InvalidArgument(FieldViolation("--from", f"{source!r} is not one of {', '.join(FORMATS)}"))
    if to != "-" and Path(to).exists():
        raise InvalidArgument(FieldViolation("--output", f"{to} exists; remove it, or give another name"))
    text, base = read(file)
    made = imported(text, Path(file).name, source=source, command=run)
    (model_from_yaml if made.kind == "model" else job_from_yaml)(made.text, base)
    for what, why in made.notes:
        output.note(f"note: {what}: {why}")
    if to == "-":
        output.write(made.text.encode())
        return
    try:
        Path(to).write_text(made.text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(FieldViolation("--output", f"cannot write {to}: {error.strerror}")) from None
    output.note(f"{to} is a {made.kind} file; next: whaleflux {'serve' if made.kind == 'model' else 'submit'} {to}")
