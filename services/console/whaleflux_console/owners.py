"""Follows what inventory, health_monitor and scheduler say, into the chronicle: who is there, who has it, who waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import InvalidArgument, StatusError, Unavailable
from whaleflux.rpc.watching import follow
from whaleflux.telemetry import Event
from whaleflux.v1 import health_pb2, inventory_pb2, router_pb2, scheduler_pb2
from whaleflux_console import convert
from whaleflux_console.core.chronicle import Chronicle, JobFacts
from whaleflux_console.core.facts import HOUR_MS, Facts
from whaleflux_console.core.fragmentation import WaitingGang, fragmented
from whaleflux_console.peers import Peers
from whaleflux_console.saves import Saves

_log = telemetry.get_logger("whaleflux.console.owners")
_MODELS_EVERY_S = 60.0
_SAVES_EVERY_S = 2.0
_CALL_S = 20.0
_REPLICAS = 200  # of a page: each engine is asked for what it served
_LISTING_S = 60.0
_BACKFILL_MS = 7 * 86_400_000  # of a fleet that had no ledger before


class Owners:
    """`ready` is set when all have said once what there is: until then nothing that is not known is taken for gone."""

    def __init__(self, peers: Peers, saves: Saves, chronicle: Chronicle, clock: Clock) -> None:
        self._peers, self._saves, self._chronicle, self._clock = peers, saves, chronicle, clock
        self._nodes: dict[str, inventory_pb2.Node] = {}
        self._health: dict[str, health_pb2.NodeHealth] = {}
        self._waiting: dict[str, WaitingGang] = {}
        self._models: dict[str, str] = {}  # job -> the model that it serves
        self._services: dict[str, scheduler_pb2.Job] = {}  # jobs that serve, while they hold something
        self._told: set[str] = set()
        self.ready = asyncio.Event()

    def now_ms(self) -> int:
        """By this process' clock."""
        return round(self._clock.now().timestamp() * 1000)

    async def run(self) -> None:
        """For ever."""
        inventory, health = self._peers.inventory, self._peers.health
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_models())
            group.create_task(self._look_up_saves())
            group.create_task(
                self._follow(
                    "health_monitor",
                    lambda since: health.WatchNodeHealth(health_pb2.WatchNodeHealthRequest(resource_version=since)),
                    self._take_health,
                )
            )
            group.create_task(
                self._follow(
                    "inventory",
                    lambda since: inventory.WatchNodes(inventory_pb2.WatchNodesRequest(resource_version=since)),
                    self._take_node,
                )
            )
            group.create_task(self._follow("scheduler", self._watch_jobs, self._take_job))

    async def know(self, hour_ms: int) -> Facts:
        """All that they know now of an hour: what is there, and every job that still has a record. Raises Unavailable."""
        jobs: list[JobFacts] = []
        try:
            async with asyncio.timeout(_LISTING_S):
                async for change in follow(self._watch_jobs, clock=self._clock):
                    if change.value is not None:
                        jobs.append(convert.job_facts(change.value, self._models.get(change.name, ""), self.now_ms()))
                    if change.synced:
                        break
        except TimeoutError:
            raise Unavailable(
                "the scheduler did not list its jobs: an hour's facts are asked for again later"
            ) from None
        saved = [self._saves.known(job) for job in jobs if job.touches(hour_ms, hour_ms + HOUR_MS)]
        return await asyncio.to_thread(self._chronicle.copied().known_of, hour_ms, saved, self.now_ms())

    def _watch_jobs(self, since: int) -> AsyncIterator[Any]:
        return self._peers.scheduler.WatchJobs(scheduler_pb2.WatchJobsRequest(resource_version=since))  # type: ignore[no-any-return]

    def note_fragments(self) -> None:
        """What is free and of no use to those that wait, from now on."""
        now_ms = self.now_ms()
        found = fragmented(self._chronicle.devices(), self._chronicle.held(), list(self._waiting.values()))
        self._chronicle.fragmented(found, now_ms)

    async def _follow(
        self, feed: str, open_watch: Callable[[int], AsyncIterator[Any]], take: Callable[[str, Any], None]
    ) -> None:
        def failure(error: StatusError) -> None:
            _log.info(Event.FEED_BROKEN, feed=feed, reason=error.reason)

        async for change in follow(open_watch, clock=self._clock, on_broken=failure):
            if change.name:
                take(change.name, change.value)
            if change.synced:
                if feed == "inventory":
                    self._chronicle.nodes_are(self._nodes, self.now_ms())
                self._told.add(feed)
                if len(self._told) == 3:
                    self.ready.set()

    def _take_node(self, name: str, node: inventory_pb2.Node | None) -> None:
        if node is None or node.intent == inventory_pb2.NODE_INTENT_RETIRED:
            self._nodes.pop(name, None)
            self._chronicle.node(name, (), None, self.now_ms(), self.now_ms())
            return
        self._nodes[name] = node
        self._tell_node(name)

    def _take_health(self, name: str, health: health_pb2.NodeHealth | None) -> None:
        if health is None:
            self._health.pop(name, None)
        else:
            self._health[name] = health
        if name in self._nodes:
            self._tell_node(name)

    def _tell_node(self, name: str) -> None:
        node, now_ms = self._nodes[name], self.now_ms()
        try:
            devices = convert.devices_of(node, self._health.get(name))
        except InvalidArgument as strange:  # what cannot be read stays as it was known
            _log.error(Event.FEED_BROKEN, feed="inventory", node=name, reason=str(strange))
            return
        since_ms = max(convert.millis(node, "create_time") or now_ms, now_ms - _BACKFILL_MS)
        self._chronicle.node(name, devices, convert.node_price_of(node), now_ms, since_ms)

    def _take_job(self, name: str, job: scheduler_pb2.Job | None) -> None:
        self._waiting.pop(name, None)
        self._services.pop(name, None)
        if job is None:
            self._chronicle.job_gone(name, self.now_ms())
            return
        if (gang := convert.waiting_gang(job)) is not None:
            self._waiting[name] = gang
        if job.spec.kind == scheduler_pb2.JOB_KIND_SERVICE and not job.HasField("end_time"):
            self._services[name] = job
        self._chronicle.job(self._facts_of(job))

    def _facts_of(self, job: scheduler_pb2.Job) -> JobFacts:
        facts = convert.job_facts(job, self._models.get(job.name, ""), self.now_ms())
        return self._saves.known(facts) if self._chronicle.is_news(facts) else facts

    async def _look_up_saves(self) -> None:
        """What jobs that failed had saved, which tells what was lost."""
        while True:
            for facts in await self._saves.look_up():
                self._chronicle.job(facts)
            await self._clock.sleep(_SAVES_EVERY_S)

    async def _follow_models(self) -> None:
        """Which job serves which model, and how much; counters of engines are in no watch."""
        while True:
            try:
                replicas = [one async for one in self._replicas() if one.job]
            except StatusError as error:
                _log.info(Event.FEED_BROKEN, feed="inference_router", reason=error.reason)
            else:
                found = {one.job: one.name.rpartition("/replicas/")[0] for one in replicas}
                before, self._models = self._models, found
                self._take_served(replicas)
                for name, job in list(self._services.items()):
                    if found.get(name) != before.get(name):
                        self._chronicle.job(self._facts_of(job))
            await self._clock.sleep(_MODELS_EVERY_S)

    def _take_served(self, replicas: Iterable[router_pb2.Replica]) -> None:
        for one in replicas:
            counters, job = convert.counters_of(one), self._services.get(one.job)
            if counters is not None and job is not None and job.HasField("attempt"):
                began_ms = convert.millis(job.attempt, "allocate_time") or 0
                self._chronicle.served(job.uid, job.attempt.number, counters, self.now_ms(), began_ms)

    async def _replicas(self) -> AsyncIterator[router_pb2.Replica]:
        token = ""
        while True:
            request = router_pb2.ListReplicasRequest(
                parent="models/-", page_size=_REPLICAS, page_token=token, with_served_tokens=True
            )
            page = await self._peers.router.ListReplicas(request, timeout=_CALL_S)
            for one in page.replicas:
                yield one
            token = page.next_page_token
            if not token:
                return
