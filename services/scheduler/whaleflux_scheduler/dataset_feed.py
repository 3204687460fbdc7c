"""What placement is told of datasets: all of them again and again, and at once when a job names one that nobody has told of yet.

Inventory offers no watch of datasets; where copies are changes slowly. The size of a new one counts from its first job on (room, quotas): that job
is looked at again when inventory was asked, or did not answer for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.v1 import inventory_pb2
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_scheduler.core.placement.api import DatasetFact

EVERY_S, PAUSE_S = 30.0, 0.5  # between two looks, and at least
WAIT_S = 2.0  # for a dataset that is not known
MOST_AWAITED = 10_000

Tell = Callable[[Sequence[DatasetFact], Sequence[str]], None]
"""Datasets that changed, and names of those that are gone."""


class DatasetFeed:
    """See the module. `inventory` None: nothing is told, and nothing waited for."""

    def __init__(self, inventory: InventoryServiceStub | None, clock: Clock) -> None:
        self._inventory, self._clock = inventory, clock
        self._known: dict[str, DatasetFact] = {}
        self._awaited: dict[str, float] = {}  # since when, by name
        self._looked_s = float("-inf")  # when the last look began that was answered
        self._asked = asyncio.Event()

    def knows(self, datasets: Collection[str]) -> bool:
        """Whether there is nothing more to learn of these for now; else they are asked for at once."""
        missing = [name for name in datasets if name not in self._known]
        if not missing or self._inventory is None:
            return True
        now_s = self._clock.monotonic()
        if len(self._awaited) > MOST_AWAITED:
            self._awaited.clear()
        since_s = max(self._awaited.setdefault(name, now_s) for name in missing)
        if self._looked_s >= since_s or now_s - since_s >= WAIT_S:
            return True
        self._asked.set()
        return False

    async def run(self, tell: Tell) -> None:
        """Sizes and copies of datasets, as far as they differ from the last look."""
        assert self._inventory is not None
        while True:
            self._asked.clear()
            begun_s = self._clock.monotonic()
            with contextlib.suppress(StatusError):  # asked again soon; placement knows what was last reported
                facts = await _datasets(self._inventory, self._known, self._clock.now())
                changed = tuple(fact for name, fact in facts.items() if self._known.get(name) != fact)
                gone = tuple(self._known.keys() - facts.keys())
                self._known, self._looked_s = facts, begun_s
                self._awaited = {name: at_s for name, at_s in self._awaited.items() if name not in facts}
                if changed or gone:
                    tell(changed, gone)
            await self._clock.sleep(PAUSE_S)
            await self._asked_or(EVERY_S - PAUSE_S)

    async def _asked_or(self, longest_s: float) -> None:
        waiting = {asyncio.create_task(self._asked.wait()), asyncio.create_task(self._sleep(longest_s))}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    async def _sleep(self, longest_s: float) -> bool:
        await self._clock.sleep(longest_s)
        return True


_WHOLE = (inventory_pb2.DATASET_COPY_STATE_UNSPECIFIED, inventory_pb2.DATASET_COPY_STATE_READY)


def dataset_fact(dataset: inventory_pb2.Dataset, now: datetime) -> DatasetFact:
    """What placement knows of it: where it is whole, and where its room is taken for good (pins that have not ended, tasks that read it)."""
    whole = [c for c in dataset.copies if c.state in _WHOLE and c.present_bytes >= dataset.size_bytes]
    pins = [p for p in dataset.pins if not p.HasField("expire_time") or p.expire_time.ToDatetime(UTC) > now]
    held = {*(p.node for p in pins if not p.queue), *(copy.node for copy in whole if copy.pinned)}
    charged = sorted((names.last(p.queue), p.node) for p in pins if p.queue)
    return DatasetFact(
        dataset.name,
        dataset.size_bytes,
        tuple(c.node for c in whole),
        held_on=tuple(sorted(held)),
        charged_on=tuple(charged),
        for_tasks_only=dataset.HasField("credentials"),
    )


async def _datasets(
    inventory: InventoryServiceStub, known: Mapping[str, DatasetFact], now: datetime
) -> dict[str, DatasetFact]:
    """By name; those whose record cannot be read stay as they are known."""
    facts: dict[str, DatasetFact] = {}
    token, more = "", True
    while more:
        request = inventory_pb2.ListDatasetsRequest(page_size=500, page_token=token)
        page = await inventory.ListDatasets(request, timeout=10.0)
        for dataset in page.datasets:
            facts[dataset.name] = dataset_fact(dataset, now)
        facts |= {name: known[name] for name in page.unreadable if name in known}
        token = page.next_page_token
        more = bool(token)
    return facts
