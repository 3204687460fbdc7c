"""What can happen to a plan: each rule takes the world and its own random numbers, so that an operation is (rule, number) and can be done again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from random import Random

from tests.support.plan_soak.world import NODES, QUEUES, PlanWorld
from tests.support.scheduler_world import GB
from whaleflux.errors import Aborted
from whaleflux.manifests.job_fields import JobKind, Rule, Spec
from whaleflux_scheduler.core import lifecycle, reservation_rules, verbs
from whaleflux_scheduler.core.model import Cause, Hold, JobState, Queue, TaskPhase
from whaleflux_scheduler.core.observed import AttemptFailure, EndReason
from whaleflux_scheduler.core.reservations import Reservation
from whaleflux_scheduler.simulation import happenings, running
from whaleflux_scheduler.simulation.workload import NodeEvent, Submission

MOST_JOBS = 24  # that have not ended
_ASKED_BY = Cause("", "", "asked for", "users/ada")
_RUN_S = (30.0, 200.0, 1000.0, 5000.0, 40_000.0)
Make = Callable[[Random], Spec]


def _spec(**fields: object) -> Spec:
    return Spec(command=("x",), **fields)  # type: ignore[arg-type]


KINDS: tuple[Make, ...] = (
    lambda r: _spec(gpus=r.randint(1, 8), priority=r.randint(0, 2)),
    lambda r: _spec(gpus=r.randint(1, 4), priority=r.randint(0, 2), expected_s=r.choice((300.0, 3000.0))),
    lambda r: _spec(gpus=r.choice((5, 6, 8, 12)), time_limit_s=r.choice((600.0, 6000.0))),
    lambda r: _spec(
        gpus=r.randint(1, 6),
        any_of=r.choice(((), ("H100-80GB",), ("A100-80GB",), ("B200",))),
        max_nodes=r.randint(0, 1),
        cpu_millicores_per_rank=r.choice((0, 16_000, 40_000)),
    ),
    lambda r: _spec(gpus=4, placement=r.choice(((Rule(0, 4),), (Rule(2, 5),)))),
    lambda r: _spec(gpus=r.randint(1, 2), share_memory_bytes=r.choice((20, 50)) * GB, priority=r.randint(0, 1)),
    lambda r: _spec(gpus=0, ranks=r.randint(1, 3), cpu_millicores_per_rank=30_000),
    lambda r: _spec(gpus=1, array_name="a", array_max_running=2),
    lambda r: _spec(gpus=2, kind=JobKind.SERVICE, time_limit_s=r.choice((None, 3000.0))),
    lambda r: _spec(gpus=1, datasets=("text",), require_local_data=True),
    lambda r: _spec(
        gpus=r.choice((2, 4)),
        elastic_min=r.randint(1, 2),
        elastic_max=r.choice((4, 8)),
        elastic_resumes=True,
        priority=r.randint(0, 1),
    ),
)


def submit(world: PlanWorld, r: Random) -> None:
    for _ in range(r.randint(1, 3)):
        if len(world.state.jobs) >= MOST_JOBS:
            return
        spec = r.choice(KINDS)(r)
        if world.state.reservations and spec.gpus and not spec.is_elastic and r.random() < 0.3:
            spec = replace(spec, reservation=r.choice(sorted(world.state.reservations)).removeprefix("reservations/"))
        if world.against_all and spec.time_limit_s is None and spec.expected_s is None:
            spec = replace(spec, expected_s=3000.0)  # what is learned of others is taken in with the next news of a job
        world.number += 1
        name = f"queues/{r.choice(sorted(QUEUES))}/jobs/j{world.number}"
        happenings.submit(world.state, Submission(name, spec, world.now_s - r.randint(0, 6), r.choice(_RUN_S)))


def time_passes(world: PlanWorld, r: Random) -> None:
    world.passes(r.choice((5.0, 30.0, 300.0, 3000.0)))


def saves(world: PlanWorld, r: Random) -> None:
    world.more.saved = True


def fails(world: PlanWorld, r: Random) -> None:
    """A rank of it ends by itself, or its start is refused: it is tried again after a while, or at once."""
    if not (able := world.known(JobState.STARTING, JobState.RUNNING)):
        return
    one = r.choice(able)
    failed = lifecycle.fence(one.job, AttemptFailure(EndReason.EXIT, "a rank ended"), world.now)
    happenings.leave(world.now_s, world.state, one, "lost")
    one.turn += 1
    again = lifecycle.requeue(running.with_tasks(failed, TaskPhase.EXITED), "again")
    if r.random() < 0.5:
        again = replace(again, not_before=world.now + timedelta(seconds=r.choice((10, 100))))
    world.record(one, again)
    happenings.offer(world.now_s, world.state, one, one.turn)


def is_cancelled(world: PlanWorld, r: Random) -> None:
    if able := world.known(*JobState):
        one = r.choice(able)
        one.job = replace(one.job, cancel_requested=True, cause=_ASKED_BY)
        world.look([one.job.name])


def is_deleted(world: PlanWorld, r: Random) -> None:
    if able := world.known(*JobState):
        world.delete(r.choice(able))


def is_held(world: PlanWorld, r: Random) -> None:
    if able := [one for one in world.known(JobState.QUEUED) if one.job.hold is None]:
        one = r.choice(able)
        world.record(one, verbs.hold(one.job, Hold("users/ada", "", world.now), _ASKED_BY))


def is_released(world: PlanWorld, r: Random) -> None:
    if able := [one for one in world.known(JobState.QUEUED) if one.job.hold is not None]:
        one = r.choice(able)
        world.record(one, verbs.release(one.job, _ASKED_BY))


def changes_priority(world: PlanWorld, r: Random) -> None:
    if able := world.known(*JobState):
        one = r.choice(able)
        world.record(one, verbs.set_priority(one.job, r.randint(0, 3), _ASKED_BY))


def node_event(world: PlanWorld, r: Random) -> None:
    """Lost, to be emptied, or back."""
    node, what = r.choice(NODES).name, r.choice(("down", "drain", "up", "up"))
    if node in world.why_closed:
        world.why_closed[node] = {"up": "", "drain": "draining", "down": "unreachable"}[what]
        happenings.node_event(world.now_s, world.state, NodeEvent(world.now_s, what, (node,)))


def is_cordoned(world: PlanWorld, r: Random) -> None:
    """It takes nothing new, and what runs there goes on."""
    node, why = r.choice(NODES).name, r.choice(("", "cordoned"))
    if node in world.why_closed and node not in world.state.conditions:
        world.why_closed[node] = world.state.news.closed[node] = why


def facts_change(world: PlanWorld, r: Random) -> None:
    before, sick = world.nodes[r.choice(NODES).name], r.randint(0, 4)
    gpus = tuple(replace(gpu, healthy=gpu.index != sick) for gpu in before.gpus)
    changed = replace(before, gpus=gpus, cpu_millicores=r.choice((64_000, 64_000, 30_000)))
    if before.name in world.why_closed:
        world.tell_node(changed)


def leaves(world: PlanWorld, r: Random) -> None:
    """Its record is gone, and what ran there is lost."""
    node = r.choice(NODES).name
    if node not in world.why_closed:
        return
    happenings.node_event(world.now_s, world.state, NodeEvent(world.now_s, "down", (node,)))
    world.rest()
    del world.why_closed[node]
    world.more.removed.append(node)
    world.rest()


def comes_back(world: PlanWorld, r: Random) -> None:
    for node in world.nodes:
        if node not in world.why_closed:
            world.why_closed[node] = ""
            world.tell_node(world.nodes[node])
            happenings.node_event(world.now_s, world.state, NodeEvent(world.now_s, "up", (node,)))


def limits_change(world: PlanWorld, r: Random) -> None:
    """Of two queues, or of one below the other."""
    p = Queue(
        "queues/p", max_gpus=r.choice((0, 2, 6)), weight=r.choice((1.0, 3.0)), guaranteed_gpus=r.choice((0, 0, 2))
    )
    q = Queue(
        "queues/q",
        guaranteed_gpus=r.choice((0, 4, 8)),
        lending_limit_gpus=r.choice((None, None, 0, 2)),
        parent=r.choice(("", "", "p")),
    )
    world.set_queues({"p": p, "q": q})


def a_copy_comes(world: PlanWorld, r: Random) -> None:
    if r.random() < 0.3:
        world.datasets.clear()
        world.more.datasets["datasets/text"] = None
    else:
        world.datasets["datasets/text"] = world.more.datasets["datasets/text"] = world.copy_of((r.choice(NODES).name,))


def reserves(world: PlanWorld, r: Random) -> None:
    """GPUs for a queue, or nodes for their maintenance, from some time on."""
    start = world.now + timedelta(seconds=r.choice((0, 60, 1000, 10_000)))
    end = start + timedelta(seconds=r.choice((120, 3000)))
    world.number += 1
    name = f"reservations/r{world.number}"
    if r.random() < 0.3:
        asked = Reservation(name, start, end, nodes=(r.choice(NODES).name,), maintenance=True)
    else:
        asked = Reservation(name, start, end, gpus=r.choice((1, 3, 6)), queue=r.choice(sorted(QUEUES)))
    others = world.state.reservations.values()
    kept, wrong = reservation_rules.admitted(asked, others, world.plan.reservation_fleet())
    if not wrong and len(world.state.reservations) < 3:
        world.state.reservations[name] = kept
        world.set_reservations()


def reservation_goes(world: PlanWorld, r: Random) -> None:
    if world.state.reservations:
        name = r.choice(sorted(world.state.reservations))
        del world.state.reservations[name]
        world.state.leaving.set(name, ())
        world.set_reservations()


def takes_over(world: PlanWorld, r: Random) -> None:
    world.take_over()


def moves_work(world: PlanWorld, r: Random) -> None:
    """As the leader does each minute when it may."""
    plans = [plan.plan_rebalance(world.now, thorough=True) for plan in world.plans]
    if not plans[0].proposals:
        return
    try:
        made = [plan.apply_rebalance(of.etag, world.now)[1] for plan, of in zip(world.plans, plans, strict=True)]
    except Aborted:
        return
    world.carry_out(made)


RULES: dict[str, tuple[int, Callable[[PlanWorld, Random], None]]] = {
    "time_passes": (40, time_passes),
    "submit": (24, submit),
    "is_cancelled": (4, is_cancelled),
    "is_deleted": (2, is_deleted),
    "fails": (4, fails),
    "is_held": (1, is_held),
    "is_released": (2, is_released),
    "changes_priority": (2, changes_priority),
    "node_event": (4, node_event),
    "is_cordoned": (2, is_cordoned),
    "facts_change": (2, facts_change),
    "leaves": (1, leaves),
    "comes_back": (2, comes_back),
    "limits_change": (3, limits_change),
    "a_copy_comes": (2, a_copy_comes),
    "reserves": (2, reserves),
    "reservation_goes": (1, reservation_goes),
    "saves": (1, saves),
    "takes_over": (1, takes_over),
    "moves_work": (1, moves_work),
}
Operation = tuple[str, int]


def do(world: PlanWorld, operation: Operation) -> None:
    """One operation, and what follows of it until all is at rest."""
    name, number = operation
    RULES[name][1](world, Random(number))
    world.rest()
