"""What every job holds and claims, by GPU UUID, and the same in the placement engine by position.

A job holds the GPUs of its tasks until agents say that nothing is left of them. It claims GPUs that others make room on; a claimed
GPU is nobody else's from the moment its holder leaves. Both are what the jobs' records say: a new leader learns them from there.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TypeVar

from whaleflux.fleet.model import Node
from whaleflux_scheduler.core.data_ahead import copies_of
from whaleflux_scheduler.core.devices import NOTHING, Gpus
from whaleflux_scheduler.core.held_in_engine import EXTRA, KEPT, HeldInEngine, claim_id, is_reservation, job_of
from whaleflux_scheduler.core.model import Claim, Job, JobState, Task
from whaleflux_scheduler.core.placement.api import Placement
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.queue_shares import QueueShares
from whaleflux_scheduler.core.state_machine import goes_on

__all__ = ("EXTRA", "KEPT", "Holdings", "claim_id", "count", "held_by", "is_reservation", "job_of", "places_of")
log = logging.getLogger(__name__)
T = TypeVar("T")
_CPU = "cpu:"
_NONE = frozenset[str]()


def held_by(job: Job) -> Gpus:
    """The GPUs of all its tasks that are not known to be over."""
    held: dict[str, frozenset[str]] = {}
    for _, task in job.holding():
        known, places = held.get(task.node), places_of(task)
        held[task.node] = places if known is None else known | places
    return held


def places_of(task: Task) -> frozenset[str]:
    """The GPUs of the task; of one without GPUs a name for each rank, which no node reports: it takes CPU and memory alone."""
    return frozenset(task.gpus) if task.gpus else frozenset(f"{_CPU}{task.id}/{rank}" for rank in range(task.cpu_ranks))


def count(gpus: Gpus) -> int:
    return sum(map(len, gpus.values())) if gpus else 0


def _count_of_both(held: Gpus, claimed: Gpus) -> int:
    """A job may claim what it holds: the place where it goes on."""
    return count(held) + len(_without(claimed, held)) if claimed else count(held)


def _without(gpus: Gpus, others: Gpus) -> set[tuple[str, str]]:
    """The GPUs of the first that are not among the second, with their nodes."""
    if not gpus or gpus == others:
        return set()
    if not others:
        return {(node, uuid) for node, uuids in gpus.items() for uuid in uuids}
    return {(node, uuid) for node, uuids in gpus.items() for uuid in uuids - others.get(node, _NONE)}


def _pairs(gpus: Gpus) -> Iterator[tuple[str, str]]:
    return ((node, uuid) for node, uuids in gpus.items() for uuid in uuids)


class Holdings(HeldInEngine):
    """See the module."""

    def __init__(self, engine: Engine, shares: QueueShares) -> None:
        super().__init__(engine)
        self.shares = shares  # what queues hold or claim
        self.by_array: Counter[tuple[str, str]] = Counter()  # queue and array: members that hold or claim something
        self.saved: Mapping[str, datetime] = {}  # by job: when its newest checkpoint was committed
        self.stoppable: Counter[int] = Counter()  # by priority: what running training holds, and what claims keep
        self.eased: dict[str, None] = {}  # queues that hold less than when their owner last looked
        self._on_node: dict[str, set[str]] = {}  # jobs that hold or claim something there
        self._as_recorded: set[str] = set()  # jobs that hold and claim what their record in `_jobs` says
        self.reclaimed: set[str] = set()  # jobs of which others claim more or less than when their owner last looked
        self.unclaimed_now: set[str] = set()  # jobs of which somebody claims less than when their owner last looked
        self._left_out: dict[str, list[str]] = {}  # by node: why GPUs are not offered

    @property
    def jobs(self) -> Mapping[str, Job]:
        """Jobs that hold or claim something."""
        return self._jobs

    def held(self, job: str) -> Gpus:
        return self._held.get(job, NOTHING)

    def count_of(self, job: str) -> int:
        """GPUs that the job holds or claims."""
        return _count_of_both(self._held.get(job, NOTHING), self._claimed.get(job, NOTHING))

    def holds(self, job: str) -> bool:
        """Whether it holds or claims anything."""
        return job in self._held or job in self._claimed

    def claim(self, job: str) -> Claim | None:
        """What is kept for the job while it waits."""
        return self._claims.get(job)

    @property
    def claims(self) -> Mapping[str, Claim]:
        """By job."""
        return self._claims

    def jobs_on(self, node: str) -> Collection[str]:
        """Who holds or claims something there; reservations too."""
        return self._on_node.get(node, ())

    def holders(self, uuid: str) -> Collection[str]:
        """Jobs that hold the GPU, several only of shares."""
        return self._holders.get(uuid, ())

    def disputed(self, job: str) -> bool:
        return job in self._disputed

    @property
    def all_disputed(self) -> Collection[str]:
        """Jobs of whose GPUs, held or claimed, others hold some too."""
        return frozenset(map(job_of, self._disputed))

    def by_job(self) -> dict[str, Gpus]:
        """What each job holds."""
        return {job: dict(held) for job, held in self._held.items()}

    def by_model(self) -> tuple[Counter[str], Counter[str]]:
        """GPUs of open nodes and GPUs held, by catalogue name."""
        nodes = self.devices.nodes
        offered = Counter(gpu.model for name in self.devices.open for gpu in nodes[name].gpus)
        models = {gpu.uuid: gpu.model for node in nodes.values() for gpu in node.gpus}
        held = (uuid for uuid in self._holders if not uuid.startswith(_CPU))
        return offered, Counter(models.get(uuid, "unknown") for uuid in held)

    def check(self) -> None:
        """Raises AssertionError when the engine holds something else than the jobs do, or a GPU has two holders."""
        self._engine.check()
        claims = {claim_id(job) for job in self._claimed if self._kept(job).nodes}
        wanted = self._held.keys() | claims
        assert self._engine.placements.keys() | self._disputed == wanted, "holdings differ"
        for job, held in self._held.items():
            for node, uuid in _pairs(held):
                assert self._holders[uuid].get(job) == node or job in self._disputed, f"{uuid} is held twice"
        for uuid, jobs in self._holders.items():
            assert len(jobs) == 1 or all(map(self._share_bytes, jobs)), f"{uuid} is held whole by one of {len(jobs)}"

    # changes

    def learn(self, job: Job) -> Collection[str]:
        """The job as it is stored; returns the nodes where GPUs came free."""
        known = self._jobs.get(job.name)
        if known is not None and job.name in self._as_recorded and _holds_the_same(known, job):
            self._jobs[job.name] = job
            return ()
        freed = self.hold(job, held_by(job), job.claim if job.state is JobState.QUEUED or goes_on(job) else None)
        if job.name in self._jobs:
            self._as_recorded.add(job.name)
        return freed

    def forget(self, name: str) -> Collection[str]:
        """The job's record is gone; returns the nodes where GPUs came free."""
        known = self._jobs.get(name)
        return self.hold(known, NOTHING) if known is not None else ()

    def hold(
        self, job: Job, held: Gpus, claim: Claim | None = None, remote: Collection[str] | None = None
    ) -> Collection[str]:
        """What the job holds and claims from now on; returns the nodes where GPUs came free. `remote`: data that is not pulled for it."""
        name = job.name
        if job.spec.datasets:
            self._engine.hold_data(name, copies_of(job, held, claim, remote), job.queue)
        self._as_recorded.discard(name)
        before, before_claimed = self._held.get(name, NOTHING), self._claimed.get(name, NOTHING)
        claimed = claim.gpus if claim else NOTHING
        self._count_stoppable(name, -1)
        _keep(self._jobs, name, job if held or claim else None)
        _keep(self._claims, name, claim)
        if before == held and before_claimed == claimed:
            self._count_stoppable(name, +1)
            if job.spec.gpus and (held or claimed):  # priorities change, and attempts begin
                self.shares.hold(job, self.count_of(name))
            return ()
        gone, came = _without(before, held), _without(held, before)
        if before_claimed or claimed:
            gone |= _without(before_claimed, claimed)
            came |= _without(claimed, before_claimed)
        changed = gone | came if gone and came else gone or came
        nodes = dict.fromkeys(sorted({node for node, _ in changed}))  # in the same order in each process
        if before_claimed != claimed:
            others = {other for node in nodes for other in self._on_node.get(node, ()) if other in self._claims}
            touched, beside = [name, *sorted(others - {name})], list[str]()
            both = (*_pairs(before_claimed), *_pairs(claimed))
            self.reclaimed.update(holder for _, uuid in both for holder in self._holders.get(uuid, ()))
            let_go = (uuid for _, uuid in _without(before_claimed, claimed))
            self.unclaimed_now.update(holder for uuid in let_go for holder in self._holders.get(uuid, ()))
        else:
            touched, beside = [name], sorted(self._claimants(uuid for _, uuid in changed) - {name})
        self._take_out(touched)
        self._record(job, held, claimed)
        self._count_stoppable(name, +1)
        self._put_in(touched, beside, nodes)
        twins = self.devices.elsewhere(changed)
        self._offer_again(twins)
        freed = gone - came
        if gone:
            self.eased[job.queue] = None
        if freed and self._disputed:
            self._settle_disputes()
        return {node for node, _ in freed} | twins

    def _count_stoppable(self, name: str, sign: int) -> None:
        job = self._jobs.get(name)
        if job is None:
            return
        if name in self._claims or job.may_be_suspended:
            change = sign * self.count_of(name)
            self.stoppable[job.spec.priority] += change
            if not is_reservation(name):
                self.shares.quota.count_stoppable(job.queue, job.spec.priority, change)
        if swap := self.swap_of(name):
            self.shares.quota.count_swaps(job.queue, sign * swap)

    def swap_of(self, job: str) -> int | None:
        """GPUs that the job claims where others leave for it under a limit; None: nobody does."""
        claim = self._claims.get(job)
        return self.claimed_beside(job) if claim is not None and claim.limited_queue else None

    def claimed(self, job: str) -> Gpus:
        """What is kept for the job, by node; it may hold some of it."""
        return self._claimed.get(job, NOTHING)

    def claimed_beside(self, job: str) -> int:
        """GPUs that the job claims and does not hold."""
        return len(_without(self._claimed.get(job, NOTHING), self._held.get(job, NOTHING)))

    def _record(self, job: Job, held: Gpus, claimed: Gpus) -> None:
        name = job.name
        if job.spec.gpus:  # a queue's limit and its share are of GPUs
            self.shares.hold(job, _count_of_both(held, claimed))
        if job.spec.array_name:
            self.by_array[job.queue, job.spec.array_name] += bool(held or claimed) - self.holds(name)
        for node in (*self._held.get(name, ()), *self._claimed.get(name, ())):
            self._on_node[node].discard(name)
        for node in (*held, *claimed):
            self._on_node.setdefault(node, set()).add(name)
        for uuid in itertools.chain.from_iterable(self._held.pop(name, NOTHING).values()):
            jobs = self._holders.get(uuid)
            if jobs and jobs.pop(name, None) is not None and not jobs:
                del self._holders[uuid]
        for _, uuid in _pairs(self._claimed.pop(name, NOTHING)):
            if self._claimant.get(uuid) == name:
                del self._claimant[uuid]
        _keep(self._held, name, held or None)
        _keep(self._claimed, name, claimed or None)

    def _claimants(self, uuids: Iterable[str]) -> set[str]:
        known = self._claimant
        return {known[uuid] for uuid in uuids if uuid in known} if known else set()

    @contextlib.contextmanager
    def without(self, name: str) -> Iterator[None]:
        """The engine as if the job held and claimed nothing; everything is as before at the end, whatever happens inside.

        A job may start on GPUs where its own remains are being killed, unless others claim those.
        """
        if not self.count_of(name) or name in self._disputed:
            yield
            return
        with self._engine.transaction():  # never committed
            for id_ in self._ids(name):
                if id_ in self._engine.placements:
                    self._engine.release(id_)
            for other in sorted(self._claimants(uuid for _, uuid in _pairs(self.held(name))) - {name}):
                self._widen(other, name)
            yield

    def claimants_of(self, uuids: Iterable[str]) -> set[str]:
        """Jobs that claim some of these GPUs."""
        return self._claimants(uuids)

    @contextlib.contextmanager
    def without_claims(self, claimants: Iterable[str]) -> Iterator[None]:
        """The engine as if these claimed nothing; everything is as before at the end, whatever happens inside."""
        lifted = dict.fromkeys(claimants)
        with self._engine.transaction():  # never committed
            for id_ in map(claim_id, lifted):
                if id_ in self._engine.placements:
                    self._engine.release(id_)
            for name, beneath in self._beneath(lifted):
                self._engine.apply(self.as_placement(name + KEPT, self._jobs[name], beneath))
            yield

    def _beneath(self, lifted: Collection[str]) -> Iterator[tuple[str, Gpus]]:
        """What jobs claim of GPUs that reservations among these keep for later: it is not free when they are lifted."""
        first = [self._claimed[name] for name in lifted if is_reservation(name) and name in self._claimed]
        for name in (
            [name for name in self._claimed if name not in lifted and not is_reservation(name)] if first else ()
        ):
            beneath = {
                node: both
                for node, uuids in self._claimed[name].items()
                if (
                    both := frozenset(
                        u for one in first for u in uuids & one.get(node, _NONE) if self._only(node, u, name)
                    )
                )
            }
            if beneath:
                yield name, beneath

    def _only(self, node: str, uuid: str, claimant: str) -> bool:
        """Whether a reservation alone stands before the claimant."""
        return is_reservation(self._claimant.get(uuid, "")) and self._free(node, uuid, claimant, "")

    def holders_of(self, claim: Claim) -> set[str]:
        """Jobs that hold some of what is claimed."""
        return {job for _, uuids in claim.nodes for uuid in uuids for job in self._holders.get(uuid, ())}

    def held_of(self, claim: Claim) -> Counter[str]:
        """How many of the claimed GPUs each job holds."""
        return Counter(job for _, uuids in claim.nodes for uuid in uuids for job in self._holders.get(uuid, ()))

    def unclaimed(self, job: str) -> int:
        """GPUs that the job holds and nobody else claims."""
        held = self.held(job)
        if not held or not self._jobs[job].spec.gpus:
            return 0
        if not self._claimant:
            return count(held)
        return sum(self._claimant.get(uuid, job) == job for _, uuid in _pairs(held))

    def let_go(self, job: str, claimant: str) -> Iterator[tuple[str, int]]:
        """GPUs that come free for the claimant when the job leaves, by node."""
        held = self.held(job)
        if not held or not self._jobs[job].spec.gpus:
            return
        for node, uuids in held.items():
            yield (
                node,
                sum(self._claimant.get(u, claimant) == claimant for u in uuids) if self._claimant else len(uuids),
            )

    def claimants_on(self, job: str) -> set[str]:
        """Others that claim some of what the job holds."""
        return self._claimants(uuid for _, uuid in _pairs(self.held(job))) - {job}

    def claimed_by_others(self, job: str, claimant: str) -> Placement | None:
        """What of the job's GPUs others than `claimant` claim, as work of its own in the engine; None: nothing."""
        if not self._claimant:
            return None
        claimed = {
            node: theirs
            for node, uuids in self.held(job).items()
            if (theirs := frozenset(u for u in uuids if self._claimant.get(u, claimant) != claimant))
        }
        return self.as_placement(job + KEPT, self._jobs[job], claimed) if claimed else None

    # nodes

    def report(self, node: Node) -> Collection[str]:
        """A node's facts as they are now; returns the nodes that may offer more.

        Raises InvalidArgument when placement can never take them; all is as before then.
        """
        offered, _ = self.devices.offered(node)
        known = self.devices.nodes.get(node.name)
        renumbered = known is None or _numbers(known) != _numbers(node)
        there = sorted(self._on_node.get(node.name, ())) if renumbered else []
        self._take_out(there)
        try:
            self._engine.upsert_node(offered)
            affected = self.devices.report(node)
        finally:
            self._put_in(there)
        self._offer_again(affected)
        return affected

    def remove(self, name: str) -> Collection[str]:
        """The node is gone; what is held there stays held. Returns the nodes that may offer more."""
        affected = self.devices.remove(name)
        self._engine.remove_node(name)
        self._left_out.pop(name, None)
        self._offer_again(affected)
        return affected

    def close(self, name: str, why: str) -> Collection[str]:
        """Whether the node takes new work ("": it does); returns the nodes that may offer more than before."""
        opened = {name} if not why and name not in self.devices.open else set[str]()
        self._engine.set_schedulable(name, not why, why)
        (self.devices.open.discard if why else self.devices.open.add)(name)
        twins = self.devices.twins(name)
        self._offer_again(twins)
        return opened | twins

    def _offer_again(self, nodes: Iterable[str]) -> None:
        for name in nodes:
            offered, left_out = self.devices.offered(self.devices.nodes[name])
            if left_out != self._left_out.get(name, []):
                log.warning("%s does not offer some GPUs: %s", name, "; ".join(left_out) or "it does again")
                self._left_out[name] = left_out
            self._engine.upsert_node(offered)


def _holds_the_same(known: Job, job: Job) -> bool:
    """Whether nothing of what a job holds and claims differs: the usual news of a gang that runs. Which GPUs a task has never changes."""
    if (known.state, known.claim, known.spec.priority) != (job.state, job.claim, job.spec.priority):
        return False
    before, after = tuple(known.attempts()), tuple(job.attempts())
    if [(one.epoch, len(one.tasks)) for one in before] != [(one.epoch, len(one.tasks)) for one in after]:
        return False
    pairs = zip((t for one in before for t in one.tasks), (t for one in after for t in one.tasks), strict=True)
    return all(a is b or a.holds == b.holds for a, b in pairs)


def _keep(known: dict[str, T], name: str, value: T | None) -> None:
    if value is None:
        known.pop(name, None)
    else:
        known[name] = value


def _numbers(node: Node) -> list[tuple[str, int]]:
    return [(gpu.uuid, gpu.index) for gpu in node.gpus]
