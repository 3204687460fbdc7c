"""Planned elastic jobs on other GPUs than they were planned for: what their checkpoints allow, and the plan that their ranks get."""

import asyncio
import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scheduler_world import World, node, until
from tests.support.virtual_time import LoopClock
from whaleflux.errors import NotFound, Unavailable
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.manifests.job_checks import violations
from whaleflux.manifests.job_fields import Spec
from whaleflux.planning.offers import Offer
from whaleflux.planning.replan import replanned
from whaleflux.planning.wish import KEY, Wish, plain_mesh, wish_in
from whaleflux.v1 import checkpoint_pb2, health_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import job_privacy
from whaleflux_scheduler.core import elastic, planned_sizes
from whaleflux_scheduler.core.model import Attempt, AttemptSplit, Job, JobState
from whaleflux_scheduler.core.planned_sizes import Allowance, Saved
from whaleflux_scheduler.replanning import Replanning

NOW = datetime(2026, 5, 1, tzinfo=UTC)
GPU = "H100-80GB"
OFFER = Offer(CATALOGUE.types[GPU], 4)
MODEL = json.dumps({"name": "small", "layers": 8, "hidden": 1536, "heads": 12, "vocabulary": 32000, "sequence": 2048})
WISH = Wish(MODEL, GPU, batch=96, sequence=2048, tp=2, pp=1, cp=1, whole=True)


def mesh_of(wish=WISH, gpus=4):
    """As `submit` writes it: tensor parallelism of 2, twice."""
    made = replanned(wish, gpus, OFFER, wish.kept)
    return json.dumps(json.loads(made.mesh) | {KEY: wish.said()})


def spec_of(wish=WISH, gpus=4, least=2, most=0, **more):
    sizes = {"elastic_min": least, "elastic_max": most}
    return Spec(
        command=("x",), gpus=gpus, any_of=(GPU,), train_model=MODEL, tensor_parallel=wish.tp, checkpoint_every_steps=5,
        environment=(("MESH", mesh_of(wish, gpus)),), **sizes, **more,
    )  # fmt: skip


def job_of(spec, *splits):
    """A job that waits after attempts 1, 2, ... with these splits."""
    attempts = [Attempt(epoch, (), NOW, split=split) for epoch, split in enumerate(splits, 1)]
    last, past = (attempts[-1], tuple(attempts[:-1])) if attempts else (None, ())
    return Job("queues/q/jobs/j", spec, JobState.QUEUED, NOW, attempt=last, past_attempts=past)


def split(tensor=1, pipeline=1, context=1, data=1):
    return AttemptSplit(tensor, pipeline, context, data, 1, f"tp {tensor}, pp {pipeline}, dp {data}", "{}")


def saved(resharding, epoch=1, ranks=4):
    return Saved("queues/q/jobs/j/checkpoints/s5", epoch, ranks, resharding)


def plans(spec, allowed, wish=WISH):
    return planned_sizes.plans_of(spec, wish, allowed, lambda model: OFFER if model == GPU else None)


class TestAllowance:
    def test_any_split_where_the_checkpoint_says_so_or_nothing_was_saved(self):
        job = job_of(spec_of(), split(2, data=2))
        for known in (saved("ANY_SPLIT"), Saved()):
            assert planned_sizes.allowance(job, WISH, known).keep is None

    @pytest.mark.parametrize("known", [saved("SAME_SPLIT"), saved("UNSPECIFIED"), saved("NEWER"), None])
    def test_the_split_stays_where_it_has_to_or_nobody_knows(self, known):
        allowed = planned_sizes.allowance(job_of(spec_of(), split(2, data=2)), WISH, known)
        assert (allowed.keep[:3], allowed.ranks) == ((2, 1, 1), 0)
        assert "tensor 2 parallelism stays" in allowed.why

    def test_it_is_the_split_of_the_attempt_that_wrote_it(self):
        job = job_of(spec_of(), split(2, data=2), split(1, 3), split(2, data=2))
        assert planned_sizes.allowance(job, WISH, saved("SAME_SPLIT", epoch=2)).keep[:3] == (1, 3, 1)

    def test_as_many_ranks_as_wrote_it(self):
        allowed = planned_sizes.allowance(job_of(spec_of(), split(2, data=2)), WISH, saved("SAME_RANKS"))
        assert (allowed.keep[:3], allowed.ranks) == ((2, 1, 1), 4)
        assert "only 4 ranks can read its checkpoint s5" in allowed.why

    def test_a_split_that_the_file_settles_stays_whatever_the_checkpoint_allows(self):
        settled = replace(WISH, whole=False)
        for known in (saved("ANY_SPLIT"), Saved()):
            allowed = planned_sizes.allowance(job_of(spec_of(settled)), settled, known)
            assert (allowed.keep[:3], "the job's file settles its split" in allowed.why) == ((2, 1, 1), True)


class TestSizes:
    def test_each_size_has_a_plan_of_as_many_ranks_that_keeps_the_batch(self):
        found = plans(spec_of(), Allowance(None, ""))
        assert [one.gpus for one in found] == [2, 3, 4]
        for one in found:
            mesh = json.loads(one.split.mesh)
            assert math.prod(mesh["mesh"].values()) == one.gpus
            assert mesh["mesh"]["pp"] == mesh["mesh"]["cp"] == 1, "nobody knows whether the program has them"
            assert one.split.data * mesh["micro_batch"] * mesh["micro_batches"] == WISH.batch
        assert found[1].split.tensor != 2, "3 ranks hold no whole models of 2"

    def test_as_it_was_submitted_it_has_its_first_plan(self):
        spec = spec_of()
        assert plans(spec, Allowance(None, ""))[-1].split == planned_sizes.submitted(spec, WISH)

    @pytest.mark.parametrize("known", [saved("SAME_SPLIT"), None])
    def test_only_sizes_of_whole_models_where_the_split_stays(self, known):
        spec = spec_of()
        allowed = planned_sizes.allowance(job_of(spec, planned_sizes.submitted(spec, WISH)), WISH, known)
        found = plans(spec, allowed)
        assert [(one.gpus, one.split.kept[:3]) for one in found] == [(2, (2, 1, 1)), (4, (2, 1, 1))]

    def test_as_many_ranks_have_the_very_plan_that_wrote_it(self):
        wrote = split(1, data=3)
        allowed = planned_sizes.allowance(job_of(spec_of(), wrote), WISH, saved("SAME_RANKS", ranks=3))
        assert [(one.gpus, one.split) for one in plans(spec_of(), allowed)] == [(3, wrote)]

    def test_a_wide_range_has_a_bounded_number_of_them_with_its_ends(self):
        spec = spec_of(least=2, most=200)
        found = [one.gpus for one in plans(spec, Allowance(None, ""))]
        assert len(found) <= planned_sizes.MOST_PLANS
        assert found[0] == 2

    def test_a_type_of_which_nobody_knows_the_speed_is_left_out(self):
        spec = replace(spec_of(), any_of=("K900",))
        assert plans(spec, Allowance(None, "")) == ()
        sized = planned_sizes.with_plans(spec, (), "", 4)
        assert list(elastic.sizes(sized)) == [4], "it keeps the size that it was planned for"

    def test_it_runs_on_the_types_alone_that_it_has_plans_for_and_says_so(self):
        """Elsewhere its ranks would read the mesh of another number of them."""
        types = (GPU, "H200", "A100-80GB")
        small = "L4"  # which it does not fit on
        wish = replace(WISH, model=json.dumps(json.loads(MODEL) | {"layers": 26, "hidden": 4096, "heads": 32}))
        spec = replace(spec_of(wish), any_of=(*types, small, "K900"))
        known = {model: Offer(CATALOGUE.types[model], 4) for model in (*types, small)}
        found = planned_sizes.plans_of(spec, wish, Allowance(None, ""), known.get)
        sized = planned_sizes.with_plans(spec, found, "", 4)
        assert sized.any_of == types
        assert all(sized.plan_of(gpus, model) for gpus in sized.only_sizes for model in types)
        assert "it can go on with H100-80GB, H200, A100-80GB alone: on L4, K900 it has no plan" in [
            *planned_sizes.why_sizes(sized)
        ]

    @given(
        st.sets(st.integers(1, 40), min_size=1, max_size=8).map(sorted).map(tuple), st.integers(0, 50)
    )  # sizes; GPUs
    def test_sizes_between_which_there_are_none(self, only, gpus):
        sized = replace(planned_sizes.with_plans(SPEC, (), "", 4), only_sizes=only)
        floor, above = elastic.floor(sized, gpus), elastic.above(sized, gpus)
        assert floor == max((one for one in only if one <= gpus), default=0)
        assert above == min((one for one in only if one > gpus), default=0)
        assert elastic.below(sized, gpus) == max((one for one in only if one < gpus), default=only[0])
        assert elastic.at_least(sized).gpus == elastic.least(sized) == only[0]
        assert elastic.most(elastic.at_least(sized)) == elastic.most(sized) == only[-1]
        assert all(one % elastic.step(sized) == 0 for one in only)


SPEC = spec_of()


class TestFile:
    def test_a_step_that_holds_no_whole_model_is_refused_unless_it_is_planned_anew(self):
        assert violations(SPEC) == ()
        assert [one.field for one in violations(replace(SPEC, environment=()))] == ["elastic.step"]

    @pytest.mark.parametrize("mesh", ["", "{", "[]", '{"replan": 1}', '{"replan": {"model": "x"}}', "x" * 100_000])
    def test_a_mesh_of_somebody_else_is_not_planned_anew(self, mesh):
        assert wish_in([("MESH", mesh)]) is None
        assert wish_in([]) is None

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            *(("batch", one) for one in ("1e999", "1e30", "1" + "0" * 30, "NaN", "true", "0", '"96"', "null")),
            *((one, "1" + "0" * 30) for one in ("sequence", "tp", "pp", "cp", "vp", "first_layers", "last_layers")),
            *((one, "-1") for one in ("sequence", "tp", "vp", "first_layers", "last_layers")),
            ("model", "7"), ("gpu", "null"), ("fp8", "2"), ("whole", '"no"'),
        ],
    )  # fmt: skip
    def test_numbers_that_no_plan_has_are_no_wish(self, name, said):
        """Whoever submits a job may write its mesh, and what stands there is computed with by the leader."""
        mesh = json.loads(mesh_of())
        mesh[KEY] |= {name: "HERE"}
        assert wish_in([("MESH", json.dumps(mesh).replace('"HERE"', said))]) is None

    @pytest.mark.parametrize(
        "other",
        [{"mesh": [2, 2]}, {"mesh": None}, {"mesh": {"dp_shard": "2"}}, {"mesh": {"dp_shard": 0}}, {"micro_batch": {}}],
    )
    def test_nor_is_one_beside_a_mesh_that_cannot_be_read(self, other):
        assert wish_in([("MESH", json.dumps(json.loads(mesh_of()) | other))]) is None


class Trains(World):
    """Nodes of two GPUs each, and a planned job on all four."""

    async def begin(self, *, sizes=(2, 2), **more):
        self.made = await self.add(*(node(f"s/n{at}", gpus) for at, gpus in enumerate(sizes)))
        spec = {"elastic": pb.Elastic(min=2, max=4), "checkpoint": pb.CheckpointPolicy(every_steps=5)} | more
        spec["gpu"] = pb.GpuRequirement(any_of=[GPU])
        spec["training"] = pb.Training(model=MODEL, batch=96, sequence=2048)
        spec["parallelism"] = pb.Parallelism(tensor=2)
        name = await self.submit(4, job_id="j", environment={"MESH": mesh_of()}, **spec)
        await self.reaches(name, "RUNNING")
        return name

    def saved(self, resharding, epoch=1, ranks=4):
        self.checkpoint.newest = "queues/default/jobs/j/checkpoints/s000000000005-e1-n000000"
        self.checkpoint.facts = {"epoch": epoch, "world_size": ranks, "resharding": f"RESHARDING_{resharding}"}

    def loses(self, which):
        self.phase(self.made[which].node, health_pb2.NODE_PHASE_UNREACHABLE, "Dead")

    async def attempt(self, name, number):
        return (await self.reaches_attempt(name, number)).attempt

    async def reaches_attempt(self, name, number):
        async def there():
            job = await self.job(name)
            return job if job.state == pb.JOB_STATE_RUNNING and job.attempt.number >= number else None

        return await until(there, f"attempt {number} runs", 1800.0)


def told_mesh(world, job):
    """What the ranks of the job's attempt find in MESH."""
    [said] = {
        task.spec.environment["MESH"]
        for agent in world.made
        for task in agent.tasks.values()
        if task.job == job.name and task.epoch == job.epoch
    }
    return json.loads(said)


@pytest.mark.parametrize("left", [2, 3])
async def test_a_job_that_lost_a_node_goes_on_in_another_split_on_what_is_left(left):
    async with Trains() as world:
        name = await world.begin(sizes=(left, 4 - left))
        first = await world.attempt(name, 1)
        assert (first.split.tensor, first.split.data, first.split.why) == (2, 2, "")
        world.saved("ANY_SPLIT")
        world.loses(1)
        job = await world.reaches_attempt(name, 2)
        split = job.attempt.split
        assert len(job.attempt.tasks[0].gpu_uuids) == left
        assert split.tensor * split.pipeline * split.context * split.data == left
        assert split.why.startswith(f"planned anew for {left} GPUs instead of 4: {split.words}; before: tp 2, dp 2")
        assert "any split can read its checkpoint s000000000005" in split.why
        assert split.why in job.decision.reasons
        others = job_privacy.without_data(job.decision).reasons
        assert others and not any("planned anew" in text or "checkpoint" in text for text in others)
        mesh = told_mesh(world, job)
        assert math.prod(mesh["mesh"].values()) == left
        assert (mesh["mesh"]["tp"], KEY in mesh) == (split.tensor, False)
        assert job.spec.environment["MESH"] == mesh_of(), "what was asked for stays"


async def test_where_only_the_same_split_can_read_it_a_gpu_that_holds_no_whole_model_is_left():
    async with Trains() as world:
        name = await world.begin(sizes=(3, 1))
        world.saved("SAME_SPLIT")
        world.loses(1)
        attempt = (await world.reaches_attempt(name, 2)).attempt
        assert (len(attempt.tasks[0].gpu_uuids), attempt.split.tensor, attempt.split.data) == (2, 2, 1)
        assert "is of the stages of a pipeline, so tensor 2 parallelism stays" in attempt.split.why


async def test_where_only_as_many_ranks_can_read_it_it_waits_for_them_and_says_why():
    async with Trains() as world:
        name = await world.begin(sizes=(3, 1))
        world.saved("SAME_RANKS")
        world.loses(1)
        job = await world.reaches(name, "QUEUED")
        why = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=name), None)
        said = " ".join(why.decision.reasons)
        assert "it can go on with 4 GPUs: only 4 ranks can read its checkpoint s000000000005-e1-n000000" in said
        world.phase(world.made[1].node, health_pb2.NODE_PHASE_READY)
        await world.add(node("s/more", 1))
        job = await world.reaches_attempt(name, 2)
        assert (job.attempt.split.tensor, job.attempt.split.data, job.attempt.split.why) == (2, 2, "")


async def test_a_checkpoint_service_that_does_not_answer_keeps_the_split_until_it_does():
    async with Trains() as world:
        name = await world.begin(sizes=(3, 1))
        world.saved("ANY_SPLIT")
        world.checkpoint.down = Unavailable("away")
        world.loses(1)
        attempt = (await world.reaches_attempt(name, 2)).attempt
        assert (len(attempt.tasks[0].gpu_uuids), attempt.split.tensor) == (2, 2)
        assert "it is not known who can read what it saved" in attempt.split.why


async def test_who_is_told_that_nobody_answered_may_ask_again_at_once():
    """The asking that ends is not in the way of the next. The plans are known already, so that they tell nobody."""
    before = job_of(spec_of(), split(2, data=2))
    jobs = {one.name: one for one in (before, replace(before, name="queues/q/jobs/k"))}
    asked = []

    class Away:
        async def FindRestorable(self, request, timeout):
            asked.append(request.job)
            if asked.count(request.job) < 3:
                raise Unavailable("away")
            raise NotFound("checkpoint", request.job)

    replanning = Replanning(Away(), LoopClock(), lambda name: replanning.ready(jobs[name]))
    for job in jobs.values():
        async with asyncio.TaskGroup() as tasks:
            replanning.runs_in(tasks)
            assert not replanning.ready(job)
    assert asked.count("queues/q/jobs/k") == 3


async def test_a_bug_in_a_plan_keeps_the_first_plan_and_ends_nobody():
    class Broken(dict):
        def get(self, key, default=None):
            raise ZeroDivisionError(key)

    told, job = [], job_of(spec_of())
    replanning = Replanning(None, LoopClock(), told.append, Broken(bf16={}))
    async with asyncio.TaskGroup() as tasks:
        replanning.runs_in(tasks)
        assert not replanning.ready(job)
    assert told == [job.name]
    assert replanning.ready(job)
    assert list(elastic.sizes(replanning.seen(job).spec)) == [4]


@pytest.mark.parametrize("resumes", [True, False])
async def test_a_program_that_may_keep_its_own_checkpoints_keeps_its_split(resumes):
    """It says so, or it ran and reported no step, so that it does without the SDK's."""
    async with Trains() as world:
        kept = None if resumes else pb.CheckpointPolicy(every_steps=5)
        name = await world.begin(sizes=(3, 1), elastic=pb.Elastic(min=2, max=4, resumes=resumes), checkpoint=kept)
        world.loses(1)
        assert (await world.reaches_attempt(name, 2)).attempt.split.tensor == 2


async def test_a_program_of_the_sdk_that_saved_nothing_yet_begins_in_any_split():
    async with Trains() as world:
        name = await world.begin(sizes=(3, 1))
        world.made[0].step(name, 1, 3, 0.5)
        await world.caught_up()
        world.loses(1)
        split = (await world.reaches_attempt(name, 2)).attempt.split
        assert split.data * split.tensor == 3
        assert "nothing was saved yet" in split.why


async def test_a_new_leader_knows_the_split_of_the_attempt_that_runs():
    async with Trains() as world:
        name = await world.begin(sizes=(3, 1))
        world.saved("ANY_SPLIT")
        world.loses(1)
        before = (await world.reaches_attempt(name, 2)).attempt
        await world.restart()
        assert (await world.job(name)).attempt.split == before.split


async def test_it_grows_back_into_its_first_plan():
    async with Trains() as world:
        name = await world.begin(sizes=(2, 2), expected={"seconds": 360_000})
        world.saved("ANY_SPLIT")
        world.loses(1)
        await world.reaches_attempt(name, 2)
        kept = checkpoint_pb2.Checkpoint(
            name=world.checkpoint.newest, state="CHECKPOINT_STATE_COMMITTED", **world.checkpoint.facts
        )
        kept.commit_time.FromDatetime(world.clock.now())
        world.checkpoint.kept = [kept]
        await world.add(node("s/more", 2))
        job = await world.reaches_attempt(name, 3)
        assert (job.attempt.split.tensor, job.attempt.split.data) == (2, 2)
        assert plain_mesh(mesh_of()) == told_mesh(world, job)


async def test_what_would_be_said_of_its_least_size_needs_no_whole_models():
    async with Trains() as world:
        await world.add(node("s/a"))
        spec = {"elastic": pb.Elastic(min=3, max=4), "checkpoint": pb.CheckpointPolicy(every_steps=5)}
        spec |= {"gpu": pb.GpuRequirement(any_of=[GPU]), "training": pb.Training(model=MODEL, batch=96, sequence=2048)}
        made = await world.create(
            4, dry=True, environment={"MESH": mesh_of()}, parallelism=pb.Parallelism(tensor=2), **spec
        )
        assert made.decision.placed
