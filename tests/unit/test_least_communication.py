"""What a gang's place costs in communication, against the best of what was free and of a fleet without work."""

from datetime import UTC, datetime, timedelta

from tests.support.scheduler_world import World, node, plan_with_queues
from whaleflux.manifests.job_fields import Goal, Spec
from whaleflux.v1 import scheduler_pb2
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import lifecycle
from whaleflux_scheduler.core.model import Job, JobState
from whaleflux_scheduler.core.pending import Candidate
from whaleflux_scheduler.core.placement import decide
from whaleflux_scheduler.core.plan import News

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def job(name, gpus, at=0, **spec):
    return Job(
        f"queues/q/jobs/{name}", Spec(command=("x",), gpus=gpus, **spec), JobState.QUEUED, NOW + timedelta(seconds=at)
    )


class Fleet:
    """A node of eight GPUs and two of four."""

    def __init__(self, *nodes):
        self.planner = plan_with_queues()
        found = nodes or (node("s/a"), node("s/b"), node("s/whole", 8))
        self.planner.apply(News(nodes=found, closed={one.name: "" for one in found}))

    def placed(self, *jobs):
        self.planner.apply(News(jobs=jobs, candidates={one.name: Candidate(one, frozenset()) for one in jobs}))
        moves = {move.job: move for move in self.planner.decide(NOW) if move.assignment}
        return [lifecycle.place(one, moves[one.name].assignment, moves[one.name].decision, NOW).attempt for one in jobs]

    def close(self, *names):
        self.planner.apply(News(closed={f"sites/s/nodes/{name}": "cordoned" for name in names}))


def test_what_others_hold_is_structural_and_not_avoidable():
    fleet = Fleet()
    fleet.close("whole")
    (attempt,) = fleet.placed(job("j", 8))
    assert len(attempt.nodes) == 2
    assert attempt.best_free_communication_s == attempt.communication_s
    assert attempt.best_communication_s < attempt.communication_s / 5


def test_who_wants_the_cheapest_could_have_been_closer():
    fleet = Fleet(node("s/a", usd=1.0), node("s/b", usd=1.0), node("s/whole", 8, usd=9.0))
    (attempt,) = fleet.placed(job("j", 8, goal=Goal.CHEAPEST))
    assert len(attempt.nodes) == 2
    assert attempt.best_free_communication_s < attempt.communication_s / 5
    assert attempt.best_communication_s == attempt.best_free_communication_s


def test_on_the_best_place_there_is_nothing_to_gain():
    (attempt,) = Fleet().placed(job("j", 12))
    assert len(attempt.nodes) > 1
    assert attempt.best_communication_s == attempt.best_free_communication_s == attempt.communication_s > 0


def test_within_a_node_there_is_nothing_to_compare_with():
    (attempt,) = Fleet().placed(job("j", 4))
    assert attempt.best_communication_s == attempt.best_free_communication_s == attempt.communication_s


def test_work_without_gpus_on_several_nodes_has_nothing_to_compare_with():
    (attempt,) = Fleet().placed(job("j", 0, ranks=2, min_nodes=2))
    assert len(attempt.nodes) == 2
    assert attempt.best_communication_s == attempt.best_free_communication_s == attempt.communication_s == 0


def test_the_fleet_without_work_is_asked_once_for_gangs_of_a_kind(monkeypatch):
    asked = []
    whole = decide.candidates

    def counted(columns, request, datasets):
        asked.append(request)
        return whole(columns, request, datasets)

    monkeypatch.setattr("whaleflux_scheduler.core.placement.least.candidates", counted)
    fleet = Fleet(*(node(f"s/{name}") for name in "abcd"))
    fleet.placed(job("a", 8), job("b", 8, at=1))
    assert len(asked) == 1


async def test_people_see_them_and_money_in_whole_micro_dollars():
    async with World() as world:
        await world.add(node("s/a"), node("s/b"))
        name = await world.submit(8)
        job = await world.reaches(name, "RUNNING")
        attempt = job.attempt
        assert attempt.best_communication_s == attempt.best_free_communication_s == attempt.communication_s > 0
        assert attempt.micros_per_hour == round(attempt.usd_per_hour * 1e6) == 16_000_000
        assert job.cost_micros == round(job.cost_usd * 1e6)


def test_of_attempts_that_an_older_scheduler_placed_they_are_not_known():
    message = scheduler_pb2.Job(name="queues/q/jobs/j", state=scheduler_pb2.JOB_STATE_RUNNING, epoch=1)
    message.attempt.epoch = 1
    assert convert.job_of(message).attempt.best_communication_s is None
