"""Puts the parts together, the same way for the service, for tests and for benchmarks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.code.api import CodeStore
from whaleflux.events.api import Bus
from whaleflux.events.publisher import Publisher
from whaleflux.planning.calibration import Calibrated
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.store.batching import GroupCommit
from whaleflux.store.cache import Cache
from whaleflux.store.election import Leader, lead
from whaleflux.v1.agent_pb2_grpc import add_TaskServiceServicer_to_server
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux.v1.health_pb2_grpc import HealthServiceStub
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.scheduler_pb2_grpc import add_SchedulerServiceServicer_to_server
from whaleflux.v1.secrets_pb2_grpc import SecretServiceStub
from whaleflux_scheduler import convert, news, placements
from whaleflux_scheduler.agent_sessions import AgentSessions
from whaleflux_scheduler.attach import AttachBroker
from whaleflux_scheduler.budget_stops import BudgetStops
from whaleflux_scheduler.bursts import Bursts, BurstSettings
from whaleflux_scheduler.code_collection import CodeCollection
from whaleflux_scheduler.code_transfer import CodeTransfer
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.observed import Timeouts
from whaleflux_scheduler.core.promise_lines import PromiseRules
from whaleflux_scheduler.core.queue_shares import HALF_LIFE_S
from whaleflux_scheduler.core.soon_over import MOST_S
from whaleflux_scheduler.dataset_feed import DatasetFeed
from whaleflux_scheduler.dataset_readers import DatasetReaders, Known
from whaleflux_scheduler.diagnosis import FailureDiagnosis
from whaleflux_scheduler.fleet_sites import FleetSites
from whaleflux_scheduler.idle_memory import IdleMemory
from whaleflux_scheduler.job_access import JobAccess
from whaleflux_scheduler.job_history import JobHistory
from whaleflux_scheduler.job_secrets import JobSecrets
from whaleflux_scheduler.job_sight import Sources
from whaleflux_scheduler.jobs import Jobs
from whaleflux_scheduler.leader_session import ELECTION, LeaderSession, Leading, not_leader
from whaleflux_scheduler.logs import LogBroker
from whaleflux_scheduler.news_beside import NewsBeside
from whaleflux_scheduler.node_view import NodeView
from whaleflux_scheduler.prepared_plan import PreparedPlan
from whaleflux_scheduler.ray_loop import RayLoop
from whaleflux_scheduler.ray_plans import RayPlans
from whaleflux_scheduler.ray_records import RAY_CLUSTERS
from whaleflux_scheduler.rebalances import Rebalances, RebalanceSettings
from whaleflux_scheduler.reconciler import Reconciler
from whaleflux_scheduler.reservation_records import RESERVATIONS
from whaleflux_scheduler.saved_checkpoints import SavedCheckpoints, could_make_room
from whaleflux_scheduler.servicer import Scheduler
from whaleflux_scheduler.serving_plans import ServingPlans
from whaleflux_scheduler.session_news import SessionNews
from whaleflux_scheduler.steady_clock import SteadyClock
from whaleflux_scheduler.submit import Submissions
from whaleflux_scheduler.task_servicer import Tasks
from whaleflux_scheduler.training_plans import TrainingPlans

_log = telemetry.get_logger("whaleflux.scheduler")


@dataclass(frozen=True, slots=True)
class Peers:
    """The services that the scheduler asks; None: not there."""

    inventory: InventoryServiceStub | None = None
    health: HealthServiceStub | None = None
    checkpoint: CheckpointServiceStub | None = None
    secrets: SecretServiceStub | None = None  # inventory's, too

    @classmethod
    def dial(cls, inventory: Any, health: Any, checkpoint: Any) -> Self:
        """From channels (`whaleflux.rpc.channel`), or None where there is none."""
        return cls(
            InventoryServiceStub(inventory) if inventory else None,
            HealthServiceStub(health) if health else None,
            CheckpointServiceStub(checkpoint) if checkpoint else None,
            SecretServiceStub(inventory) if inventory else None,
        )


Loop = Callable[[], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class Service:
    """The assembled scheduler: run `loops`, serve `servicers`."""

    servicers: Sequence[tuple[Callable[[Any, Any], None], Any, str]]
    loops: Sequence[Loop]
    ready: Callable[[], bool]
    leader_session: LeaderSession
    sessions: AgentSessions
    jobs: Jobs
    nodes: NodeView


def assemble(
    store: Store,
    bus: Bus | None,
    clock: Clock,
    peers: Peers,
    timeouts: Timeouts,
    address: str,
    keep_ended: int = 10_000,
    code: CodeStore | None = None,
    code_grace_s: float = 7 * 86_400.0,
    queue_half_life_s: float = HALF_LIFE_S,
    *,
    promises: PromiseRules | None = None,
    rebalancing: RebalanceSettings | None = None,
    let_end_s: float = MOST_S,
    bursting: BurstSettings | None = None,
    people: Known | None = None,
    measured: Mapping[str, Mapping[str, Calibrated]] | None = None,
) -> Service:
    """`address` is told to callers who ask a follower; `code` None: jobs bring none. `people`: who records name, with the groups of today."""
    moving = rebalancing or RebalanceSettings()
    batched = GroupCommit(store, in_flight=1)  # fewer, larger transactions cost this process less than they delay
    jobs_cache = Cache(store, keys.JOBS, convert.JOBS.decode, stand_in=convert.unreadable_job)
    queues_cache = Cache(store, keys.QUEUES, convert.QUEUES.decode)
    reservations_cache = Cache(store, keys.RESERVATIONS, RESERVATIONS.decode)
    ray_cache, plans = Cache(store, keys.RAY_CLUSTERS, RAY_CLUSTERS.decode), RayPlans()
    sessions, leader_session, jobs = (
        AgentSessions(),
        LeaderSession(store),
        Jobs(store, jobs_cache, JobAccess(store, queues_cache, reservations_cache)),
    )
    broker, attaching = LogBroker(sessions), AttachBroker(sessions, clock, SessionNews(bus, clock))
    secrets = JobSecrets(jobs, peers.secrets, peers.inventory)
    submissions = Submissions(batched, clock, peers.inventory, jobs.access, secrets)
    transfer, history = CodeTransfer(code, jobs), JobHistory(bus, jobs, clock)
    scheduler = Scheduler(
        batched,
        jobs,
        submissions,
        leader_session,
        broker,
        attaching,
        transfer,
        clock,
        history,
        plans,
        TrainingPlans(measured),
        ServingPlans(),
        FleetSites(peers.inventory),
    )
    tasks = Tasks(leader_session, broker, attaching, secrets, DatasetReaders(jobs, submissions.who_may_use, people))
    nodes = NodeView(sessions.connected, monitored=peers.health is not None)
    stops = BudgetStops(store, nodes)
    prepared = PreparedPlan(nodes, clock, queue_half_life_s, rules=moving.rules, promises=promises, let_end_s=let_end_s)
    service = Service(
        servicers=[
            (add_SchedulerServiceServicer_to_server, scheduler, "whaleflux.v1.SchedulerService"),
            (add_TaskServiceServicer_to_server, tasks, "whaleflux.v1.TaskService"),
        ],
        loops=[],
        ready=lambda: jobs_cache.revision > 0,
        leader_session=leader_session,
        sessions=sessions,
        jobs=jobs,
        nodes=nodes,
    )

    async def decide(leader: Leader) -> None:
        """One leadership: everything that it remembers ends with it."""
        newest = await store.list(keys.JOBS, limit=1)
        caches = jobs_cache, queues_cache, reservations_cache, ray_cache, stops.records
        await asyncio.gather(*(one.at_least(newest.revision, timeout_s=30.0, asks_after_s=0.0) for one in caches))
        plan, steady = prepared.take(), SteadyClock(clock)
        diagnosis = FailureDiagnosis(peers.health, peers.checkpoint, clock)
        sources = Sources(jobs_cache, queues_cache, reservations_cache)
        feed = DatasetFeed(peers.inventory, clock)
        publishers = _publishers(store, bus, leader, clock) if bus is not None else []
        reconciler = Reconciler(
            batched,
            leader,
            sources,
            sessions,
            nodes,
            diagnosis,
            steady,
            timeouts,
            stops,
            keep_ended=keep_ended,
            told=lambda: publishers[0].revision if publishers else math.inf,
            plan=plan,
            data_known=feed.knows,
            checkpoint=peers.checkpoint,
            measured=measured,
        )
        planner, view, told = reconciler.planner, reconciler.view, NewsBeside(bus, clock)
        rebalances = Rebalances(moving.mode, planner, view.caught_up, reconciler.order, told, steady)
        memory = IdleMemory(store, leader.held)
        bursts = Bursts(
            bursting or BurstSettings("off"), planner, view.caught_up, peers.inventory, told, steady, memory
        )
        ray = RayLoop(batched, leader, ray_cache, jobs_cache, plans, planner, view.caught_up, sessions.tell, steady)
        reconciler.agents.ray = ray.take
        reconciler.load()
        leader_session.begin(Leading(reconciler.agents, view, planner, rebalances, bursts, ray))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(reconciler.run())
                group.create_task(rebalances.run())
                group.create_task(bursts.run())
                group.create_task(ray.run())
                group.create_task(placements.complete(batched, leader, list(jobs_cache.values.values())))
                if peers.inventory is not None:
                    group.create_task(feed.run(reconciler.datasets_are))
                if peers.checkpoint is not None:
                    group.create_task(_follow_checkpoints(reconciler, peers.checkpoint, jobs_cache, clock).run())
                if code is not None:
                    group.create_task(CodeCollection(code, jobs_cache, clock, code_grace_s).run())
                for publisher in publishers:
                    group.create_task(publisher.run())
        finally:
            leader_session.end()
            prepared.give_back()
            sessions.close(not_leader())
            broker.end(not_leader())
            attaching.end()

    async def run() -> None:
        """Who follows knows the nodes already when it is to lead."""
        async with jobs_cache, queues_cache, reservations_cache, ray_cache, stops.records, asyncio.TaskGroup() as group:
            feeds = [group.create_task(feed()) for feed in (*_feeds(nodes, peers), prepared.run)]
            await lead(store, ELECTION, address, decide)
            for feed in feeds:
                feed.cancel()

    service.loops = [run]
    return service


def _feeds(nodes: NodeView, peers: Peers) -> list[Loop]:
    feeds: list[Loop] = []
    if peers.inventory is not None:
        inventory = peers.inventory
        feeds.append(lambda: nodes.follow_inventory(inventory))
    if peers.health is not None:
        health = peers.health
        feeds.append(lambda: nodes.follow_health(health))
    return feeds


def _follow_checkpoints(
    reconciler: Reconciler, checkpoint: CheckpointServiceStub, jobs: Cache[StoredJob], clock: Clock
) -> SavedCheckpoints:
    def running() -> list[str]:
        return could_make_room(stored.value for stored in jobs.values.values())

    return SavedCheckpoints(reconciler.saved, checkpoint, running, clock)


def _publishers(store: Store, bus: Bus, leader: Leader, clock: Clock) -> list[Publisher]:
    """Jobs' first, then those of the rest."""

    def describe(change: Any) -> Any:
        return news.of_change(change, clock.now())

    return [
        Publisher(store, bus, keys.JOBS, describe, name="scheduler-jobs", leader=leader, clock=clock),
        Publisher(store, bus, keys.QUEUES, describe, name="scheduler-queues", leader=leader, clock=clock),
        Publisher(store, bus, keys.RESERVATIONS, describe, name="scheduler-reservations", leader=leader, clock=clock),
        Publisher(store, bus, keys.RAY_CLUSTERS, describe, name="scheduler-ray-clusters", leader=leader, clock=clock),
    ]
