"""The folder of all checkpoints vanishes under a job that fails: nothing is taken for lost, nothing starts over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass, field

import pytest

from tests.robustness.training import Training
from tests.support.suite import RunningSuite, until
from whaleflux.embedded.processes import with_variables
from whaleflux.v1 import checkpoint_pb2, scheduler_pb2

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(300)]  # the first test waits for the whole run


@dataclass
class Run:
    """What the tests below look at."""

    newest: str = ""
    said: list[str] = field(default_factory=list)  # of the refused attempts
    while_away: dict[str, int] = field(default_factory=dict)  # state of each checkpoint
    ended: scheduler_pb2.Job = field(default_factory=scheduler_pb2.Job)
    restored: list[tuple[int, int, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def run(suite) -> Run:
    return asyncio.run(_run(suite))


async def _run(suite: RunningSuite) -> Run:
    run = Run()
    mount, away = suite.state / "checkpoints", suite.state / "checkpoints-away"
    async with suite.client() as client:
        training = await Training.start(suite, client, "mount")
        await until(training.restorable, "a checkpoint is committed", 60)
        ranks = with_variables(f"WHALEFLUX_JOB={training.name}", "RANK=")
        _send(ranks, signal.SIGSTOP)  # nothing newer is saved from here on
        await asyncio.sleep(1.0)  # what was saved is on its way to the service
        run.newest = (await training.restorable())[0].name
        mount.rename(away)
        try:
            mount.mkdir()
            _send(ranks, signal.SIGKILL)

            async def refused() -> bool:
                job = await training.job()
                messages = [task.message for attempt in (job.attempt, *job.past_attempts) for task in attempt.tasks]
                run.said = [message for message in messages if "CHECKPOINT_UNREACHABLE" in message]
                return bool(run.said)

            await until(refused, "the next attempt is refused", 60)
            run.while_away = {c.name: c.state for c in await training.checkpoints()}
        finally:
            mount.rmdir()  # empty: nothing was written at its place
            away.rename(mount)
        await until(lambda: training.restores()[1:], "an attempt starts again", 120)
        run.restored = training.restores()
        run.ended = await training.finish()
    return run


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def test_the_node_says_that_it_does_not_reach_them_and_starts_nothing(run):
    assert any("this node reaches none of them" in message for message in run.said)


def test_no_checkpoint_is_taken_for_lost(run):
    assert run.while_away[run.newest] == checkpoint_pb2.CHECKPOINT_STATE_COMMITTED
    assert checkpoint_pb2.CHECKPOINT_STATE_LOST not in run.while_away.values()


def test_the_job_goes_on_from_the_newest_once_the_mount_is_back(run):
    first, second = run.restored[:2]
    assert first == (0, 1, "-")
    assert (second[0] > 0, second[2]) == (True, run.newest)
    assert run.ended.state == scheduler_pb2.JOB_STATE_SUCCEEDED, run.ended.state_message
