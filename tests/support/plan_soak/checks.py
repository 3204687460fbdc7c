"""What has to hold whatever happens: at rest, and of each move. All of it is worked out from records, not from what the plan remembers."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import datetime
from operator import itemgetter
from typing import TYPE_CHECKING

from whaleflux_scheduler.core.holdings import held_by, is_reservation
from whaleflux_scheduler.core.model import ClaimPurpose, Job, JobState
from whaleflux_scheduler.core.plan import Move
from whaleflux_scheduler.core.promises import MARGIN_S
from whaleflux_scheduler.core.state_machine import goes_on

if TYPE_CHECKING:
    from tests.support.plan_soak.world import PlanWorld


def alike(made: list[list[Move]]) -> None:
    """All plans decided the same, but for the reasons, and for the order of different jobs: whom a move helps may have been asked before it or not."""
    ours, *others = [
        sorted(
            [(m.job, m.assignment, m.claim, m.reservation) for m in moves if m.assignment or m.claim or m.reservation],
            key=itemgetter(0),
        )
        for moves in made
    ]
    for theirs in others:
        assert ours == theirs, f"who tries all decides otherwise: {theirs} and not {ours}"


# at rest


def at_rest(world: PlanWorld, *, wholly: bool) -> None:
    """`wholly`: the engines, too, which takes as long as a decision."""
    records = world.records
    given_once(world, records)
    as_recorded(world, records)
    nobody_is_lost(world, records)
    claims_stand_alone(records, world.now)
    for plan in world.plans if wholly else ():
        plan.check()


def holders(records: dict[str, Job]) -> dict[str, dict[str, Job]]:
    """By GPU who holds it."""
    found: dict[str, dict[str, Job]] = defaultdict(dict)
    for name, job in records.items():
        for uuids in held_by(job).values():
            for uuid in uuids:
                found[uuid][name] = job
    return found


def given_once(world: PlanWorld, records: dict[str, Job]) -> None:
    """A GPU is one job's, or some jobs' whose shares are no more than its memory."""
    memory = {gpu.uuid: gpu.memory_bytes for node in world.nodes.values() for gpu in node.gpus}
    for uuid, jobs in holders(records).items():
        if len(jobs) > 1:
            shares = [job.spec.share_memory_bytes for job in jobs.values()]
            assert all(shares), f"{uuid} is given to each of {sorted(jobs)}"
            assert sum(shares) <= memory[uuid], f"of {uuid} more is given than it has, to {sorted(jobs)}"


def as_recorded(world: PlanWorld, records: dict[str, Job]) -> None:
    """The plan holds and claims for each job what its record says."""
    held = {name: gpus for name, job in records.items() if (gpus := held_by(job))}
    claims = {
        name: job.claim.nodes
        for name, job in records.items()
        if job.claim is not None and (job.state is JobState.QUEUED or goes_on(job))
    }
    for plan in world.plans:
        assert plan.held() == held, f"the plan holds {plan.held()}, and the records {held}"
        own = {name: nodes for name, nodes in plan.claims_of().items() if not is_reservation(name)}
        assert own == claims, f"the plan claims {own}, and the records {claims}"


def nobody_is_lost(world: PlanWorld, records: dict[str, Job]) -> None:
    """Each job waits, or holds something, or pauses, or is held back; and only such wait as are to be placed."""
    for name, job in records.items():
        for plan in world.plans:
            if plan.waits(name):
                assert world.may_be_placed(job), f"{name} is {job.state.name}, and waits all the same"
            elif job.state is JobState.QUEUED:
                assert not world.may_be_placed(job), f"{name} is to be placed, and nobody knows"
        if job.state in (JobState.STARTING, JobState.RUNNING, JobState.SUSPENDING):
            assert any(job.holding()), f"{name} is {job.state.name} and holds nothing"
    for plan in world.plans:
        assert plan.waiting == sum(map(plan.waits, records)), "somebody waits who does not exist"


def claims_stand_alone(records: dict[str, Job], now: datetime) -> None:
    """No GPU is claimed by two, but for shares of it, and until one has stopped that gives up its claim to the other then.

    What was given up is over, and its record says so until it is looked at next.
    """
    claimed: dict[str, str] = {}
    for name, job in records.items():
        for _, uuids in job.claim.nodes if job.claim is not None and job.claim.expire_time > now else ():
            for uuid in uuids:
                other = claimed.setdefault(uuid, name)
                both = job.spec.share_memory_bytes and records[other].spec.share_memory_bytes
                goes_on = any(uuid in held for one in (name, other) for held in held_by(records[one]).values())
                stops = gives_up(records[other], records[name]) or gives_up(records[name], records[other])
                assert other == name or both or goes_on or stops, f"{uuid} is claimed by {other} and by {name}"


def gives_up(job: Job, to: Job) -> bool:
    """Whether it stops, and hears then that its claim is the other's."""
    return job.state is JobState.SUSPENDING and to.claim is not None and job.name in to.claim.victims


# moves


class Before:
    """What was the case before moves were carried out."""

    def __init__(self, world: PlanWorld) -> None:
        self.records = world.records
        self.use = queue_use(world, self.records)
        self.arrays = array_use(self.records)
        self.reservations = dict(world.state.reservations)

    def compare(self, world: PlanWorld, made: list[Move]) -> None:
        """Whether the moves were right."""
        if not any(move.assignment or move.claim for move in made):
            return
        after = world.records
        within_limits(world, self, after)
        loses = losing(self, made)
        for move in made:
            if move.assignment is not None and move.job in self.records:
                starts_rightly(world, self.records[move.job], move, self, loses)
            elif move.claim is not None and move.job in self.records:
                claims_rightly(world, self.records[move.job], move, self, loses)
        fits_nodes(world, made, after)


def count(job: Job) -> int:
    """GPUs that it holds or claims; where others leave for it under a limit, only one of the two counts at a time."""
    held = {uuid for uuids in held_by(job).values() for uuid in uuids if not uuid.startswith("cpu:")}
    kept = job.claim is not None and not job.claim.limited_queue
    claimed = {uuid for _, uuids in job.claim.nodes for uuid in uuids} if kept else set()
    return len(held | claimed)


def queue_use(world: PlanWorld, records: dict[str, Job]) -> Counter[str]:
    """GPUs that queues and those below them hold or claim."""
    found, queues = Counter[str](), world.state.queues
    for job in records.values():
        if not job.spec.gpus:
            continue
        gpus, at, seen = count(job), job.queue, set[str]()
        while at and at in queues and at not in seen:
            seen.add(at)
            found[at] += gpus
            at = queues[at].parent
    return found


def array_use(records: dict[str, Job]) -> Counter[tuple[str, str]]:
    held = (
        job for job in records.values() if job.spec.array_max_running and (job.claim is not None or any(job.holding()))
    )
    return Counter((job.queue, job.spec.array_name) for job in held)


def within_limits(world: PlanWorld, before: Before, after: dict[str, Job]) -> None:
    """No queue and no array has more than it may, or it has no more than it had."""
    for id_, use in queue_use(world, after).items():
        most = world.state.queues[id_].max_gpus
        reserved = sum(count(job) for job in after.values() if job.spec.reservation)
        assert not most or use <= max(most + reserved, before.use[id_]), f"{id_} has {use} GPUs and may have {most}"
    for of, members in array_use(after).items():
        assert members <= max(2, before.arrays[of]), f"{members} members of {of} run, and 2 may"


def starts_rightly(world: PlanWorld, job: Job, move: Move, before: Before, loses: set[tuple[str, str]]) -> None:
    """On GPUs that are there, in order and free, and not at the cost of a promise."""
    assert move.assignment is not None
    free_of = {name: held_by(other) for name, other in before.records.items() if name != job.name}
    for node, uuids in move.assignment.nodes:
        known = world.nodes[node]
        assert not world.why_closed.get(node, "gone"), (
            f"{job.name} starts on {node}, which is {world.why_closed.get(node)}"
        )
        there = {gpu.uuid for gpu in known.gpus if gpu.healthy}
        assert there.issuperset(uuids), f"{job.name} is given {set(uuids) - there} of {node}, which are not in order"
    own = {uuid for _, uuids in job.claim.nodes for uuid in uuids} if job.claim is not None else set()
    mine = {uuid for uuids in held_by(job).values() for uuid in uuids}
    taken = {uuid for _, uuids in move.assignment.nodes for uuid in uuids} - own - mine
    if not job.spec.share_memory_bytes:
        for name, held in free_of.items():
            both = taken.intersection(*[set().union(*held.values())]) if held else set()
            assert not both, f"{job.name} is given {both}, which {name} holds"
    keeps_promises(world, job, taken, before, {name for name, _ in loses})


def keeps_promises(world: PlanWorld, job: Job, taken: set[str], before: Before, loses: set[str]) -> None:
    """Who starts on GPUs that are promised to somebody is over by then; on a reservation's that has begun are its members only."""
    over_s = world.now.timestamp() + world.plan.lasts_s(job) + MARGIN_S
    for name, other in before.records.items():
        claim = other.claim
        if name == job.name or claim is None or taken.isdisjoint(uuid for _, uuids in claim.nodes for uuid in uuids):
            continue
        if name not in world.state.jobs:  # it is over since: another move of this step stopped it
            continue
        after = world.state.jobs[name].job
        if after.state is JobState.SUSPENDING and name in loses:  # it gives its claim up when it has stopped
            continue
        both = job.spec.share_memory_bytes and other.spec.share_memory_bytes
        over = claim.expire_time <= world.now
        if after.claim is None or after.claim.nodes != claim.nodes or both or over:
            continue
        kept = claim.purpose is ClaimPurpose.RESERVATION and claim.start_time is not None
        assert kept and over_s <= claim.start_time.timestamp() + 0.001, (
            f"{job.name} starts on GPUs of {name}'s {claim.purpose.name}, which is due at {claim.start_time}, and may last {world.plan.lasts_s(job)} s"
        )


def losing(before: Before, made: list[Move]) -> set[tuple[str, str]]:
    """Who is about to lose its claim, and to whom."""
    claims = {name: job.claim for name, job in before.records.items()}
    claims |= {move.job: move.claim for move in made if move.claim is not None}
    return {(victim, name) for name, claim in claims.items() if claim is not None for victim in claim.victims}


def claims_rightly(world: PlanWorld, job: Job, move: Move, before: Before, loses: set[tuple[str, str]]) -> None:
    """Whoever is stopped for it is borrowed of its guarantee, or of lower priority, or only shrinks; no service that runs.

    Who loses its claim to one from whom it is taken in turn has to hear it of both, as the one's record may be written first.
    """
    claim = move.claim
    assert claim is not None
    held = held_by(job)
    for node, uuids in claim.nodes if claim.purpose is not ClaimPurpose.RESERVATION else ():
        new = set(uuids) - held.get(node, frozenset())  # who shrinks stays where it is
        there = {gpu.uuid for gpu in world.nodes[node].gpus if gpu.healthy}
        closed = world.why_closed.get(node, "gone") if new else ""
        assert not closed, f"{job.name} claims GPUs of {node}, which is {closed}"
        assert there.issuperset(uuids), f"{job.name} claims {set(uuids) - there}, which are not in order"
    if claim.purpose is not ClaimPurpose.PREEMPTION:
        return
    for name in claim.victims:
        other = before.records[name]
        assert not other.spec.is_service or other.state is not JobState.RUNNING, (
            f"{name} is a service, and {job.name} has it stopped"
        )
        shrinks = other.spec.is_elastic and other.state is not JobState.QUEUED
        in_turn = any((name, one) in loses for one in claim.victims)
        beside = other.state is JobState.QUEUED and any(
            of == name and to != job.name for of, to in loses
        )  # a share of what it gives up
        if other.spec.priority >= job.spec.priority and not shrinks and not in_turn and not beside:
            assert guaranteed(world, job), f"{job.name} has {name} stopped, which is of priority {other.spec.priority}"
            assert other.queue != job.queue, f"{job.name} takes back from {name} of its own queue"


def guaranteed(world: PlanWorld, job: Job) -> bool:
    """Whether anything on its queue's way to the root is guaranteed."""
    queues, at, seen = world.state.queues, job.queue, set[str]()
    while at in queues and at not in seen:
        seen.add(at)
        if queues[at].guaranteed_gpus or any(one.guaranteed_gpus and one.parent == at for one in queues.values()):
            return True
        at = queues[at].parent
    return False


def fits_nodes(world: PlanWorld, made: list[Move], after: dict[str, Job]) -> None:
    """What starts on a node finds as much CPU as it asks for."""
    touched = {node for move in made if move.assignment is not None for node, _ in move.assignment.nodes}
    if not touched:
        return
    used = Counter[str]()
    for job in after.values():
        for _, task in job.holding():
            used[task.node] += task.ranks * job.spec.counted_cpu_millicores
    for move in made:
        job = after.get(move.job)
        if move.assignment is None or job is None or not job.spec.counted_cpu_millicores:
            continue
        for node, _ in move.assignment.nodes:
            has = world.nodes[node].cpu_millicores
            assert used[node] <= has, (
                f"{job.name} starts on {node}, where {used[node]} millicores are asked for of {has}"
            )
