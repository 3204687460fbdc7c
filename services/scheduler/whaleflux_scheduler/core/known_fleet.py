"""The fleet as news tells it, and what jobs hold in it: the placement engine with its holdings, and where room came since it was last asked.

`gained` are the nodes that may offer more than before. Whoever was refused need not be tried again while none of them could help it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from typing import TypeVar

from whaleflux.errors import InvalidArgument
from whaleflux.fleet.model import Level, Node
from whaleflux_scheduler.core.capacity import Capacity
from whaleflux_scheduler.core.devices import Gpus
from whaleflux_scheduler.core.holdings import Holdings
from whaleflux_scheduler.core.model import Claim, Job
from whaleflux_scheduler.core.needs import Need, NeedIndex
from whaleflux_scheduler.core.placement.api import DatasetFact, PlaceRequest
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.queue_shares import QueueShares

T = TypeVar("T")
NOT_LISTED, NOT_CONNECTED = "not in the inventory", "its agent is not connected"
HEALTH_UNKNOWN = "health_monitor has not told whether it is healthy"
PASSING = frozenset({NOT_LISTED, NOT_CONNECTED, HEALTH_UNKNOWN, "suspect"})
"""Why a node takes no work where that is decided soon, as of most nodes of a new leader: it takes some again, or it is lost."""
_MANY = 16  # nodes; with more, one of them nearly always could
log = logging.getLogger(__name__)


class KnownFleet:
    """See the module."""

    def __init__(self, shares: QueueShares) -> None:
        self.engine = Engine()
        self.holdings, self.capacity = Holdings(self.engine, shares), Capacity()
        self.left_out: set[str] = set()  # nodes whose facts placement cannot take
        self._lasting: set[str] = set()  # nodes that are closed, or gone, and not expected back
        self.gained: dict[str, None] = {}  # in the order in which they did
        self.gained_from = (
            -math.inf
        )  # the highest priority of what left there; infinite: nothing that others could have stopped
        self.version = 0  # grows with whatever could change an answer
        self.room_version = 0  # the same, without jobs that hold nothing and held nothing
        self.facts_version = 0  # grows with the nodes, what they have, and whether they take work
        self._why_closed: dict[str, str] = {}
        self._hopes: dict[str, None] = {}  # nodes that gained, until all who could use that were tried
        self._free: dict[
            tuple[str, Level], int
        ] = {}  # the most free devices of a model in a domain of a level, of the hopes

    @property
    def size(self) -> int:
        """Nodes that are known."""
        return len(self.holdings.devices.nodes)

    # news

    def upsert(self, node: Node) -> None:
        """A node's facts as they are now."""
        devices = self.holdings.devices
        if devices.nodes.get(node.name) == node:
            return
        try:
            affected = self.holdings.report(node)
            self.capacity.upsert(node)
        except InvalidArgument as strange:  # inventory checks facts; what it let through must not stop the others
            log.error("%s is left out: %s", node.name, strange)
            self.left_out.add(node.name)
            return
        self.left_out.discard(node.name)
        self.facts_version += 1
        if node.name not in devices.open:
            self.engine.set_schedulable(node.name, False, "not ready yet")
        self._changed(affected)

    def remove(self, name: str) -> None:
        """The node is gone; a GPU that it reported too may be offered by another now."""
        self.left_out.discard(name)
        self._lasting.discard(name)
        if self.holdings.jobs_on(name):  # of others nobody asks
            self._lasting.add(name)
        self._why_closed.pop(name, None)
        if name in self.holdings.devices.nodes:
            self.facts_version += 1
            self.capacity.remove(name)
            self._changed(self.holdings.remove(name))
            self.gained.pop(name, None)

    def close(self, name: str, why: str) -> None:
        """Why the node takes no new work; "": it does."""
        if name in self.holdings.devices.nodes:
            (self._lasting.add if why and why not in PASSING else self._lasting.discard)(name)
            self.facts_version += self._why_closed.get(name) != why
            self._why_closed[name] = why
            self.capacity.close(self.holdings.devices.nodes[name], why)
            self._changed(self.holdings.close(name, why))

    def may_open(self, name: str) -> bool:
        """Whether the node takes no work now, and is expected to: nobody has told of it yet, or what keeps it closed passes."""
        return name not in self.holdings.devices.open and name not in self._lasting

    def know_dataset(self, fact: DatasetFact) -> set[str]:
        """Returns the nodes where the room for others changed."""
        self._changed(())
        return self.engine.upsert_dataset(fact)

    def forget_dataset(self, name: str) -> set[str]:
        """Returns the same."""
        self._changed(())
        return self.engine.remove_dataset(name)

    # what jobs hold

    def learn(self, job: Job) -> None:
        """The job as it is stored."""
        before = self.holdings.jobs.get(job.name)
        stoppable = before is not None and before.may_be_suspended
        if before is not None and (before.claim is not None or self.holdings.claimants_on(job.name)):
            stoppable = False  # to stop it would have given others nothing, or not all of it
        priority = before.spec.priority if before is not None and stoppable else math.inf
        held = self.holdings.holds(job.name)
        gained = self.holdings.learn(job)
        if held or gained or self.holdings.holds(job.name):
            self._changed(gained, priority)
        else:
            self.version += 1

    def forget(self, job: str) -> None:
        """The job's record is gone."""
        self._changed(self.holdings.forget(job))

    def hold(self, job: Job, held: Gpus, claim: Claim | None = None, remote: Collection[str] | None = None) -> None:
        """What was decided for the job; `remote`: data that is not pulled for it."""
        self._changed(self.holdings.hold(job, held, claim, remote))

    def _changed(self, gained: Iterable[str], priority: float = math.inf) -> None:
        self.version += 1
        self.room_version += 1
        self._free.clear()
        for name in gained:
            self.gained[name] = None
            self.gained_from = max(self.gained_from, priority)

    # what the gain is worth

    def take_gains(self, needs: NeedIndex[T], lent: int) -> list[T]:
        """Whom the nodes that gained since the last time could help, if `lent` GPUs more may be used that are kept for later."""
        if not self.gained:
            return []
        rows = self.engine.nodes
        models = {model for name in self.gained if name in rows for model in rows[name].shape.model_names}
        self._hopes |= self.gained
        self.gained.clear()
        self.gained_from = -math.inf
        self._free.clear()
        return list(needs.admissible(models, lambda model, level: self._most_free(model, level) + lent))

    def nobody_waits(self) -> None:
        """What nodes gained is of use to nobody now; whoever comes is tried all the same."""
        self.gained.clear()
        self.gained_from = -math.inf

    def give_up(self) -> None:
        """Nobody hopes for what was gained any more."""
        self._hopes.clear()

    @property
    def any_hope(self) -> bool:
        """Whether nodes that gained have a free device still."""
        return self._most_free("", Level.NODE) > 0

    def could_hold(self, need: Need, lent: int = 0) -> bool:
        """Whether what was gained, as it is now, could be enough, with `lent` GPUs that are kept for later."""
        return any(self._most_free(model, need.level) + lent >= need.gpus for model in need.models)

    def could_place(self, need: Need, request: PlaceRequest, lent: int = 0) -> bool:
        """As `could_hold`, and whether any of it could be of use to the request, which is not asked of each node of many."""
        if not self.could_hold(need, lent):
            return False
        return len(self._hopes) > _MANY or lent > 0 or any(self.engine.could_use(name, request) for name in self._hopes)

    def _most_free(self, model: str, level: Level) -> int:
        found = self._free.get((model, level))
        if found is None:
            found = self._free[model, level] = self.engine.most_free(self._hopes, model, level)
        return found
