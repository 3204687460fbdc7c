"""What a report about pieces must look like."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from whaleflux import names
from whaleflux.checkpoint_storage import job_folder
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.store.placements import Placement
from whaleflux.v1 import checkpoint_pb2 as pb

MAX_PIECES_PER_REPORT = 4096
MAX_NAMES = 1000


def check_place(request: pb.BeginCheckpointRequest, placed: Placement) -> None:
    """Refuses what lies elsewhere than in the job's own folder: ranks unpickle what they restore, and agents delete what has ended."""
    if request.job_uid != placed.job_uid:
        raise InvalidArgument(FieldViolation("job_uid", f"is {request.job_uid[:64]!r}, not that of {request.job}"))
    id_ = names.checkpoint_id(request.step, request.epoch, request.serial)
    root = placed.checkpoint_location
    if not root:  # below a folder of the agents' settings
        root = posixpath.dirname(posixpath.dirname(request.location))
        if not root.startswith("/") or posixpath.normpath(root) != root:
            raise _elsewhere(f"/FOLDER/{job_folder('', request.job, request.job_uid)}/{id_}")
    if request.location != (own := posixpath.join(job_folder(root, request.job, request.job_uid), id_)):
        raise _elsewhere(own)


def _elsewhere(own: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation("location", f"lies outside of the job's own folder; use {own}"))


def check_names(confirmed: Sequence[str]) -> None:
    """At most so many at a time."""
    if len(confirmed) > MAX_NAMES:
        raise InvalidArgument(
            FieldViolation("names", f"has {len(confirmed)}, at most {MAX_NAMES}; confirm the others next")
        )


def check_report(request: pb.ReportPiecesRequest, known: pb.Checkpoint) -> None:
    """Refuses what no report can be, naming each field."""
    bad = []
    if request.epoch != known.epoch:
        bad.append(FieldViolation("epoch", f"is {request.epoch}, the checkpoint is of epoch {known.epoch}"))
    ranks = set(request.complete_ranks)
    if not ranks or not ranks <= set(range(known.world_size)):
        bad.append(FieldViolation("complete_ranks", f"must name at least one rank, each 0 to {known.world_size - 1}"))
    if len(request.pieces) > MAX_PIECES_PER_REPORT:
        bad.append(
            FieldViolation(
                "pieces", f"has {len(request.pieces)}, at most {MAX_PIECES_PER_REPORT}; report fewer ranks at a time"
            )
        )
    for index, piece in enumerate(request.pieces):
        path = piece.path
        if piece.rank not in ranks:
            bad.append(FieldViolation(f"pieces[{index}].rank", "is not among complete_ranks"))
        if not path or path.startswith("/") or ".." in path.split("/") or len(path) > 1024:
            bad.append(
                FieldViolation(
                    f"pieces[{index}].path", "must be a path below the location, at most 1024 characters, without '..'"
                )
            )
        if piece.size_bytes < 0 or not piece.checksum or len(piece.checksum) > 256:
            bad.append(
                FieldViolation(
                    f"pieces[{index}]", "needs a size of 0 or more bytes and a checksum of at most 256 characters"
                )
            )
    if bad:
        raise InvalidArgument(bad[:20])


def check_proof(read: pb.Piece, known: pb.Checkpoint) -> None:
    """Refuses what does not prove that a piece is damaged: it must name one, and differ from what was saved."""
    saved = next((piece for piece in known.pieces if piece.path == read.path), None)
    if saved is None:
        raise InvalidArgument(FieldViolation("read.path", f"{read.path!r} is no piece of {known.name}"))
    if not read.checksum or (read.size_bytes, read.checksum) == (saved.size_bytes, saved.checksum):
        raise InvalidArgument(
            FieldViolation(
                "read", f"proves nothing about {read.path}: give size and checksum of bytes that were read and differ"
            )
        )
