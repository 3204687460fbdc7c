"""Whether this replica leads, and what serves its callers while it does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from whaleflux.errors import Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.store.api import Store
from whaleflux.store.election import leader_of
from whaleflux_scheduler.agents import Agents
from whaleflux_scheduler.bursts import Bursts
from whaleflux_scheduler.job_view import JobView
from whaleflux_scheduler.planner_thread import PlannerThread
from whaleflux_scheduler.ray_loop import RayLoop
from whaleflux_scheduler.rebalances import Rebalances

ELECTION = "scheduler"
ASKED_AGAIN_S = 0.2  # who leads


@dataclass(frozen=True, slots=True)
class Leading:
    """What exists only while this replica leads."""

    agents: Agents
    view: JobView
    planner: PlannerThread
    rebalances: Rebalances
    bursts: Bursts
    ray: RayLoop


class LeaderSession:
    """Shared by the loop that leads and the servicers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._current: Leading | None = None
        self._leader, self._ask_again_s = "", 0.0

    @property
    def current(self) -> Leading | None:
        """None: this replica follows."""
        return self._current

    def begin(self, leading: Leading) -> None:
        """From now on callers are served."""
        self._current = leading

    def end(self) -> None:
        self._current, self._ask_again_s = None, 0.0

    async def leading(self) -> Leading:
        """Raises Unavailable with NOT_LEADER where this replica follows."""
        if self._current is None:
            raise not_leader(await self._who_leads())
        return self._current

    async def _who_leads(self) -> str:
        """Asked of the store now and then: when a leader is lost, all agents of a fleet look for the next one at once."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._ask_again_s:
            self._ask_again_s = now_s + ASKED_AGAIN_S
            self._leader = await leader_of(self._store, ELECTION)
        return self._leader


def not_leader(leader: str = "") -> Unavailable:
    """What a follower answers for what only the leader can do."""
    hint = f"; the leader is {leader}" if leader else "; a leader is being elected"
    return Unavailable(
        f"this scheduler does not lead{hint}",
        reason=ErrorReason.NOT_LEADER,
        metadata={"leader": leader},
        retry_after_s=0.2,
    )
