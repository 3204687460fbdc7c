"""Shares of one GPU on its node: they run side by side, a neighbour holds nobody's GPU, who stays above its share is ended."""

from dataclasses import replace

import pytest

from tests.support.fake_control_plane import NODE, desired
from tests.unit.test_agent_custody import Machine, Node
from whaleflux.manifests.job_fields import Spec
from whaleflux.sdk.gpu_share import allocator_bytes, keep_to_share
from whaleflux_agent.core.environment import LaunchContext, rank_environment
from whaleflux_agent.core.reconcile import blockers
from whaleflux_agent.core.work import ActualTask, Stage, Work
from whaleflux_agent.devices.source import DevicesUnreadable
from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.api import LaunchPlan, RankExit, RankPlan
from whaleflux_agent.share_watch import FORGIVEN_S, ShareWatch
from whaleflux_agent.termination import GpuCheck

GB = 10**9
OURS, NEIGHBOUR = 4_000_001, 4_000_002  # pids beyond those of Linux
SHARE = Work("two-1-0", "queues/q/jobs/two", 1, ("GPU-a", "GPU-b"), first_rank=2, world_size=4, share_bytes=20 * GB)


@pytest.fixture
def tokens(monkeypatch):
    """Whose token each process bears."""
    known = {OURS: "ours", NEIGHBOUR: "theirs"}
    monkeypatch.setattr(
        procfs, "environment", lambda pid: [f"{procfs.TASK_TOKEN}={known[pid]}".encode()] if pid in known else []
    )


def other(job="queues/q/jobs/one", share_bytes=20 * GB, gpus=("GPU-a",)):
    return ActualTask(f"{job}-1-0", job, 1, gpus, Stage.RUNNING, share_bytes)


@pytest.mark.parametrize(
    ("have", "blocks"),
    [
        (other(), False),
        (other(share_bytes=0), True),
        (other(share_bytes=0, gpus=("GPU-c",)), False),
        (other(job=SHARE.job, gpus=("GPU-c",)), True),  # another attempt of its own
    ],
)
def test_shares_of_one_gpu_start_side_by_side_and_wait_for_who_has_it_whole(have, blocks):
    assert bool(blockers(SHARE, [have])) == blocks


async def test_a_neighbour_on_the_same_gpu_is_not_what_is_left_of_a_task(tokens):
    computing = [NEIGHBOUR]

    async def ask(uuids):
        return frozenset(computing)

    shared, alone = GpuCheck(ask, ("GPU-a",), frozenset(), "ours"), GpuCheck(ask, ("GPU-a",), frozenset())
    assert await shared.remains() == ()
    assert await alone.remains() == (f"pid {NEIGHBOUR} computes on its GPUs",)
    computing.append(OURS)
    assert await shared.remains() == (f"pid {OURS} computes on its GPUs",)


async def test_a_task_beside_another_starts_at_once_and_ends_while_the_other_computes(tmp_path):
    machine = Machine()
    node = await Node(machine, tmp_path).start()

    def share(job):
        return desired(["x"], job=f"queues/q/jobs/{job}", edit=lambda d: setattr(d.task, "share_memory_bytes", 1 << 30))

    await node.want(share("one"), share("two"))
    await node.until(lambda: [node.phases(f"{job}-1-0")[-1:] for job in ("one", "two")] == [["RUNNING"]] * 2)
    machine.pids = frozenset({NEIGHBOUR})
    await node.want(share("two"))
    await node.until(lambda: node.phases("one-1-0")[-1] == "KILLED")
    assert not any(report.stuck for report in node.reports("one-1-0"))
    await node.stop()


def test_a_rank_is_ended_by_its_own_process_or_by_that_of_the_whole_node(tmp_path):
    ranks = [RankPlan(rank, ("x",), (), tmp_path / "log") for rank in (4, 5)]
    plan = LaunchPlan("j-1-0", "t", tmp_path, tuple(ranks), "/")
    assert [plan.process_of(rank) for rank in (4, 5)] == [0, 1]
    assert replace(plan, ranks=(ranks[0],)).process_of(5) == 0


class Hungry(Machine):
    """Its one process takes more than the share of its task."""

    async def memory_used(self, gpu_uuids):
        return {uuid: {OURS: 2 << 30} for uuid in gpu_uuids}

    async def exits(self):
        await self.ended.wait()
        yield RankExit(0, -9, out_of_memory=True, why=self.why)

    async def end(self, rank, why):
        self.why = why
        self.lives = False
        self.ended.set()


async def test_the_agent_ends_who_takes_more_and_reports_why(tmp_path, monkeypatch):
    monkeypatch.setattr(procfs, "bearers", lambda pids, token: frozenset(pids))
    node = await Node(Hungry(), tmp_path).start()
    await node.want(desired(["x"], edit=lambda d: setattr(d.task, "share_memory_bytes", 1 << 30)))
    await node.until(lambda: node.phases()[-1:] == ["EXITED"])
    last = node.reports()[-1]
    assert last.out_of_memory and "it used 2.15 GB of GPU memory" in last.message and "1.07 GB" in last.message
    await node.stop()


class TestWatch:
    @pytest.fixture
    def watch(self, tokens):
        self.used = {"GPU-a": {OURS: 5 * GB, NEIGHBOUR: 90 * GB}, "GPU-b": {OURS: 25 * GB}}

        async def ask(uuids):
            if self.used is None:
                raise DevicesUnreadable("NVML did not answer")
            return self.used

        return ShareWatch(SHARE, "ours", ask)

    async def test_who_stays_above_its_share_is_ended_with_a_reason_and_neighbours_do_not_count(self, watch):
        assert await watch.look(100.0) == []
        assert await watch.look(100.0 + FORGIVEN_S - 0.1) == []
        ((rank, why),) = await watch.look(100.0 + FORGIVEN_S)
        assert rank == 3 and "it used 25.00 GB of GPU memory" in why and "(gpu.share) is 20.00 GB" in why

    async def test_a_peak_is_forgiven_and_a_silent_driver_proves_nothing(self, watch):
        await watch.look(100.0)
        self.used, before = None, self.used
        assert await watch.look(200.0) == []
        self.used = before
        before["GPU-b"][OURS] = 20 * GB
        assert await watch.look(201.0) == []
        before["GPU-b"][OURS] = 30 * GB
        assert await watch.look(202.0) == [], "counted anew from here"


def test_a_rank_knows_its_share_and_pytorch_is_kept_within_it(monkeypatch):
    place = LaunchContext(NODE, "t", "/s", (), "")
    found = rank_environment(SHARE, place, 0, inherited={}, error_file="/e")
    assert found["WHALEFLUX_GPU_MEMORY_BYTES"] == str(20 * GB)
    whole = Work("t", "queues/q/jobs/j", 1, ("GPU-a",), spec=Spec())
    assert "WHALEFLUX_GPU_MEMORY_BYTES" not in rank_environment(whole, place, 0, inherited={}, error_file="/e")
    assert allocator_bytes(20 * GB, 141 * GB) == 20 * GB - 700 * 10**6
    assert allocator_bytes(1 * GB, 141 * GB) == GB // 2
    monkeypatch.delenv("WHALEFLUX_GPU_MEMORY_BYTES", raising=False)
    assert keep_to_share() == 0
