"""Between stored messages and what the core decides on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from whaleflux import names
from whaleflux.rpc.etags import etag_of
from whaleflux.store import keys
from whaleflux.store.api import Entry
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux_checkpoint.core.lifecycle import DEFAULT_KEEP, Saved, State

_PREFIX = "CHECKPOINT_STATE_"


def state_of(message: pb.Checkpoint) -> State:
    return State(pb.CheckpointState.Name(message.state).removeprefix(_PREFIX))


def state_number(state: State) -> pb.CheckpointState:
    return cast("pb.CheckpointState", pb.CheckpointState.Value(_PREFIX + state.value))


def saved_of(message: pb.Checkpoint) -> Saved:
    keep = message.keep or DEFAULT_KEEP
    return Saved(message.name, message.epoch, message.step, state_of(message), message.layout, keep)


def decode(entry: Entry) -> pb.Checkpoint:
    """The stored checkpoint with its etag, without the pieces that are still in reports of their own."""
    message = pb.Checkpoint.FromString(entry.value)
    message.etag = etag_of(entry)
    return message


def encode(message: pb.Checkpoint) -> bytes:
    stored = pb.Checkpoint()
    stored.CopyFrom(message)
    stored.etag = ""
    del stored.pieces[:]  # pieces stay in their reports: a manifest may be larger than one transaction
    return stored.SerializeToString()


def checkpoint_key(name: str) -> str:
    names.split(name, "queues", "jobs", "checkpoints")
    return keys.of_name(keys.CHECKPOINTS, name)


def pieces_prefix(name: str) -> str:
    return keys.of_name(keys.CHECKPOINT_PIECES, name) + "/"


def fence_key(job: str) -> str:
    names.split(job, "queues", "jobs", field="job")
    return keys.of_name(keys.JOB_FENCES, job)


def job_of(name: str) -> str:
    return name.rsplit("/checkpoints/", 1)[0]


def add_reports(message: pb.Checkpoint, reports: Iterable[Entry]) -> set[int]:
    """Adds all reported pieces, in order of rank and path; returns the complete ranks."""
    complete: set[int] = set()
    pieces: dict[tuple[int, str], pb.Piece] = {}
    for entry in reports:
        report = pb.ReportedPieces.FromString(entry.value)
        complete.update(report.complete_ranks)
        pieces.update({(piece.rank, piece.path): piece for piece in report.pieces})
    message.pieces.extend(pieces[key] for key in sorted(pieces))
    message.size_bytes = sum(piece.size_bytes for piece in message.pieces)
    return complete
