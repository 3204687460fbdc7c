"""What ranks ask of their agent, over its Unix socket, with the control plane there and away."""

import asyncio
import json

import pytest

from tests.support.fake_control_plane import JOB, agent, desired, until
from whaleflux.checkpoint_storage import STORAGE_LABEL, storage_id
from whaleflux.sdk import frames
from whaleflux.sdk.agent_keeper import AgentError
from whaleflux.v1 import agent_pb2, checkpoint_pb2, inventory_pb2

pytestmark = pytest.mark.integration
SLEEP = ["/bin/sleep", "600"]
COMMITTED = checkpoint_pb2.CHECKPOINT_STATE_COMMITTED
ABANDONED = checkpoint_pb2.CHECKPOINT_STATE_ABANDONED


class Rank:
    """Speaks like a rank of `task`."""

    def __init__(self, state, task="train-1-0", token=""):
        found = json.loads((state / "tasks" / task / "meta.json").read_text())["token"]
        self._token, self._path = token or found, str(state / "ranks" / "rank.sock")

    async def ask(self, timeout=45.0, **call):
        """The answer to one call, `get_restore=GetRestoreRequest()` for instance. Raises what the agent says."""
        request = agent_pb2.RankRequest(token=self._token, **call)
        answer = await asyncio.to_thread(frames.call, self._path, request, timeout)
        if answer.HasField("error"):
            raise AgentError(answer.error.code, answer.error.reason, answer.error.message)
        return getattr(answer, next(iter(call)))


async def running(control, **how):
    control.tasks.want(desired(SLEEP, **how))
    await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])


def finish(checkpoint, rank=0):
    piece = checkpoint_pb2.Piece(rank=rank, path=f"__{rank}_0.distcp", size_bytes=3, checksum="xxh3-128:00")
    return agent_pb2.FinishSaveRequest(checkpoint=checkpoint, rank=rank, pieces=[piece])


async def test_a_save_is_announced_finished_and_restored(control, state):
    async with agent(control, state):
        await running(control, gpus=(0, 1))
        rank = Rank(state)
        nothing = await rank.ask(get_restore=agent_pb2.GetRestoreRequest())
        assert not nothing.HasField("checkpoint")
        begun = await rank.ask(start_save=agent_pb2.StartSaveRequest(step=7, layout="replicated"))
        assert begun.checkpoint == f"{JOB}/checkpoints/s000000000007-e1-n000000"
        assert begun.location.startswith(nothing.location)
        for number in (0, 1):
            await rank.ask(finish_save=finish(begun.checkpoint, number))
        await until(lambda: {r for report in control.checkpoints.reports for r in report.complete_ranks} == {0, 1})
        found = await rank.ask(get_restore=agent_pb2.GetRestoreRequest())
        assert found.checkpoint.step == 7
        assert found.checkpoint.location == begun.location


async def test_a_node_says_which_storage_its_checkpoints_go_to(control, state):
    async with agent(control, state):
        await until(lambda: control.inventory.registered)
        label = control.inventory.registered[0].facts.labels[STORAGE_LABEL]
    assert label == storage_id(state / "checkpoints") != ""


async def test_training_does_not_wait_for_a_checkpoint_service_that_is_away(control, state):
    async with agent(control, state):
        await running(control)
        await control.stop()
        rank = Rank(state)
        begun = await rank.ask(start_save=agent_pb2.StartSaveRequest(step=7))
        await rank.ask(finish_save=finish(begun.checkpoint), timeout=1.0)
        assert len(list((state / "checkpoint-outbox").iterdir())) == 2
        await control.start()
        await until(lambda: control.checkpoints.reports)
        await until(lambda: not list((state / "checkpoint-outbox").iterdir()))
    assert control.checkpoints.known[begun.checkpoint].location == begun.location


async def test_the_restore_waits_for_the_service_up_to_the_callers_deadline(control, state):
    name = f"{JOB}/checkpoints/s000000000003-e1-n000000"
    control.checkpoints.known[name] = checkpoint_pb2.Checkpoint(name=name, step=3, state=COMMITTED, job_uid="u1")
    async with agent(control, state):
        await running(control)
        await control.stop()
        rank = Rank(state)
        with pytest.raises(Exception, match=r"did not finish|Deadline"):
            await rank.ask(get_restore=agent_pb2.GetRestoreRequest(), timeout=0.3)
        asking = asyncio.create_task(rank.ask(get_restore=agent_pb2.GetRestoreRequest()))
        await control.start()
        assert (await asking).checkpoint.step == 3


async def test_all_ranks_get_the_checkpoint_that_the_scheduler_picked(control, state):
    for step in (3, 9):
        name = f"{JOB}/checkpoints/s{step:012d}-e1-n000000"
        control.checkpoints.known[name] = checkpoint_pb2.Checkpoint(name=name, step=step, state=COMMITTED, job_uid="u1")
    picked = f"{JOB}/checkpoints/s000000000003-e1-n000000"
    async with agent(control, state):
        await running(control, edit=lambda task: setattr(task, "restore_checkpoint", picked))
        rank = Rank(state)
        assert (await rank.ask(get_restore=agent_pb2.GetRestoreRequest())).checkpoint.step == 3
        assert (await rank.ask(get_restore=refusing(picked, read=DAMAGED))).checkpoint.step == 9
    assert control.checkpoints.lost == [(picked, 1, "__0_0.distcp")]


DAMAGED = checkpoint_pb2.Piece(path="__0_0.distcp", size_bytes=3, checksum="xxh3-128:ff")


def refusing(*checkpoints, read=None):
    refused = [
        agent_pb2.RefusedCheckpoint(checkpoint=name, message="Stale file handle", read=read) for name in checkpoints
    ]
    return agent_pb2.GetRestoreRequest(refused=refused)


async def test_what_a_rank_cannot_read_is_not_lost_and_is_not_a_fresh_start(control, state):
    both = [f"{JOB}/checkpoints/s{step:012d}-e1-n000000" for step in (3, 9)]
    for step, name in zip((3, 9), both, strict=True):
        control.checkpoints.known[name] = checkpoint_pb2.Checkpoint(name=name, step=step, state=COMMITTED, job_uid="u1")
    async with agent(control, state):
        await running(control)
        rank = Rank(state)
        assert (await rank.ask(get_restore=refusing(both[1]))).checkpoint.step == 3
        with pytest.raises(AgentError, match=r"none can be restored from here.*Stale file handle") as refused:
            await rank.ask(get_restore=refusing(*both))
    assert (refused.value.code, refused.value.reason) == ("FAILED_PRECONDITION", "CHECKPOINT_UNREACHABLE")
    assert control.checkpoints.lost == []
    assert all(c.state == COMMITTED for c in control.checkpoints.known.values())


async def test_a_rank_speaks_of_its_own_job_only(control, state):
    foreign = "queues/default/jobs/other/checkpoints/s000000000003-e1-n000000"
    control.checkpoints.known[foreign] = checkpoint_pb2.Checkpoint(name=foreign, step=3, state=COMMITTED)
    async with agent(control, state):
        await running(control)
        rank = Rank(state)
        for call in (
            {"get_restore": refusing(foreign, read=DAMAGED)},
            {"confirm_intact": agent_pb2.ConfirmIntactRequest(checkpoint=foreign)},
            {"fail_save": agent_pb2.FailSaveRequest(checkpoint=foreign)},
        ):
            with pytest.raises(AgentError, match="is not one of"):
                await rank.ask(**call)
        await until(lambda: [o.kind for o in control.health.observations].count("RANK_REFUSED") == 3)
        assert all(
            o.job == JOB and "NOT_OWNER" in o.detail for o in control.health.observations if o.kind == "RANK_REFUSED"
        )
    assert control.checkpoints.known[foreign].state == COMMITTED


async def test_a_failed_save_is_given_up_and_seen(control, state):
    async with agent(control, state):
        await running(control)
        rank = Rank(state)
        begun = await rank.ask(start_save=agent_pb2.StartSaveRequest(step=7))
        await rank.ask(fail_save=agent_pb2.FailSaveRequest(checkpoint=begun.checkpoint, step=7, message="disk full"))
        await until(lambda: control.checkpoints.known[begun.checkpoint].state == ABANDONED)
        await until(lambda: [seen for seen in control.health.observations if seen.kind == "SAVE_FAILED"])
        assert "disk full" in control.health.observations[-1].detail


async def test_a_node_without_the_mount_refuses_the_next_attempt_and_starts_nothing(control, state, tmp_path):
    name = f"{JOB}/checkpoints/s000000000003-e1-n000000"
    control.checkpoints.known[name] = checkpoint_pb2.Checkpoint(
        name=name, step=3, state=COMMITTED, job_uid="u1", location=str(tmp_path / "mnt" / "job" / "s3"), storage="s1"
    )
    async with agent(control, state):
        control.tasks.want(desired(["/bin/touch", str(tmp_path / "ran")], epoch=2))
        await until(lambda: control.tasks.phases("train-2-0")[-1:] == ["REFUSED"])
    assert "CHECKPOINT_UNREACHABLE" in control.tasks.last("train-2-0").message
    assert not (tmp_path / "ran").exists()


async def test_a_save_of_a_fenced_epoch_is_refused(control, state):
    async with agent(control, state):
        await running(control)
        control.checkpoints.fence = 2
        rank = Rank(state)
        with pytest.raises(Exception, match="epoch 1 is over"):
            await rank.ask(start_save=agent_pb2.StartSaveRequest(step=7))


@pytest.mark.parametrize(
    ("method", "request_", "word"),
    [
        (
            "finish_save",
            agent_pb2.FinishSaveRequest(checkpoint=f"{JOB}/checkpoints/s1-e1", rank=5),
            "does not run here",
        ),
        (
            "finish_save",
            agent_pb2.FinishSaveRequest(checkpoint="queues/q/jobs/other/checkpoints/s1-e1"),
            "is not one of",
        ),
        ("report_progress", agent_pb2.ReportProgressRequest(rank=-1), "does not run here"),
        ("start_save", agent_pb2.StartSaveRequest(step=-1), "negative"),
    ],
)
async def test_what_a_rank_may_not_say_is_refused(control, state, method, request_, word):
    async with agent(control, state):
        await running(control)
        rank = Rank(state)
        with pytest.raises(Exception, match=word):
            await rank.ask(**{method: request_})


async def test_only_a_task_that_runs_is_listened_to(control, state):
    async with agent(control, state):
        await running(control)
        rank = Rank(state, token="guessed")
        with pytest.raises(Exception, match="not the token"):
            await rank.ask(get_restore=agent_pb2.GetRestoreRequest())
        rank = Rank(state)
        control.tasks.unwant("train-1-0")
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "KILLED")
        with pytest.raises(Exception, match="not the token"):
            async with asyncio.timeout(45):
                while True:  # until the agent itself has noted what it has reported
                    await rank.ask(report_progress=agent_pb2.ReportProgressRequest())


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
