"""The record that says which agents act for a job's newest attempt, beside its fence (`whaleflux.store.placements`)."""

from __future__ import annotations

from collections.abc import Iterable

from whaleflux.store import keys, placements
from whaleflux.store.api import Absent, ConditionFailed, Fenced, Held, Leadership, Put, Store, Unchanged
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import ACTIVE, Job


def placement_of(before: Job, after: Job) -> Put | None:
    """What to write when a transition places an attempt; None where it places none."""
    attempt = after.attempt
    if attempt is None or (before.attempt is not None and before.attempt.epoch == attempt.epoch):
        return None
    return _put(after)


async def complete(store: Store, leader: Leadership, jobs: Iterable[StoredJob]) -> None:
    """Writes what leaders of earlier versions did not, also while versions took turns: the placements of attempts that run."""
    known = {entry.key: entry for entry in (await store.list(keys.JOB_PLACEMENTS)).entries}
    for stored in jobs:
        attempt, entry = stored.value.attempt, known.get(placements.key_of(stored.value.name))
        if stored.value.state not in ACTIVE or attempt is None:
            continue
        if entry is not None and placements.epoch_of(entry.value) >= attempt.epoch:
            continue
        put = _put(stored.value)
        try:
            there = Absent(put.key) if entry is None else Unchanged(entry)
            await store.commit(put, when=[Unchanged(stored.entry), there, Held(leader)])
        except Fenced:
            raise
        except ConditionFailed:  # it changed meanwhile: whoever placed it anew has written it
            continue


def _put(job: Job) -> Put:
    assert job.attempt is not None
    return placements.put(job.name, job.attempt.epoch, job.uid, job.attempt.nodes, job.spec.checkpoint_location)
