"""Random histories of a whole suite: whatever users, machines and services do, no work is lost and no GPU is given twice.

8 histories by default, HISTORIES=1000 for the full run (`make soak`); HISTORY_SEED names the first seed. A
history that fails prints its seed and its action log; that seed alone repeats it: HISTORIES=1 HISTORY_SEED=N.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator

import pytest

from tests.robustness import validate
from tests.robustness.history import Change
from tests.robustness.random_histories import check
from tests.robustness.random_histories.actions import History
from tests.robustness.random_histories.world import ENDED, World, new_world, retried
from tests.robustness.recording import state_of, truth_of
from tests.support.suite import until
from whaleflux.errors import NotFound
from whaleflux.reasons import ErrorReason
from whaleflux.sdk.client import AsyncClient
from whaleflux.v1 import checkpoint_pb2, scheduler_pb2

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(600)]
FIRST = int(os.environ.get("HISTORY_SEED", "1"))
COUNT = int(os.environ.get("HISTORIES", "8"))
ENDED_WITHIN_S = 90.0
HISTORIES_PER_WORLD = 50  # then a fresh one: the journal of a world grows


class Worlds:
    """One world for many histories; a new one after a history that failed."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._world: World | None = None
        self._used = 0

    def next(self) -> World:
        if self._world is None or self._world.broken or self._used >= HISTORIES_PER_WORLD:
            self.close()
            self._world, self._used = self._stack.enter_context(new_world()), 0
        self._used += 1
        return self._world

    def close(self) -> None:
        self._stack.close()
        self._world = None


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    made = Worlds()
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_no_work_is_lost_and_no_gpu_is_given_twice(worlds, seed):
    world = worlds.next()
    world.broken = True  # until it is known to be whole
    history, wrong = asyncio.run(_lived(world, seed))
    world.broken = bool(wrong)
    print(f"seed {seed}", *history.log, *(f"WRONG    {each}" for each in wrong), sep="\n")
    assert not wrong, f"seed {seed}: {wrong[0]}"


async def _lived(world: World, seed: int) -> tuple[History, list[str]]:
    finish = world.state / "jobs" / "finish"
    finish.unlink(missing_ok=True)
    async with world.suite.client() as client:
        began_s = time.monotonic()
        missing = await world.make_whole(client)
        history = History(world, client, seed)
        began_bytes = world.journal_file.stat().st_size if world.journal_file.exists() else 0
        (began, held), timeline = await state_of(world.store()), world.timeline
        ready_s = time.monotonic()
        await history.run()
        acted_s = time.monotonic()
        missing = missing or await world.make_whole(client)
        await retried(history.release_all)
        finish.touch()
        whole_s = time.monotonic()
        missing = missing or await _all_ended(world, client, history)
        ended_s = time.monotonic()
        history.log.append(
            f"ready in {ready_s - began_s:.1f} s, acted for {acted_s - ready_s:.1f}, whole in {whole_s - acted_s:.1f}, "
            f"all ended in {ended_s - whole_s:.1f}"
        )
        await world.retire_aliases(client)
        restored = world.timeline > timeline
        truth = [] if restored else await truth_of(world.store(), began)  # revisions went back: no one history any more
        wrong = [missing] * bool(missing) + history.wrong
        wrong += [
            str(found)
            for found in [
                *validate.replay(truth, held),
                *await _violations(client, history, world.journal(began_bytes), truth, restored=restored),
            ]
        ]
        named = {job.name for job in history.jobs.values() if any(job.name in words for words in wrong)}
        history.log += [
            str(change) for change in truth if any(change.name.endswith(n) or n + "/" in change.name for n in named)
        ]
    return history, wrong


async def _violations(
    client: AsyncClient, history: History, journal: list[check.Line], truth: list[Change], *, restored: bool
):
    states = {job.name: await _state(client, job.name) for job in history.jobs.values()}
    found = [
        *check.gpus_held_once(journal),
        *check.acknowledged_end_as_they_must(history.jobs.values(), states, history.world.timeline),
    ]
    if not restored:
        found += [*check.attempts_run_once(journal), *check.set_up_once(journal)]
        found += check.checkpoints_kept(truth, await _checkpoints(client, history))
        found += check.restored_newest(truth, journal)
    return found


async def _all_ended(world: World, client: AsyncClient, history: History) -> str:
    async def over() -> bool:
        for job in history.jobs.values() if history.bytes_were_lost else ():
            if not job.cancelled and ErrorReason.CHECKPOINT_UNREACHABLE in await _words(client, job.name):
                await history.give_up(job)
        states = [await _state(client, job.name) for job in history.jobs.values()]
        names = {scheduler_pb2.JobState.Name(state).removeprefix("JOB_STATE_") for state in ENDED} | {"GONE"}
        return all(state in names for state in states) and not any(machine.ranks() for machine in world.machines)

    try:
        await until(over, "every job ends and every rank is gone", ENDED_WITHIN_S, 0.2)
    except AssertionError as never:
        left = [await _words(client, job.name) for job in history.jobs.values()]
        return f"{never}; {[words for words in left if words]}; ranks {[(m.node, sorted(m.ranks())) for m in world.machines]}"
    return ""


async def _words(client: AsyncClient, name: str) -> str:
    """Why it has not ended; "" when it has."""
    try:
        job = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=10)
    except NotFound:
        return ""
    if job.state in ENDED:
        return ""
    state = scheduler_pb2.JobState.Name(job.state)
    phases = [f"{task.id} on {task.node} {scheduler_pb2.TaskPhase.Name(task.phase)}" for task in job.attempt.tasks]
    told = f"{name} {state} epoch {job.epoch} restarts {job.restarts}: {job.state_message}"
    return "; ".join((told, *phases))


async def _state(client: AsyncClient, name: str) -> str:
    found = []

    async def ask() -> None:
        try:
            job = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=5)
        except NotFound:
            found.append("GONE")
        else:
            found.append(scheduler_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_"))

    async with asyncio.timeout(30):
        await retried(ask)
    return str(found[0])


async def _checkpoints(client: AsyncClient, history: History) -> dict[str, str]:
    found = {}
    for job in history.jobs.values():
        request = checkpoint_pb2.ListCheckpointsRequest(parent=job.name, page_size=500)
        for listed in (await client.checkpoint.ListCheckpoints(request, timeout=10)).checkpoints:
            found[listed.name] = checkpoint_pb2.CheckpointState.Name(listed.state).removeprefix("CHECKPOINT_STATE_")
    return found
