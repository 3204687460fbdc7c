"""Between stored messages and what the core decides on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import cast

from whaleflux import names
from whaleflux.convert import enum_name
from whaleflux.manifests.job_fields import DEFAULT_CHECKPOINTS_KEPT
from whaleflux.rpc.etags import etag_of
from whaleflux.store import keys
from whaleflux.store.api import Entry, Put
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux_checkpoint.core.resharding import Resharding
from whaleflux_checkpoint.core.state_machine import Saved, State

_STATES = {state.value: state for state in State}
_PREFIX = "CHECKPOINT_STATE_"
_RESHARDINGS = {one.value: one for one in Resharding}
_RESHARDING_PREFIX = "RESHARDING_"


def state_of(message: pb.Checkpoint) -> State:
    """UNKNOWN for a state that only a newer version knows."""
    return _STATES.get(enum_name(pb.CheckpointState, message.state, _PREFIX), State.UNKNOWN)


def state_number(state: State) -> pb.CheckpointState:
    return cast("pb.CheckpointState", pb.CheckpointState.Value(_PREFIX + state.value))


def resharding_of(message: pb.Checkpoint) -> Resharding:
    """UNSPECIFIED for what only a newer version knows: nothing more than that may change."""
    said = enum_name(pb.Resharding, message.resharding, _RESHARDING_PREFIX)
    return _RESHARDINGS.get(said, Resharding.UNSPECIFIED)


def resharding_number(one: Resharding) -> pb.Resharding:
    return cast("pb.Resharding", pb.Resharding.Value(_RESHARDING_PREFIX + one.value))


def saved_of(message: pb.Checkpoint) -> Saved:
    keep = message.keep or DEFAULT_CHECKPOINTS_KEPT
    return Saved(message.name, message.epoch, message.step, state_of(message), keep, message.serial, message.job_uid)


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


def report_key(name: str, ranks: Iterable[int]) -> str:
    """One for each set of ranks: a report that is said again for some of them replaces none that said more."""
    ordered = sorted(set(ranks))
    return f"{pieces_prefix(name)}{ordered[0]:06d}-{hashlib.sha256(repr(ordered).encode()).hexdigest()[:12]}"


def deletable_key(name: str) -> str:
    return keys.of_name(keys.CHECKPOINTS_DELETABLE, name)


def deletable_mark(message: pb.Checkpoint) -> Put:
    """By which a checkpoint whose bytes may go is found: its name, and the sites whose agents may delete them."""
    return Put(deletable_key(message.name), "\n".join((message.name, *message.sites)).encode())


def marked(entry: Entry) -> tuple[str, list[str]]:
    """Name and sites of such a mark."""
    name, *sites = entry.value.decode().split("\n")
    return name, sites


def fence_key(job: str) -> str:
    names.split(job, "queues", "jobs", field="job")
    return keys.of_name(keys.JOB_FENCES, job)


def job_of(name: str) -> str:
    return name.rsplit("/checkpoints/", 1)[0]


def pieces_of(reports: Iterable[pb.ReportedPieces]) -> list[pb.Piece]:
    """All reported pieces, each once, in order of rank and path."""
    pieces = {(piece.rank, piece.path): piece for report in reports for piece in report.pieces}
    return [pieces[key] for key in sorted(pieces)]
