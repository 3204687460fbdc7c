"""Which replicas a model should have, and what a replica's state follows from. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from whaleflux.errors import FieldViolation, Invalid

MAX_REPLICAS = 1000
MAX_COMMAND_CHARS = 65_536
FAILED_PROBES = 2  # one slow answer does not take a replica out


class State(Enum):
    """Where a replica stands; the names are those of the contract without their prefix."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    GONE = "GONE"


NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.GONE}),
    State.READY: frozenset({State.DRAINING, State.STARTING}),
    State.DRAINING: frozenset({State.GONE}),
    State.GONE: frozenset(),  # its record is deleted
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One replica that should exist: its id within the model; `address` for those that run elsewhere."""

    id: str
    address: str = ""


def wanted(model_id: str, count: int, addresses: Iterable[str]) -> tuple[Wanted, ...]:
    """The replicas of a model: one per address that runs elsewhere, else `count` jobs."""
    elsewhere = tuple(addresses)
    if elsewhere:
        return tuple(Wanted(f"external-{number}", address) for number, address in enumerate(elsewhere))
    return tuple(Wanted(f"{model_id[:50].rstrip('-')}-{number}") for number in range(count))


def surplus(existing: Collection[str], should: Collection[Wanted]) -> list[str]:
    """Ids of replicas that should not exist any more."""
    return sorted(set(existing) - {w.id for w in should})


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a replica: its job's endpoint ("" while it has none) and probes failed in a row (-1: none yet)."""

    endpoint: str
    failed_probes: int


def state_after(current: State, seen: Observed) -> tuple[State, str]:
    """The state that follows and one sentence why. DRAINING and GONE are decided by the operator, not by probes."""
    if current in {State.DRAINING, State.GONE}:
        return current, ""
    if not seen.endpoint:
        return State.STARTING, "its job has no running process"
    if seen.failed_probes == 0:
        return State.READY, ""
    if current is State.READY and 0 < seen.failed_probes < FAILED_PROBES:
        return State.READY, ""
    return State.STARTING, "its health path does not answer" if seen.failed_probes > 0 else "it was not asked yet"


def check_model(
    *, command: Collection[str], image: str, addresses: Collection[str], gpus: int, least: int, most: int, window: int
) -> None:
    """Refuses what cannot be served, naming each field, its limit and the fix."""
    ways = sum((bool(command) or bool(image), bool(addresses)))
    bad = [
        FieldViolation(field, fix)
        for field, wrong, fix in (
            ("model.engine", ways != 1, "needs a command or image that is run here, or addresses of servers that run elsewhere, not both"),
            ("model.engine.command", sum(map(len, command)) > MAX_COMMAND_CHARS, f"is longer than {MAX_COMMAND_CHARS} characters"),
            ("model.engine.gpus", not 0 <= gpus <= 64, f"is {gpus}; use 0 (for 1) to 64"),
            ("model.engine.addresses", len(addresses) > MAX_REPLICAS or not all(map(_is_address, addresses)), f"must be at most {MAX_REPLICAS} of host:port"),
            ("model.replicas.min", not 0 <= least <= MAX_REPLICAS, f"is {least}; use 0 to {MAX_REPLICAS}"),
            ("model.replicas.max", not (most == 0 or least <= most <= MAX_REPLICAS), f"is {most}; use 0 (same as min) or {least} to {MAX_REPLICAS}"),
            ("model.context_window_tokens", not 0 <= window <= 10**9, f"is {window}; use 0 (unknown) to 1000000000"),
        )
        if wrong
    ]  # fmt: skip
    if bad:
        raise Invalid(bad)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and len(text) <= 255 and port.isdigit() and 0 < int(port) < 65536
