"""Puts the parts together, the same way for the service, for tests and for benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import Refusal, Unavailable
from whaleflux.events.api import Bus
from whaleflux.events.publisher import Publisher
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.batching import GroupCommit
from whaleflux.store.cache import Cache
from whaleflux.store.election import Leader, lead
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2
from whaleflux.v1.agent_pb2_grpc import add_TaskServiceServicer_to_server
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.scheduler_pb2_grpc import add_SchedulerServiceServicer_to_server
from whaleflux_scheduler import convert, news
from whaleflux_scheduler.brain import Brain, Sources
from whaleflux_scheduler.core.observed import Limits
from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.fleet import Fleet
from whaleflux_scheduler.hub import Hub
from whaleflux_scheduler.jobs import Jobs
from whaleflux_scheduler.judge import Judge
from whaleflux_scheduler.logs import LogDesk
from whaleflux_scheduler.servicer import Scheduler
from whaleflux_scheduler.submit import Submissions
from whaleflux_scheduler.task_servicer import Tasks
from whaleflux_scheduler.term import ELECTION, Term, not_leader

RETRY_S = 0.5
DATASETS_EVERY_S = 30.0  # inventory offers no watch of datasets; where copies are changes slowly

_log = telemetry.get_logger("whaleflux.scheduler")


@dataclass(frozen=True, slots=True)
class Peers:
    """The services that the scheduler asks; None: not there."""

    inventory: InventoryServiceStub | None = None
    health: HealthServiceStub | None = None
    checkpoint: CheckpointServiceStub | None = None

    @classmethod
    def dial(cls, inventory: Any, health: Any, checkpoint: Any) -> Self:
        """From channels (`whaleflux.rpc.channel`), or None where there is none."""
        return cls(
            InventoryServiceStub(inventory) if inventory else None,
            HealthServiceStub(health) if health else None,
            CheckpointServiceStub(checkpoint) if checkpoint else None,
        )


Loop = Callable[[], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Service:
    """The assembled scheduler: run `loops`, serve `servicers`."""

    servicers: Sequence[tuple[Callable[[Any, Any], None], Any, str]]
    loops: Sequence[Loop]
    ready: Callable[[], bool]
    term: Term
    hub: Hub
    jobs: Jobs
    fleets: list[Fleet] = field(default_factory=list)  # the leader's, newest last


def assemble(
    store: Store, bus: Bus | None, clock: Clock, peers: Peers, limits: Limits, address: str, keep_ended: int = 10_000
) -> Service:
    """`address` is told to callers who ask a follower."""
    batched = GroupCommit(store, in_flight=1)  # fewer, larger transactions cost this process less than they delay
    jobs_cache = Cache(store, keys.JOBS, convert.JOBS.decode)
    queues_cache = Cache(store, keys.QUEUES, convert.QUEUES.decode)
    hub, term, jobs = Hub(), Term(store), Jobs(store, jobs_cache)
    desk = LogDesk(hub)
    submissions = Submissions(batched, clock, peers.inventory)
    scheduler = Scheduler(batched, jobs, submissions, term, desk, clock)
    service = Service(
        servicers=[
            (add_SchedulerServiceServicer_to_server, scheduler, "whaleflux.v1.SchedulerService"),
            (add_TaskServiceServicer_to_server, Tasks(term, desk), "whaleflux.v1.TaskService"),
        ],
        loops=[],
        ready=lambda: jobs_cache.revision > 0,
        term=term,
        hub=hub,
        jobs=jobs,
    )

    async def decide(leader: Leader) -> None:
        """One term: everything that it remembers ends with it."""
        newest = await store.list(keys.JOBS, limit=1)
        await jobs_cache.at_least(newest.revision, timeout_s=30.0)
        await queues_cache.at_least(newest.revision, timeout_s=30.0)
        fleet = Fleet(hub.connected)
        judge = Judge(peers.health, peers.checkpoint)
        sources = Sources(jobs_cache, queues_cache)
        brain = Brain(batched, leader, sources, hub, fleet, judge, clock, limits, keep_ended=keep_ended)
        service.fleets[:] = [fleet]
        brain.load()
        term.brain = brain
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(brain.run())
                for feed in _feeds(fleet, brain, peers, clock):
                    group.create_task(feed())
                if bus is not None:
                    for publisher in _publishers(store, bus, leader, clock):
                        group.create_task(publisher.run())
        finally:
            term.brain = None
            hub.close(not_leader())

    async def run() -> None:
        async with jobs_cache, queues_cache:
            while True:
                try:
                    await lead(store, ELECTION, address, decide)
                except* Unavailable as outage:  # whatever was under way is unknown: a new term finds out
                    _log.warning(Event.LOOP_RESTARTED, loop="scheduler", reason=str(outage.exceptions[0]))
                await clock.sleep(RETRY_S)

    service.loops = [run]
    return service


def _feeds(fleet: Fleet, brain: Brain, peers: Peers, clock: Clock) -> list[Loop]:
    feeds: list[Loop] = []
    if peers.inventory is not None:
        inventory = peers.inventory
        feeds += [
            lambda: fleet.follow_inventory(inventory),
            lambda: _follow_datasets(brain, inventory, clock),
        ]
    if peers.health is not None:
        health = peers.health
        feeds.append(lambda: fleet.follow_health(health))
    return feeds


async def _follow_datasets(brain: Brain, inventory: InventoryServiceStub, clock: Clock) -> None:
    """Sizes and copies of datasets, as far as they differ from the last look."""
    known: dict[str, DatasetFact] = {}
    while True:
        with contextlib.suppress(Refusal):  # asked again soon; placement knows what it last heard
            facts = {fact.name: fact async for fact in _datasets(inventory)}
            if changed := tuple(fact for name, fact in facts.items() if known.get(name) != fact):
                brain.datasets_are(changed)
            known = facts
        await clock.sleep(DATASETS_EVERY_S)


async def _datasets(inventory: InventoryServiceStub) -> Any:
    token = ""
    while True:
        request = inventory_pb2.ListDatasetsRequest(page_size=500, page_token=token)
        page = await inventory.ListDatasets(request, timeout=10.0)
        for dataset in page.datasets:
            whole = (copy.node for copy in dataset.copies if copy.present_bytes >= dataset.size_bytes)
            yield DatasetFact(dataset.name, dataset.size_bytes, tuple(whole))
        token = page.next_page_token
        if not token:
            return


def _publishers(store: Store, bus: Bus, leader: Leader, clock: Clock) -> list[Publisher]:
    def describe(change: Any) -> Any:
        return news.of_change(change, clock.now())

    return [
        Publisher(store, bus, keys.JOBS, describe, name="scheduler-jobs", leader=leader, clock=clock),
        Publisher(store, bus, keys.QUEUES, describe, name="scheduler-queues", leader=leader, clock=clock),
    ]
