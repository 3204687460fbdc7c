"""Whether this replica leads, and its brain while it does."""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux.errors import Unavailable
from whaleflux.store.api import Store
from whaleflux.store.election import leader_of
from whaleflux_scheduler.brain import Brain

ELECTION = "scheduler"


@dataclass(slots=True)
class Term:
    """Shared by the loop that leads and the servicers."""

    store: Store
    brain: Brain | None = None

    async def leading(self) -> Brain:
        """The brain; refuses with NOT_LEADER where this replica follows."""
        if self.brain is None:
            leader = await leader_of(self.store, ELECTION)
            raise not_leader(leader)
        return self.brain


def not_leader(leader: str = "") -> Unavailable:
    """What a follower answers for what only the leader can do."""
    hint = f"; the leader is {leader}" if leader else "; a leader is being elected"
    return Unavailable(
        f"this scheduler does not lead{hint}", reason="NOT_LEADER", metadata={"leader": leader}, retry_after_s=0.2
    )
