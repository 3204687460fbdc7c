"""Exports of the audit trail: a record a line, readable, with the bytes that were hashed beside it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from google.protobuf.message import DecodeError

from whaleflux.cli import output
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.trust.audit_chain import Verifier
from whaleflux.v1 import audit_pb2 as pb

_MOST_LINE = 1 << 20  # bytes; a record has some hundreds, and what is no export may have no line's end


def write(file: Path, parts: Iterable[pb.ExportAuditResponse]) -> int:
    """Writes all links; returns how many. The file is there once it is whole, and readable by its owner alone.

    A device, a pipe or a link (/dev/stdout) is written to as it comes, since putting a file in its place would destroy it.
    """
    if file.is_symlink() or (file.exists() and not file.is_file() and not file.is_dir()):
        with file.open("w") as out:
            return _write(out, parts)
    partial = file.with_name(f"{file.name}.partial")
    with os.fdopen(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as out:
        count = _write(out, parts)
    partial.replace(file)
    return count


def _write(out: IO[str], parts: Iterable[pb.ExportAuditResponse]) -> int:
    count = 0
    for part in parts:
        for link in part.links:
            out.write(json.dumps(_line(link), ensure_ascii=False) + "\n")
            count += 1
    return count


def verified(file: Path) -> pb.VerifyAuditResponse:
    """What a verification of an export says: whether anything within it was changed, dropped or moved.

    Where it should begin and end, only the fleet's own verification knows. Raises InvalidArgument for a file that is no export.
    """
    verifier = Verifier(None)
    for link in _links(file):
        verifier.take(link)
    findings = verifier.finish()
    if not verifier.records:
        raise InvalidArgument(FieldViolation("FILE", f"{file} has no record: there is nothing to verify"))
    answer = pb.VerifyAuditResponse(
        records=verifier.records, chains=verifier.chains, findings=findings, lost=verifier.lost
    )
    if verifier.oldest is not None:
        answer.oldest.FromDatetime(verifier.oldest)
    return answer


def _line(link: pb.AuditLink) -> dict[str, Any]:
    shown = output.as_json(pb.AuditRecord.FromString(link.record))
    return {**shown, "stored": base64.b64encode(link.record).decode(), "hash": link.hash.hex()}


def _links(file: Path) -> Iterator[pb.AuditLink]:
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(_MOST_LINE), b""), 1):
            try:
                found = json.loads(line)
                link = pb.AuditLink(record=base64.b64decode(found["stored"]), hash=bytes.fromhex(found["hash"]))
                yield link if _line(link) == found else pb.AuditLink(record=link.record)  # what people read was changed
            except (ValueError, KeyError, TypeError, RecursionError, DecodeError):
                raise InvalidArgument(
                    FieldViolation("FILE", f"{file}, line {number}: is no line of: whaleflux audit export FILE")
                ) from None
