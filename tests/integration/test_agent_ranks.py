"""What ranks ask of their agent, over its Unix socket, with the control plane there and away."""

import asyncio
import json

import grpc
import pytest

from tests.support.fake_control_plane import JOB, ControlPlane, admit, agent, desired, until
from whaleflux.rpc.status import from_rpc_error
from whaleflux.v1 import agent_pb2, agent_pb2_grpc, checkpoint_pb2, inventory_pb2
from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.procfs import SIGKILL

pytestmark = pytest.mark.integration
SLEEP = ["/bin/sleep", "600"]
COMMITTED = checkpoint_pb2.CHECKPOINT_STATE_COMMITTED


@pytest.fixture
async def control(tmp_path):
    plane = ControlPlane(tmp_path)
    await plane.start()
    yield plane
    await plane.stop()


@pytest.fixture
def state(control, tmp_path):
    folder = tmp_path / "state"
    admit(control, folder)
    yield folder
    for process in procfs.find("WHALEFLUX_AGENT_SOCKET", str(folder / "rank.sock")):
        process.signal(SIGKILL)


class Rank:
    """Speaks like a rank of `task`."""

    def __init__(self, state, task="train-1-0", token=""):
        found = json.loads((state / "tasks" / task / "meta.json").read_text())["token"]
        self._metadata = (("x-wf-task-token", token or found),)
        self._channel = grpc.aio.insecure_channel(f"unix:{state}/rank.sock")
        self._stub = agent_pb2_grpc.RankServiceStub(self._channel)

    async def ask(self, method, request, timeout=10.0):
        try:
            return await getattr(self._stub, method)(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self._channel.close()


async def running(control, **how):
    control.tasks.want(desired(SLEEP, **how))
    await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])


def finish(checkpoint, rank=0):
    piece = checkpoint_pb2.Piece(rank=rank, path=f"__{rank}_0.distcp", size_bytes=3, checksum="xxh3-128:00")
    return agent_pb2.FinishSaveRequest(checkpoint=checkpoint, rank=rank, pieces=[piece])


async def test_a_save_is_announced_finished_and_restored(control, state):
    async with agent(control, state):
        await running(control, gpus=(0, 1))
        async with Rank(state) as rank:
            nothing = await rank.ask("GetRestore", agent_pb2.GetRestoreRequest())
            assert not nothing.HasField("checkpoint")
            begun = await rank.ask("StartSave", agent_pb2.StartSaveRequest(step=7, layout="replicated"))
            assert begun.checkpoint == f"{JOB}/checkpoints/s000000000007-e1"
            assert begun.location.startswith(nothing.location)
            for number in (0, 1):
                await rank.ask("FinishSave", finish(begun.checkpoint, number))
            await until(lambda: {r for report in control.checkpoints.reports for r in report.complete_ranks} == {0, 1})
            found = await rank.ask("GetRestore", agent_pb2.GetRestoreRequest())
            assert found.checkpoint.step == 7
            assert found.checkpoint.location == begun.location


async def test_training_does_not_wait_for_a_checkpoint_service_that_is_away(control, state):
    async with agent(control, state):
        await running(control)
        await control.stop()
        async with Rank(state) as rank:
            begun = await rank.ask("StartSave", agent_pb2.StartSaveRequest(step=7))
            await rank.ask("FinishSave", finish(begun.checkpoint), timeout=1.0)
        assert len(list((state / "saves").iterdir())) == 2
        await control.start()
        await until(lambda: control.checkpoints.reports)
        await until(lambda: not list((state / "saves").iterdir()))
    assert control.checkpoints.known[begun.checkpoint].location == begun.location


async def test_the_restore_waits_for_the_service_up_to_the_callers_deadline(control, state):
    name = f"{JOB}/checkpoints/s000000000003-e1"
    control.checkpoints.known[name] = checkpoint_pb2.Checkpoint(name=name, step=3, state=COMMITTED)
    async with agent(control, state):
        await running(control)
        await control.stop()
        async with Rank(state) as rank:
            with pytest.raises(Exception, match=r"did not finish|Deadline"):
                await rank.ask("GetRestore", agent_pb2.GetRestoreRequest(), timeout=0.3)
            asking = asyncio.create_task(rank.ask("GetRestore", agent_pb2.GetRestoreRequest()))
            await control.start()
            assert (await asking).checkpoint.step == 3


async def test_all_ranks_get_the_checkpoint_that_the_scheduler_picked(control, state):
    for step in (3, 9):
        name = f"{JOB}/checkpoints/s{step:012d}-e1"
        control.checkpoints.known[name] = checkpoint_pb2.Checkpoint(name=name, step=step, state=COMMITTED)
    picked = f"{JOB}/checkpoints/s000000000003-e1"
    async with agent(control, state):
        await running(control, edit=lambda task: setattr(task, "restore_checkpoint", picked))
        async with Rank(state) as rank:
            assert (await rank.ask("GetRestore", agent_pb2.GetRestoreRequest())).checkpoint.step == 3
            corrupt = agent_pb2.GetRestoreRequest(corrupt_checkpoint=picked, corrupt_message="bad checksum")
            assert (await rank.ask("GetRestore", corrupt)).checkpoint.step == 9
    assert control.checkpoints.lost == [picked]


async def test_a_save_of_a_fenced_epoch_is_refused(control, state):
    async with agent(control, state):
        await running(control)
        control.checkpoints.fence = 2
        async with Rank(state) as rank:
            with pytest.raises(Exception, match="epoch 1 is over"):
                await rank.ask("StartSave", agent_pb2.StartSaveRequest(step=7))


@pytest.mark.parametrize(
    ("method", "request_", "word"),
    [
        ("FinishSave", agent_pb2.FinishSaveRequest(checkpoint=f"{JOB}/checkpoints/s1-e1", rank=5), "does not run here"),
        (
            "FinishSave",
            agent_pb2.FinishSaveRequest(checkpoint="queues/q/jobs/other/checkpoints/s1-e1"),
            "is not one of",
        ),
        ("ReportProgress", agent_pb2.ReportProgressRequest(rank=-1), "does not run here"),
        ("StartSave", agent_pb2.StartSaveRequest(step=-1), "negative"),
    ],
)
async def test_what_a_rank_may_not_say_is_refused(control, state, method, request_, word):
    async with agent(control, state):
        await running(control)
        async with Rank(state) as rank:
            with pytest.raises(Exception, match=word):
                await rank.ask(method, request_)


async def test_only_a_task_that_runs_is_listened_to(control, state):
    async with agent(control, state):
        await running(control)
        async with Rank(state, token="guessed") as rank:
            with pytest.raises(Exception, match="not the token"):
                await rank.ask("GetRestore", agent_pb2.GetRestoreRequest())
        async with Rank(state) as rank:
            control.tasks.unwant("train-1-0")
            await until(lambda: control.tasks.phases("train-1-0")[-1] == "KILLED")
            with pytest.raises(Exception, match="not the token"):
                async with asyncio.timeout(10):
                    while True:  # until the agent itself has noted what it has reported
                        await rank.ask("ReportProgress", agent_pb2.ReportProgressRequest())


async def test_datasets_are_fetched_once_and_told_of(control, state, tmp_path):
    source = tmp_path / "c4"
    source.mkdir()
    (source / "part-0").write_bytes(b"x" * 1000)
    control.inventory.datasets["datasets/c4"] = inventory_pb2.Dataset(
        name="datasets/c4", uri=str(source), size_bytes=1000
    )
    command = ["/bin/sh", "-c", "cat $WHALEFLUX_DATASET_C4/part-0 | wc -c > counted; sleep 600"]
    with_data = {"edit": lambda task: task.spec.datasets.append("datasets/c4")}
    async with agent(control, state):
        control.tasks.want(desired(command, **with_data))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        assert "FETCHING" in control.tasks.phases("train-1-0")
        assert any(copy.present_bytes == 1000 for copy in control.inventory.cached)
        (counted,) = [state / "work" / folder.name / "counted" for folder in (state / "work").iterdir()]
        await until(lambda: counted.exists() and counted.read_text().strip() == "1000")
        control.tasks.want(desired(SLEEP, job="queues/default/jobs/next", gpus=(1,), **with_data))
        await until(lambda: control.tasks.phases("next-1-0")[-1:] == ["RUNNING"])
        unknown = {"edit": lambda task: task.spec.datasets.append("datasets/none")}
        control.tasks.want(desired(SLEEP, job="queues/default/jobs/bad", gpus=(2,), **unknown))
        await until(lambda: control.tasks.phases("bad-1-0")[-1:] == ["REFUSED"])
    assert "does not exist" in control.tasks.last("bad-1-0").message
