"""Whether this replica leads, and what serves its callers while it does."""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux.errors import Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.store.api import Store
from whaleflux.store.election import leader_of
from whaleflux_scheduler.agents import Agents
from whaleflux_scheduler.job_view import JobView
from whaleflux_scheduler.planner_thread import PlannerThread
from whaleflux_scheduler.rebalances import Rebalances

ELECTION = "scheduler"


@dataclass(frozen=True, slots=True)
class Leading:
    """What exists only while this replica leads."""

    agents: Agents
    view: JobView
    planner: PlannerThread
    rebalances: Rebalances


class LeaderSession:
    """Shared by the loop that leads and the servicers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._current: Leading | None = None

    @property
    def current(self) -> Leading | None:
        """None: this replica follows."""
        return self._current

    def begin(self, leading: Leading) -> None:
        """From now on callers are served."""
        self._current = leading

    def end(self) -> None:
        self._current = None

    async def leading(self) -> Leading:
        """Raises Unavailable with NOT_LEADER where this replica follows."""
        if self._current is None:
            raise not_leader(await leader_of(self._store, ELECTION))
        return self._current


def not_leader(leader: str = "") -> Unavailable:
    """What a follower answers for what only the leader can do."""
    hint = f"; the leader is {leader}" if leader else "; a leader is being elected"
    return Unavailable(
        f"this scheduler does not lead{hint}",
        reason=ErrorReason.NOT_LEADER,
        metadata={"leader": leader},
        retry_after_s=0.2,
    )
