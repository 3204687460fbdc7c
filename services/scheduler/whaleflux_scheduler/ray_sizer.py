"""How many workers a Ray cluster has: sized by what waits in it, as far as that is known, and its reader told what was decided.

What is decided: `core.ray_sizing`, `core.ray_leaving`, `core.ray_joining`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.telemetry import Metric
from whaleflux.v1 import agent_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import ray_sizing
from whaleflux_scheduler.core.ray_leaving import Idle, leaving
from whaleflux_scheduler.core.ray_parts import Part, Role
from whaleflux_scheduler.core.ray_sizing import Sizing
from whaleflux_scheduler.planner_thread import PlannerThread
from whaleflux_scheduler.ray_plans import RayPlans, unmet_of
from whaleflux_scheduler.ray_readings import Read, Reading
from whaleflux_scheduler.ray_records import StoredRayCluster
from whaleflux_scheduler.ray_status import said, why_none_are_started, why_unknown
from whaleflux_scheduler.ray_view import Known, RayView, failed
from whaleflux_scheduler.ray_writes import RayWrites

# Between sizings of a cluster: so many times what the last one took, so that others have their turn.
SIZE_APART_S, MOST_APART_S, OTHERS_SHARE = 0.2, 5.0, 4.0
ANEW_S = 5.0  # a cluster of which nothing changed is sized again: the fleet may have
LATER_S = 1.0  # the same where something waits that is to be had some time
MOST_STARTS = 16  # in one transaction; the next look goes on
MOST_LEAVING = 100  # workers that are told so at once
MOST_INFEASIBLE = 100  # shapes of which a reader is told
Tell = Callable[[str, agent_pb2.SyncResponse], bool]


class RaySizer:
    """`caught_up` returns when the planner knows what has come; `tell` sends to a node's agent; `look` asks for another look."""

    def __init__(
        self,
        view: RayView,
        writes: RayWrites,
        plans: RayPlans,
        planner: PlannerThread,
        caught_up: Callable[[], Awaitable[None]],
        tell: Tell,
        look: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._view, self._writes, self._plans, self._planner = view, writes, plans, planner
        self._caught_up, self._tell, self._look, self._clock = caught_up, tell, look, clock

    async def size(self, stored: StoredRayCluster, known: Known, reading: Reading | None) -> None:
        """Starts and ends workers; nothing where it is not known what waits."""
        if reading is None:
            known.message = why_unknown(self._view, stored, self._view.parts(known))
            return
        began_s = self._clock.monotonic()
        if began_s < known.size_again_s:
            asyncio.get_running_loop().call_later(known.size_again_s - began_s, self._look)  # it may be sized then
            return
        read = await reading.understand()
        if read is None:
            known.message = f"what waits cannot be read: {reading.wrong}"[:500]
            return
        parts, now_s = self._view.parts(known), self._clock.monotonic()
        ended = {part.job for part in parts if failed(part)} - reading.been
        known.joining.look(ended, frozenset(reading.been), now_s)
        known.leaving = await self._leaving(reading, read, parts)
        looked_at = (reading.epoch, reading.number, stored.entry.revision, tuple((p.job, p.state) for p in parts))
        later = any(not one.never for one in known.unmet)
        if looked_at == known.sized and now_s - known.sized_s < (LATER_S if later else ANEW_S):
            self._decide(known, reading, read, parts)
            return
        sizing = await self._sizing(stored, reading, read, parts)
        known.sized, known.sized_s = looked_at, now_s
        took_s = self._clock.monotonic() - began_s
        known.size_again_s = began_s + max(SIZE_APART_S, min(MOST_APART_S, took_s * OTHERS_SHARE))
        known.unmet = unmet_of(read.demand, sizing.plans)
        for end in sizing.end:
            await self._writes.end(end.job, end.why)
        await self._start(stored, known, reading, read, sizing)
        self._decide(known, reading, read, self._view.parts(known))

    async def _leaving(self, reading: Reading, read: Read, parts: Sequence[Part]) -> list[str]:
        """Workers that go before their time; none where the cluster is to hold something whatever runs."""
        since_s = self._clock.monotonic() - reading.came_s
        mine = {part.job: part.worker for part in parts if part.role is Role.WORKER and not part.ended}
        idle = [
            Idle(node.instance, mine[job].gpus, mine[job].gpu_type, node.idle_ms / 1000 + since_s)
            for node in read.demand.nodes
            if node.status == "IDLE" and (job := node.instance.rpartition("/")[0]) in mine
        ]
        if read.demand.constraints or not idle:
            return []
        return leaving(idle, await self._planner.ask(lambda plan: plan.gpus_wanted()))

    async def _sizing(self, stored: StoredRayCluster, reading: Reading, read: Read, parts: Sequence[Part]) -> Sizing:
        await self._caught_up()
        nodes, now = await self._planner.ask(lambda plan: plan.free_nodes()), self._clock.now()
        session = read.demand.session
        seen = reading.seen(read, [part.job for part in parts])
        seen = replace(seen, cluster=replace(seen.cluster, first=self._plans.first(session)))
        sizing = await self._plans.alone(lambda resize: ray_sizing.size(stored.value, seen, parts, nodes, now, resize))
        self._plans.remember(session, seen.cluster, sizing.plans)
        return sizing

    async def _start(
        self, stored: StoredRayCluster, known: Known, reading: Reading, read: Read, sizing: Sizing
    ) -> None:
        joins = pb.RayPart(address=self._view.address(stored, known), session=read.demand.session)
        known.message = said(sizing, stored.value.max_gpus, read)
        if not sizing.start or not joins.address:
            return
        if (left_s := known.joining.not_before_s - self._clock.monotonic()) > 0:
            known.message = why_none_are_started(self._view, known, left_s)
            return
        await self._writes.make(stored, known, Role.WORKER, sizing.start[:MOST_STARTS], joins)
        if not reading.answered:
            reading.answered = True
            telemetry.histogram(Metric.RAY_START_DELAY).observe(self._clock.monotonic() - reading.came_s)
        if len(sizing.start) > MOST_STARTS:
            self._look()

    def _decide(self, known: Known, reading: Reading, read: Read, parts: Sequence[Part]) -> None:
        """Tells the reader what was decided, when that is another than it was told."""
        decision = _decision(known, read, parts)
        content = json.dumps(decision | {"version": 0}, sort_keys=True).encode()
        if content == known.decided:
            return
        whole = json.dumps(decision).encode()
        number = int.from_bytes(hashlib.sha256(whole).digest()[:7]) or 1  # whoever leads: another decision has another
        message = agent_pb2.RayDecision(job=reading.job, epoch=reading.epoch, number=number, decision=whole)
        known.decided = content if self._tell(reading.node, agent_pb2.SyncResponse(ray=message)) else b""


def _decision(known: Known, read: Read, parts: Sequence[Part]) -> dict[str, Any]:
    """As a reader takes it: who is to leave, which workers come, and what is never to be had."""
    pending = Counter(
        p.worker.kind for p in parts if p.role is Role.WORKER and not p.ended and p.job not in read.instances
    )
    return {
        "leave": known.leaving[:MOST_LEAVING],
        "version": read.demand.version,
        "pending": [{"type": kind, "count": count} for kind, count in sorted(pending.items())],
        "infeasible": [
            {"resources": dict(one.bundle.resources), "count": min(one.count, 100)}
            for one in list(known.unmet)[:MOST_INFEASIBLE]
            if one.never
        ],
    }
