"""Job and model files as commands are given them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

File = Annotated[str, typer.Argument(help="Job file, or - for stdin.")]


def read(file: str) -> tuple[str, Path]:
    """Text of a file and the folder that its relative paths are below."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        if file == "-":
            return sys.stdin.read(2 << 20), Path.cwd()
        with Path(file).open(encoding="utf-8") as stream:
            return stream.read(2 << 20), Path(file).resolve().parent
    except OSError as error:
        raise InvalidArgument(FieldViolation("file", f"cannot read {file}: {error.strerror}")) from None
    except UnicodeDecodeError:
        raise InvalidArgument(FieldViolation("file", f"{file} is not UTF-8 text")) from None
