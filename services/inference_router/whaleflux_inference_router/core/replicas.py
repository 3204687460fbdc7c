"""Which replicas a model should have, and what a replica's state follows from. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

FAILED_PROBES = 2  # one slow answer does not take a replica out
MOST_SITE_CHARS = 20  # of a site's name in an id


class State(Enum):
    """Where a replica stands; the names are those of the contract without their prefix."""

    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    GONE = "GONE"
    UNKNOWN = "UNKNOWN"  # of a newer version: neither used nor changed here


NEXT: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.GONE}),
    State.READY: frozenset({State.DRAINING, State.STARTING}),
    State.DRAINING: frozenset({State.GONE}),
    State.UNKNOWN: frozenset(),
    State.GONE: frozenset(),  # its record is deleted
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One replica that should exist: its id within the model; `address` for those that run elsewhere; its engine's version, and its site."""

    id: str
    address: str = ""
    version: int = 1
    site: str = ""


def wanted(model_id: str, counts: Mapping[tuple[int, str], int], addresses: Iterable[str]) -> tuple[Wanted, ...]:
    """The replicas of a model: one per address that runs elsewhere, else so many jobs of each version at each site ("" where it names none)."""
    elsewhere = tuple(dict.fromkeys(addresses))
    if elsewhere:
        return tuple(Wanted(_id_of(address), address) for address in elsewhere)
    return tuple(
        Wanted(_job_id(model_id, version, site, number), version=version, site=site)
        for (version, site), count in counts.items()
        for number in range(count)
    )


def _job_id(model_id: str, version: int, site: str, number: int) -> str:
    """At most 63 characters; a site's name that is cut keeps what tells it from others."""
    last = site.rpartition("/")[2]
    if len(last) > MOST_SITE_CHARS:
        last = f"{last[: MOST_SITE_CHARS - 7].rstrip('-')}-{hashlib.sha256(last.encode()).hexdigest()[:6]}"
    marks = [f"v{version}"] if version > 1 else []
    marks += [last] if last else []
    return "-".join((model_id[: 28 if marks else 50].rstrip("-"), *marks, str(number)))


def _id_of(address: str) -> str:
    """From the address itself: another order of the list, or one less, makes nobody somebody else."""
    readable = re.sub(r"[^a-z0-9]+", "-", address.lower()).strip("-")[:40].strip("-")
    return f"at-{readable}-{hashlib.sha256(address.encode()).hexdigest()[:6]}"


def surplus(existing: Collection[str], should: Collection[Wanted]) -> list[str]:
    """Ids of replicas that should not exist any more."""
    return sorted(set(existing) - {w.id for w in should})


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a replica: its endpoint ("" while it has none) and probes failed in a row (-1: none yet).

    `mismatch`: what is wrong with the models that it lists. `missing`: why it has no endpoint. `unproven`: what keeps it from having answered
    a first completion, asked while it is not READY.
    """

    endpoint: str
    failed_probes: int
    mismatch: str = ""
    missing: str = "its job has no running process"
    unproven: str = ""


def state_after(current: State, seen: Observed) -> tuple[State, str]:
    """The state that follows and one sentence why. DRAINING and GONE are decided by the operator, not by probes."""
    if current in {State.DRAINING, State.GONE, State.UNKNOWN}:
        return current, ""
    if not seen.endpoint:
        return State.STARTING, seen.missing
    if seen.mismatch:
        return State.STARTING, seen.mismatch
    if seen.failed_probes == 0 and current is not State.READY and seen.unproven:
        return State.STARTING, seen.unproven
    if seen.failed_probes == 0:
        return State.READY, ""
    if current is State.READY and 0 < seen.failed_probes < FAILED_PROBES:
        return State.READY, ""
    return State.STARTING, "its health path does not answer" if seen.failed_probes > 0 else "it was not asked yet"
