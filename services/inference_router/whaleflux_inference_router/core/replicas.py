"""Which replicas a model should have, and what a replica's state follows from. Pure."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

FAILED_PROBES = 2  # one slow answer does not take a replica out
MOST_CHARS, MOST_MODEL_CHARS, MOST_SITE_CHARS = (
    63,
    50,
    20,
)  # of an id; of a model's name in one without marks; of a site's
HASH_CHARS = 6


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


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica that exists."""

    state: State
    version: int = 1
    site: str = ""
    elsewhere: bool = False  # an address of the model's, no job


_KEPT_FIRST = {State.READY: 0, State.UNKNOWN: 1}  # then those that start


def wanted(
    model_id: str,
    counts: Mapping[tuple[int, str], int],
    addresses: Iterable[str],
    existing: Mapping[str, Standing] | None = None,
) -> tuple[Wanted, ...]:
    """The replicas of a model: one per address that runs elsewhere, else so many jobs of each version at each site ("" where it names none).

    Of those that exist (by id) the ones that are READY stay before others, so that what answers is the last to leave; those that drain
    are on their way out.
    """
    elsewhere = tuple(dict.fromkeys(addresses))
    if elsewhere:
        return tuple(Wanted(_id_of(address), address) for address in elsewhere)
    there = existing or {}
    return tuple(
        Wanted(replica_id, version=version, site=site)
        for (version, site), count in counts.items()
        for replica_id in _ids(model_id, version, site, count, there)
    )


def _ids(model_id: str, version: int, site: str, count: int, existing: Mapping[str, Standing]) -> list[str]:
    """Those that exist, READY ones first, and new ones in numbers that are free."""

    def preferred(replica_id: str) -> tuple[int, int, str]:
        return _KEPT_FIRST.get(existing[replica_id].state, 2), len(replica_id), replica_id

    mine = [
        replica_id
        for replica_id, one in existing.items()
        if (one.version, one.site, one.elsewhere) == (version, site, False) and one.state is not State.DRAINING
    ]
    kept = sorted(mine, key=preferred)[:count]
    new = (made for number in itertools.count() if (made := _job_id(model_id, version, site, number)) not in existing)
    return kept + list(itertools.islice(new, count - len(kept)))


def _job_id(model_id: str, version: int, site: str, number: int) -> str:
    """At most 63 characters. What is more than the model and a number, or is cut, has a hash: other models' names may go on just like that."""
    last = site.rpartition("/")[2][:MOST_SITE_CHARS].rstrip("-")
    marks = [f"v{version}"] if version > 1 else []
    marks += [last] if last else []
    if marks or len(model_id) > MOST_MODEL_CHARS:
        marks.append(hashlib.sha256(f"{model_id}\0{version}\0{site}".encode()).hexdigest()[:HASH_CHARS])
    end = "-".join((*marks, str(number)))
    room = MOST_CHARS - 1 - len(end) if marks else MOST_MODEL_CHARS
    return f"{model_id[:room].rstrip('-')}-{end}"


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
