"""`whaleflux cost export`: the request, and the file that its answer is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from whaleflux.cli.filters import since_s
from whaleflux.errors import FieldViolation, InvalidArgument

LONGEST_S = 3_600.0
FORMATS = ("csv", "parquet")


def request(kind: str, since: str, until: str, account: str, file: Path | None, *, check: bool) -> Any:
    """Raises InvalidArgument naming the option that is wrong."""
    from whaleflux.v1 import console_pb2 as pb

    if kind not in FORMATS:
        raise InvalidArgument(FieldViolation("--format", f"{kind!r}: use {' or '.join(FORMATS)}"))
    if file is None and not check:
        raise InvalidArgument(FieldViolation("FILE", "give a file to write, or --check to write none"))
    if file is not None and check:
        raise InvalidArgument(FieldViolation("FILE", "is not written with --check; leave one of the two out"))
    if file is not None and file.is_dir():
        raise InvalidArgument(FieldViolation("FILE", f"{file} is a folder; name a file in it"))
    if not account.strip():
        raise InvalidArgument(FieldViolation("--account", "is empty; give an id, or leave it out for whaleflux"))
    asked = pb.ExportCostRequest(
        format=pb.COST_FORMAT_PARQUET if kind == "parquet" else pb.COST_FORMAT_CSV, billing_account=account
    )
    if since:
        asked.start_time.FromSeconds(int(since_s(since, "--since")))
    if until:
        asked.end_time.FromSeconds(int(since_s(until, "--until")))
    return asked


def write(parts: Iterable[Any], file: Path | None) -> Any:
    """Writes what the parts hold, whole or not at all; returns the summary that the last one is."""
    if file is None:
        return [part.summary for part in parts][-1]
    unfinished = file.with_name(f"{file.name}.part")
    summary: Any = None
    try:
        with unfinished.open("wb") as out:
            for part in parts:
                out.write(part.data)
                summary = part.summary
        os.replace(unfinished, file)
    except OSError as error:
        error.filename, error.filename2 = str(file), None  # the one that was asked for
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    return summary
