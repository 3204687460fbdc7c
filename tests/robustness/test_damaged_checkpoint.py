"""Bytes of the newest checkpoint rot on the disk: the damage is found, reported, and the one before is restored."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.robustness.training import Training
from tests.support.suite import RunningSuite, until
from whaleflux.embedded.processes import with_variables
from whaleflux.v1 import checkpoint_pb2, scheduler_pb2

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(300)]  # the first test waits for the whole run


@dataclass
class Run:
    """What the tests below look at."""

    damaged: checkpoint_pb2.Checkpoint = field(default_factory=checkpoint_pb2.Checkpoint)
    before_it: checkpoint_pb2.Checkpoint = field(default_factory=checkpoint_pb2.Checkpoint)
    afterwards: dict[str, checkpoint_pb2.Checkpoint] = field(default_factory=dict)
    restored: list[list[tuple[int, int, str]]] = field(default_factory=list)
    ended: scheduler_pb2.Job = field(default_factory=scheduler_pb2.Job)


@pytest.fixture(scope="module")
def run(suite) -> Run:
    return asyncio.run(_run(suite))


async def _run(suite: RunningSuite) -> Run:
    run = Run()
    async with suite.client() as client:
        training = await Training.start(suite, client, "rot")

        async def two() -> bool:
            return len(await training.restorable()) >= 2

        await until(two, "two checkpoints are committed", 60)
        ranks = with_variables(f"WHALEFLUX_JOB={training.name}", "RANK=")
        _send(ranks, signal.SIGSTOP)  # nothing newer is saved from here on
        run.damaged, run.before_it = (await _settled(training))[:2]
        _flip_a_byte(Path(run.damaged.location) / "rank-1.json")
        _send(ranks, signal.SIGKILL)
        await until(lambda: training.ranks_at(epoch=2) == {0, 1}, "the next attempt steps", 60)
        run.afterwards = {c.name: c for c in await training.checkpoints()}
        run.ended = await training.finish()
        run.restored = [training.restores(rank) for rank in (0, 1)]
    return run


async def _settled(training: Training) -> list[checkpoint_pb2.Checkpoint]:
    """The restorable ones, newest first, once what was on its way has been committed."""
    found: list[checkpoint_pb2.Checkpoint] = []

    async def unchanged() -> bool:
        before = [c.name for c in found]
        found[:] = await training.restorable()
        await asyncio.sleep(0.5)
        return before == [c.name for c in found] and len(found) >= 2

    await until(unchanged, "commits have settled", 60)
    return found


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_damaged_one_is_reported_lost_with_the_reason(run):
    lost = run.afterwards[run.damaged.name]
    assert lost.state == checkpoint_pb2.CHECKPOINT_STATE_LOST
    assert "rank-1.json has another checksum" in lost.message


def test_every_rank_restores_the_one_before(run):
    for restored in run.restored:
        first, second = restored
        assert first == (0, 1, "-")
        assert second == (run.before_it.step, 2, run.before_it.name)


def test_the_job_goes_on_and_ends_well(run):
    assert run.ended.state == scheduler_pb2.JOB_STATE_SUCCEEDED, run.ended.state_message
    assert run.ended.epoch == 2
