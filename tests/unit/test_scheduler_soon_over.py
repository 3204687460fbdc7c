"""Who is about to end is not stopped for a higher priority, where that costs more than the wait that it saves; and nobody waits for long in this way."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from google.protobuf.duration_pb2 import Duration

from tests.support.scheduler_world import World, node
from whaleflux import names
from whaleflux.manifests.job_fields import Spec
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.estimates import Estimates
from whaleflux_scheduler.core.model import Attempt, Job, JobState, Queue
from whaleflux_scheduler.core.soon_over import MOST_S, SoonOver
from whaleflux_scheduler.settings import Settings
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

NOW = datetime(2026, 5, 1, tzinfo=UTC)
LIMITED, FULL = {"max_gpus": 8}, {}  # idle nodes under a full limit, or a full fleet


def submission(name, at_s, gpus, run_s, priority=0, **spec):
    return Submission(names.job("team", name), Spec(command=("x",), gpus=gpus, priority=priority, **spec), at_s, run_s)


def simulated(jobs, limits):
    """Outcomes by job id, on eight GPUs that the queue may have; a suspended job saves its work."""
    fleet = [node(f"s/{at}") for at in range(4 if limits else 2)]
    delays = Delays(start_s=1.0, save_s=1.0, restart_s=0.0)
    queues = {"team": Queue(names.queue("team"), **limits)}
    result = Simulation(fleet, Workload(sorted(jobs, key=lambda job: job.at_s), queues, delays)).run(86_400.0)
    return {names.last(one.name): one for one in result.outcomes}


def suspensions(seen):
    return {id_: one.suspensions for id_, one in seen.items() if one.suspensions}


@pytest.mark.parametrize("limits", [LIMITED, FULL])
class TestWhoIsStopped:
    def test_nobody_who_says_that_it_ends_in_seconds(self, limits):
        jobs = [submission("low", 0, 8, 1010, expected_s=1010), submission("urgent", 1000, 8, 100, priority=5)]
        seen = simulated(jobs, limits)
        assert suspensions(seen) == {}
        assert 10 <= seen["urgent"].wait_s < 15

    def test_nobody_whose_like_ended_in_seconds(self, limits):
        jobs = [submission(f"low-{at}", 30 * at, 8, 20) for at in range(4)]
        seen = simulated([*jobs, submission("urgent", 100, 8, 100, priority=5)], limits)
        assert suspensions(seen) == {}
        assert 10 <= seen["urgent"].wait_s < 15

    def test_at_once_who_ends_later(self, limits):
        jobs = [submission("low", 0, 8, 1100, expected_s=1100), submission("urgent", 1000, 8, 100, priority=5)]
        seen = simulated(jobs, limits)
        assert suspensions(seen) == {"low": 1}
        assert seen["urgent"].wait_s < 5

    def test_at_once_for_a_worker_that_tasks_wait_for_but_who_ends_in_a_moment(self, limits):
        worker = replace(submission("worker", 1000, 8, 100, priority=5), is_ray_worker=True)
        seen = simulated([submission("low", 0, 8, 1010, expected_s=1010), worker], limits)
        assert suspensions(seen) == {"low": 1}
        assert seen["worker"].wait_s < 5
        seen = simulated([submission("low", 0, 8, 1000.5, expected_s=1000.5), worker], limits)
        assert suspensions(seen) == {}

    def test_at_once_of_whom_nobody_knows(self, limits):
        seen = simulated([submission("low", 0, 8, 1010), submission("urgent", 1000, 8, 100, priority=5)], limits)
        assert suspensions(seen) == {"low": 1}
        assert seen["urgent"].wait_s < 5

    def test_who_runs_for_longer_than_it_said_when_that_is_seen(self, limits):
        jobs = [submission("low", 0, 8, 9000, expected_s=1010), submission("urgent", 1000, 8, 100, priority=5)]
        seen = simulated(jobs, limits)
        assert suspensions(seen) == {"low": 1}
        assert 10 <= seen["urgent"].wait_s < 20

    @pytest.mark.parametrize(("saves", "stopped"), [({}, {}), ({"checkpoint_location": "team/low"}, {"low": 1})])
    def test_a_stop_is_weighed_in_gpu_seconds_against_the_wait(self, saves, stopped, limits):
        """Seven GPUs idle while eight wait for one: 8 x 50 GPU-s are more than a restart, and less than the work that a job without checkpoints loses."""
        jobs = [submission("low", 0, 1, 1050, expected_s=1050, **saves), submission("urgent", 1000, 8, 100, priority=5)]
        assert suspensions(simulated(jobs, limits)) == stopped


def test_after_a_minute_others_are_stopped_who_always_end_in_a_moment_and_are_followed_by_more():
    """Small ones take what comes free before there is enough for the large one: that is how priority would be defeated."""
    jobs = [submission(f"small-{at}", 2 * at, 1, 20, expected_s=20) for at in range(300)]
    seen = simulated([*jobs, submission("urgent", 200, 8, 100, priority=5)], LIMITED)
    assert suspensions(seen)
    assert MOST_S - 20 <= seen["urgent"].wait_s < MOST_S + 5


@pytest.mark.parametrize("at", range(1, 8))
def test_a_look_is_due_when_a_clock_of_microseconds_shows_it(at):
    """One that is not quite reached then would be looked at for ever."""
    waits, low = soon_over_of(expected_s=20 + at / 7)
    assert waits.lets_end(low, (low.name,), NOW + timedelta(seconds=at / 3))
    look = datetime.fromtimestamp(waits.next_look, UTC)
    assert waits.due(look - timedelta(microseconds=1)) == []
    assert waits.due(look) == [low.name]
    assert waits.of(low.name, look) is None


def soon_over_of(**spec):
    """With one running job."""
    low = Job(names.job("team", "low"), Spec(command=("x",), gpus=0, **spec), JobState.RUNNING, NOW, uid="low")
    low = replace(low, attempt=Attempt(1, (), NOW, run_time=NOW))
    holdings = SimpleNamespace(jobs={low.name: low}, saved={}, held=lambda name: {"n": frozenset({"g"})})
    return SoonOver(holdings, Estimates()), low


def ended(name, run_s, **spec):
    job = Job(names.job("team", name), Spec(command=("x",), gpus=1, **spec), JobState.SUCCEEDED, NOW, uid=name)
    return replace(job, run_s=run_s, end_time=NOW + timedelta(seconds=run_s))


class TestWhatIsLeft:
    def test_it_is_the_median_of_those_like_it_that_were_longer(self):
        known = Estimates()
        for at, run_s in enumerate((10.0, 20.0, 30.0, 40.0)):
            known.learn(ended(f"low-{at}", run_s))
        job = ended("low-9", 0.0)
        assert known.left_s(job, 0.0) == 20.0
        assert known.left_s(job, 25.0) == 5.0
        assert known.left_s(job, 40.5) == 0.0
        assert known.left_s(job, 41.0) is None

    def test_what_a_job_says_goes_first_and_its_limit_holds(self):
        said, limited = ended("a", 0.0, expected_s=100.0), ended("a", 0.0, expected_s=100.0, time_limit_s=30.0)
        assert [Estimates().left_s(said, ran_s) for ran_s in (90.0, 100.0, 101.0)] == [10.0, 0.0, None]
        assert (Estimates().left_s(limited, 10.0), Estimates().left_s(limited, 31.0)) == (20.0, 0.0)

    def test_of_one_of_whom_nothing_is_known_nothing_is(self):
        assert Estimates().left_s(ended("a", 0.0), 0.0) is None


@pytest.mark.parametrize(
    ("let_end_s", "waits"), [(Settings.model_fields["preemption_let_end_s"].default, True), (0.0, False)]
)
async def test_explain_says_who_would_be_stopped_when_and_a_setting_turns_it_off(let_end_s, waits):
    async with World(let_end_s=let_end_s) as world:
        await world.add(node("a/n1"))
        low = await world.submit(4, expected=Duration(seconds=50))
        await world.reaches(low, "RUNNING")
        dry = await world.create(4, priority=5, dry=True)
        high = await world.submit(4, priority=5)
        said = (await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=high), None)).decision
        for decision in (dry.decision, said):
            assert waits == any(f"would stop {low} in " in why for why in decision.reasons)
            assert waits != (list(decision.preempts) == [low])
