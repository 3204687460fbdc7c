"""A planned training in the real suite: a machine dies, and it goes on in another split, from its checkpoint, on what is left."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.manifests.training_values import model_text
from whaleflux.planning.model_files import model_from_text
from whaleflux.planning.offers import Offer
from whaleflux.planning.replan import replanned
from whaleflux.planning.wish import KEY, Wish
from whaleflux.v1 import checkpoint_pb2
from whaleflux.v1 import scheduler_pb2 as pb

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
pytest.importorskip("torch")

NODES = (Machine("edge", "rtx-a", "rtx4090x2"), Machine("edge", "rtx-b", "rtx4090x2"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "planned"
GPU = "RTX4090"


def spec():
    """examples/planned on four GPUs, two that share each layer, and may go on with two."""
    model = model_text(model_from_text((EXAMPLE / "shape.yaml").read_text(), "tiny"))
    wish = Wish(model, GPU, batch=24, sequence=32, tp=2, pp=1, cp=1, whole=True)
    first = replanned(wish, 4, Offer(CATALOGUE.types[GPU], 4), wish.kept)
    mesh = json.dumps(json.loads(first.mesh) | {KEY: wish.said()})
    return pb.JobSpec(
        command=[sys.executable, str(EXAMPLE / "train.py"), "--steps", "1000000"],
        gpus=4,
        gpu=pb.GpuRequirement(any_of=[GPU]),
        elastic=pb.Elastic(min=2, max=4),
        checkpoint=pb.CheckpointPolicy(every_steps=5),
        training=pb.Training(model=model, batch=24, sequence=32),
        parallelism=pb.Parallelism(tensor=2),
        environment={"MESH": mesh, "OMP_NUM_THREADS": "1"},
    )


async def test_a_training_that_lost_a_machine_goes_on_in_another_split_from_its_checkpoint():
    with running_suite() as suite:
        await suite.join(NODES)
        async with suite.client() as client:
            request = pb.CreateJobRequest(parent="queues/default", job_id="planned", job=pb.Job(spec=spec()))
            name = (await client.scheduler.CreateJob(request, timeout=20)).name

            async def job():
                return await client.scheduler.GetJob(pb.GetJobRequest(name=name), timeout=5)

            async def saved():
                listed = checkpoint_pb2.ListCheckpointsRequest(parent=name)
                found = (await client.checkpoint.ListCheckpoints(listed, timeout=5)).checkpoints
                return [one for one in found if one.state == checkpoint_pb2.CHECKPOINT_STATE_COMMITTED]

            async def goes_on():
                now = await job()
                return now if now.attempt.number == 2 and now.state == pb.JOB_STATE_RUNNING else None

            await until(saved, "its first checkpoint", 90)
            first = await job()
            assert (first.attempt.split.tensor, first.attempt.split.data) == (2, 2)
            assert {one.resharding for one in await saved()} == {checkpoint_pb2.RESHARDING_ANY_SPLIT}
            suite.fleet.kill_node(NODES[1].name)
            await until(goes_on, "a second attempt", 120)
            second = await job()
            split = second.attempt.split
            assert (split.tensor, split.data, len(second.attempt.tasks)) == (1, 2, 1)
            assert split.why.startswith(f"planned anew for 2 GPUs instead of 4: {split.words}; before: tp 2, dp 2")
            assert "any split can read its checkpoint" in split.why
            assert split.why in second.decision.reasons
            before = max(one.step for one in await saved() if one.epoch == first.attempt.epoch)

            async def saves_anew():
                return [one for one in await saved() if one.epoch == second.attempt.epoch]

            await until(saves_anew, "a checkpoint of the new split", 90)
            newest = max(await saves_anew(), key=lambda one: one.step)
            assert (newest.world_size, newest.step > before) == (2, True), "it went on, and did not begin again"
            log = "".join(
                path.read_text()
                for path in suite.fleet.folder(NODES[0].name).glob(f"tasks/*planned.{second.epoch}.*/rank-0.log")
            )
            steps = [int(step) for step in re.findall(r"^step (\d+) loss", log, re.MULTILINE)]
            assert steps[0] == before + 1
            assert math.prod(json.loads(split.mesh)["mesh"].values()) == 2
            await client.scheduler.CancelJob(pb.CancelJobRequest(name=name), timeout=5)
