"""The leader is killed while it places a burst of jobs: its successor goes on, nothing is lost, nothing is done twice.

The long form is a benchmark: make bench NAME=leader_loss.
"""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from benchmarks.leader_loss import Seen, burst, note
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState, SchedulingDecision, Spec

pytestmark = [pytest.mark.robustness, pytest.mark.timeout(300)]
NOW = datetime(2026, 5, 1, tzinfo=UTC)


async def test_a_leader_that_is_killed_in_a_burst_loses_and_repeats_nothing(tmp_path):
    outcome = await burst(tmp_path, 160, 80, run_s=0.1, patience_s=90)
    assert outcome.wrong == ()
    assert 160 // 3 <= outcome.placed_before < 160, "it was killed in the midst"
    assert outcome.expired_s <= outcome.leads_s <= outcome.decides_s <= 30, (
        "3 s are promised, on a host with cores to spare"
    )


def test_what_must_not_be_is_seen():
    """The burst's own look at the store's history."""
    seen, (a, b) = Seen(), (placed(name, "GPU-1") for name in "ab")
    note(seen, 2, [a], 1.0)
    note(seen, 3, [a])
    assert (seen.placed, seen.wrong) == (1, [])
    note(seen, 4, [b])
    assert seen.wrong == ["GPU-1 was given to queues/q/jobs/b while queues/q/jobs/a held it, at revision 4"]


def placed(name: str, gpu: str) -> Job:
    waiting = Job(f"queues/q/jobs/{name}", Spec(command=("x",), gpus=1), JobState.QUEUED, NOW)
    where = lifecycle.GpuAssignment((("sites/s/nodes/n", (gpu,)),))
    return lifecycle.place(waiting, where, SchedulingDecision(NOW, True, "here"), NOW)
