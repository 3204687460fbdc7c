"""GPU types of which several count as one: from a job file to the ranks on the GPUs that are given."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scheduler_world import node, plan_with_queues
from whaleflux.cli.job_commands import gpus_now, shown_gpus
from whaleflux.errors import InvalidArgument
from whaleflux.manifests import job_checks, reference
from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.manifests.job_fields import Rule, Spec
from whaleflux.manifests.job_spec import spec_of
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import accounting, cost, lifecycle
from whaleflux_scheduler.core.model import Job, JobState, Queue, TaskPhase
from whaleflux_scheduler.core.observed import Observations, Report, Timeouts
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.plan import News

BASE = Path("/base")
NOW = datetime(2026, 5, 1, tzinfo=UTC)
H200, TWO_A100 = GpuChoice("H200"), GpuChoice("A100-80GB", 2, 0.9)


def of_file(gpu):
    return spec_of(job_from_yaml(f"run: x\ngpus: 8\ngpu: {gpu}\n", BASE).spec)


class TestFile:
    @pytest.mark.parametrize(
        ("gpu", "choices"),
        [
            ("H200", [GpuChoice("H200")]),
            ("[H200, 2 x A100-80GB]", [GpuChoice("H200"), GpuChoice("A100-80GB", 2)]),
            ("{any: [H200, 2x A100-80GB]}", [GpuChoice("H200"), GpuChoice("A100-80GB", 2)]),
            ("[H200, {type: A100-80GB, each: 2, speed: 0.9}]", [GpuChoice("H200"), TWO_A100]),
            ("{any: [{type: H200, speed: 1.3}, H100-80GB]}", [GpuChoice("H200", 1, 1.3), GpuChoice("H100-80GB")]),
        ],
    )
    def test_forms(self, gpu, choices):
        assert list(of_file(gpu).gpu_choices) == choices
        jsonschema.validate(yaml.safe_load(f"run: x\ngpus: 8\ngpu: {gpu}\n"), reference.json_schema("job"))

    def test_names_alone_are_read_as_ever(self):
        assert of_file("[H200, 2 x A100-80GB]").any_of == ("H200", "A100-80GB")
        assert not of_file("[H200, A100-80GB]").gpu_options

    @pytest.mark.parametrize(
        ("gpu", "field", "fix"),
        [
            ("2 x A100-80GB", "gpu.any[0]", "name it without a number, or put another type first"),
            ("[H200, 0 x A100-80GB]", "gpu.any", "use 1 to 64"),
            ("[H200, {type: A100-80GB, each: 65}]", "gpu.any", "A100-80GB: so many GPUs count as one; use 1 to 64"),
            ("[H200, {type: A100-80GB, each: true}]", "gpu.any", "use 1 to 64"),
            ("[H200, {type: A100-80GB, speed: 0}]", "gpu.any", "use 0.01 to 100"),
            ("[H200, {type: A100-80GB, speed: .nan}]", "gpu.any", "use 0.01 to 100"),
            ("[H200, {each: 2}]", "gpu.any", "2 x A100-80GB"),
            ("[H200, {type: 2 x A100-80GB, each: 2}]", "gpu.any", "says how many twice"),
            ("[H200, {type: A100-80GB, count: 2}]", "gpu.any", "'count' is not known"),
            ("[H200, 2 x H200]", "gpu.any", "name it once"),
            ("{any: [H200, 2 x A100-80GB], share: 10 GB}", "gpu.any", "gpu.share"),
            ("{any: [H200, {type: A100-80GB, speed: 0.5}], mig: 1g.18gb}", "gpu.any", "gpu.mig"),
        ],
    )
    def test_bad_input_names_the_field_and_a_fix(self, gpu, field, fix):
        with pytest.raises(InvalidArgument) as refused:
            of_file(gpu)
        assert refused.value.violations[0].field == field
        assert fix in refused.value.violations[0].description

    @pytest.mark.parametrize(
        "options",
        [
            (GpuChoice("B200", 2),),
            (TWO_A100, TWO_A100),
            (replace(TWO_A100, per_unit=65),),
            (replace(TWO_A100, per_unit=-1),),
            (replace(TWO_A100, throughput=float("nan")),),
            (replace(TWO_A100, throughput=1000.0),),
        ],
    )
    def test_what_a_message_may_say_is_bounded(self, options):
        spec = Spec(command=("x",), gpus=8, any_of=("H200", "A100-80GB"), gpu_options=options)
        assert all(v.field.startswith("gpu.options") for v in job_checks.violations(spec))
        assert list(job_checks.violations(spec))

    def test_no_more_ranks_than_a_job_may_have(self):
        spec = Spec(command=("x",), gpus=60_000, any_of=("H200", "A100-80GB"), gpu_options=(TWO_A100,))
        assert [v.field for v in job_checks.violations(spec)] == ["gpu.any_of[1]"]


def mixed(name="j", gpus=8, choices=(H200, TWO_A100), **spec):
    """A waiting job."""
    asked = Spec(
        command=("x",),
        gpus=gpus,
        any_of=tuple(choice.model for choice in choices),
        gpu_options=tuple(choice for choice in choices if not choice.plain),
        **spec,
    )
    return Job(f"queues/q/jobs/{name}", asked, JobState.QUEUED, NOW)


def planner(*nodes, queues=("q",)):
    made = plan_with_queues(*queues)
    made.apply(News(nodes=nodes, closed={n.name: "" for n in nodes}))
    return made


def choose(made, *jobs):
    """The moves for jobs that come, by id."""
    made.apply(News(jobs=jobs, candidates={job.name: Candidate(job) for job in jobs}))
    moves = made.decide(NOW)
    made.check()
    return {move.job.rpartition("/")[2]: move for move in moves}


def placed(job, move):
    assert move.assignment is not None, move.decision.summary
    return lifecycle.place(job, move.assignment, move.decision, NOW)


class TestPlacing:
    def test_the_first_type_is_taken_one_for_one_where_it_is_free(self):
        job = mixed()
        attempt = placed(job, choose(planner(node("s/h", 8, model="H200"), *a100(4)), job)["j"]).attempt
        assert (attempt.ranks, attempt.gpus_by_model) == (8, (("H200", 8),))

    def test_else_two_of_the_other_count_as_one_and_each_has_a_rank_and_its_price(self):
        job = mixed()
        started = placed(job, choose(planner(node("s/h", 4, model="H200"), *a100(4, usd=1.5)), job)["j"])
        attempt = started.attempt
        assert (attempt.ranks, attempt.gpus, attempt.gpus_by_model) == (16, 16, (("A100-80GB", 16),))
        assert [task.first_rank for task in attempt.tasks] == [0, 4, 8, 12]
        assert attempt.usd_per_hour == 16 * 1.5
        hour = cost.attempt_gpu_s(attempt, NOW.replace(hour=1))
        assert hour == 16 * 3600
        assert started.decision.summary.startswith("16 x A100-80GB on 4 nodes")

    def test_sizes_of_groups_count_ranks(self):
        job = mixed(gpus=4, placement=(Rule("tensor", 6, 4),))
        attempt = placed(job, choose(planner(*a100(3)), job)["j"]).attempt
        assert [len(task.gpus) for task in attempt.tasks] == [4, 4]

    def test_who_waits_is_told_of_the_type_that_lacks_least(self):
        job = mixed()
        summary = choose(planner(node("s/h", 2, model="H200"), *a100(3)), job)["j"].decision.summary
        assert "12 of 16 A100-80GB free" in summary
        assert "of 8 " not in summary

    def test_what_no_fleet_of_it_could_hold_is_said_by_its_numbers(self):
        made = planner(node("s/h", 2, model="H200"), *a100(3))
        assert "16 GPUs are asked for, and all registered nodes together" in made.shortage("q", mixed().spec)
        assert not made.shortage("q", mixed(gpus=6).spec)

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"any_of": ("B300",)}, "gpu: no registered node has B300 GPUs; there are: A100-80GB, H200"),
            (
                {"mig_profile": "3g.71gb"},
                "gpu.mig: no registered node has instances 3g.71gb; there are: A100-80GB, H200",
            ),
            ({"any_of": ("B300", "H200"), "gpus": 3}, "3 GPUs are asked for"),
        ],
    )
    def test_a_type_that_nobody_has_is_named_with_those_that_there_are(self, asked, said):
        made = planner(node("s/h", 2, model="H200"), *a100(1))
        spec = Spec(command=("x",), **{"gpus": 1, **asked})
        assert made.shortage("q", spec).startswith(said)


def a100(count, **how):
    return [node(f"s/a{at}", 4, model="A100-80GB", leaf="l1", **how) for at in range(count)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["H200", "A100-80GB", "L40S"]), st.integers(1, 8)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=5),
)
def test_every_rank_has_a_gpu_of_one_type_of_its_own(fleet, asked):
    made = planner(*(node(f"s/n{at}", gpus, model=model) for at, (model, gpus) in enumerate(fleet)))
    model_of = {f"GPU-s/n{at}-{i}": model for at, (model, gpus) in enumerate(fleet) for i in range(gpus)}
    taken = []
    for at, (gpus, second, third) in enumerate(asked):
        choices = (GpuChoice("H200"), GpuChoice("A100-80GB", second), GpuChoice("L40S", third, 0.5))
        job = mixed(f"j{at}", gpus, choices)
        move = choose(made, job)[f"j{at}"]
        tasks = () if move.assignment is None else placed(job, move).attempt.tasks
        mine = [uuid for task in tasks for uuid in task.gpus]
        sizes = {"H200": gpus, "A100-80GB": gpus * second, "L40S": gpus * third}
        assert all(len(mine) == sizes[model] for model in {model_of[uuid] for uuid in mine})
        assert len({model_of[uuid] for uuid in mine}) == bool(mine)
        assert [task.first_rank for task in tasks] == [sum(len(t.gpus) for t in tasks[:n]) for n in range(len(tasks))]
        taken += mine
    assert len(set(taken)) == len(taken)


class TestQueues:
    """A queue's limit counts the GPUs that are given."""

    def limited(self, most, *nodes, **more):
        made = planner(*nodes)
        made.apply(News(queues={"q": Queue("queues/q", max_gpus=most), **more}))
        return made

    def test_more_than_the_queue_may_take_is_not_given_and_the_reason_says_so(self):
        made = self.limited(12, node("s/h", 4, model="H200"), *a100(4))
        job = mixed()
        move = choose(made, job)["j"]
        assert move.assignment is None
        assert move.decision.reasons[-1] == "16 x A100-80GB would be more than queue q may take now"
        assert "4 of 8 GPUs free" in move.decision.summary
        assert set(move.decision.reasons) <= set(made.dry_run(mixed("other"), NOW).reasons)
        assert set(move.decision.reasons) <= set(made.explain(job, (), NOW).reasons)
        assert made.shortage("q", job.spec).startswith("8 GPUs are asked for"), (
            "no queue's limit lets it have the others"
        )

    def test_it_starts_when_gpus_of_the_first_type_come_free(self):
        made = self.limited(12, node("s/h", 8, model="H200"), *a100(4))
        first, second = mixed("first", 4, (H200,)), mixed("second")
        running = placed(first, choose(made, first)["first"])
        made.apply(News(jobs=(running,)))
        assert choose(made, second)["second"].assignment is None
        made.apply(News(jobs=(ended(running),)))
        (move,) = made.decide(NOW)
        assert placed(second, move).attempt.gpus_by_model == (("H200", 8),)
        made.check()

    def test_and_when_its_queue_may_take_more(self):
        made = self.limited(12, node("s/h", 4, model="H200"), *a100(4))
        job = mixed()
        assert choose(made, job)["j"].assignment is None
        made.apply(News(queues={"q": Queue("queues/q", max_gpus=16)}))
        (move,) = made.decide(NOW)
        assert placed(job, move).attempt.ranks == 16

    def test_one_queue_s_limit_is_no_answer_for_another(self):
        made = self.limited(12, *a100(4), other=Queue("queues/other"))
        kept, other = mixed("kept"), replace(mixed("other"), name="queues/other/jobs/other")
        moves = choose(made, kept, other)
        assert (moves["kept"].assignment, placed(other, moves["other"]).attempt.ranks) == (None, 16)

    def test_others_make_room_also_where_two_count_as_one(self):
        made = planner(*a100(4))
        low = mixed("low", 16, (GpuChoice("A100-80GB"),))
        running = placed(low, choose(made, low)["low"])
        running = replace(running, state=JobState.RUNNING, attempt=replace(running.attempt, run_time=NOW, started=True))
        made.apply(News(jobs=(running,)))
        urgent = mixed("urgent", priority=9)
        move = choose(made, urgent)["urgent"]
        assert move.claim is not None and move.claim.victims == (low.name,)
        assert sum(len(uuids) for _, uuids in move.claim.nodes) == 16


def ended(job):
    said = tuple(Report(task.id, TaskPhase.EXITED) for task in job.attempt.tasks)
    return lifecycle.advance(job, Observations(said), NOW, Timeouts())


class TestRecords:
    def test_only_a_whole_attempt_counts_as_done(self):
        """Of a large past attempt some tasks are kept; of twice as many ranks half are no whole attempt."""
        job = mixed()
        started = placed(job, choose(planner(*a100(4)), job)["j"])
        assert accounting.is_whole(started, started.attempt)
        half = replace(started.attempt, tasks=started.attempt.tasks[:2])
        assert half.ranks == job.spec.world_size and not accounting.is_whole(started, half)


def test_lists_show_the_gpus_that_a_job_was_given():
    job = pb.Job(
        spec=pb.JobSpec(
            gpus=8,
            gpu=pb.GpuRequirement(any_of=["H200", "A100-80GB"], options=[pb.GpuOption(model="A100-80GB", per_unit=2)]),
        )
    )
    assert (shown_gpus(job), gpus_now(job)) == ("8", 8)
    job.state = pb.JOB_STATE_RUNNING
    job.attempt.tasks.add(gpu_uuids=[f"GPU-{n}" for n in range(16)])
    assert (shown_gpus(job), gpus_now(job)) == ("16", 16)


def test_elastic_jobs_have_one_count():
    spec = Spec(
        command=("x",),
        gpus=8,
        any_of=("H200", "A100-80GB"),
        gpu_options=(TWO_A100,),
        elastic_min=4,
        elastic_resumes=True,
    )
    assert "gpu.any_of" in [v.field for v in job_checks.violations(spec)]
