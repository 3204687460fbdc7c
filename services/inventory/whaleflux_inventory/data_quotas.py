"""Data quotas of queues, as far as pins are concerned: whose quota counts one, and what that queue holds already.

Queues are the scheduler's: their limits are read from their records, and what they hold is asked of it, where there is a limit. The scheduler hears of
pins with some delay, so that those of the last while are counted beside what it says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta

from google.protobuf.message import DecodeError

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Store
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux.v1 import scheduler_pb2
from whaleflux_inventory.core.data_quota import QueueQuota, below, chain, check

HEARD = timedelta(seconds=35)  # until the scheduler has heard of a pin: it asks each 30 s
HeldBytes = Callable[[str], Awaitable[int]]
"""Bytes of data that a queue holds on nodes, as the scheduler counts it. Raises Unavailable where that is not known."""


async def nothing_held(queue: str) -> int:
    """What an inventory without a scheduler says."""
    return 0


class DataQuotas:
    """See the module."""

    def __init__(self, store: Store, queue_access: Callable[[str], Access], held_bytes: HeldBytes) -> None:
        self._store, self._queue_access, self._held_bytes = store, queue_access, held_bytes

    def charged(self, queue: str) -> str:
        """The queue that a pin of the caller is charged to. Raises InvalidArgument for one that is not there for them."""
        name = queue or names.DEFAULT_QUEUE
        names.split(name, "queues", field="queue")
        if not ownership.may_use(auth.principal(), names.last(name), self._queue_access(names.last(name))):
            raise InvalidArgument(
                FieldViolation(
                    "queue", f"{name} is no queue to which you may submit; list yours with: whaleflux queue ls"
                )
            )
        return name

    async def check(
        self, queue: str, more_bytes: int, datasets: Iterable[pb.Dataset], now: datetime, dataset: str
    ) -> None:
        """Raises FailedPrecondition when so much more would be beyond a quota, InvalidArgument where there is no such queue.

        `datasets` are all that there are.
        """
        queues = await self._queues()
        if queue not in queues and queue != names.DEFAULT_QUEUE:
            raise InvalidArgument(
                FieldViolation("queue", f"{queue} does not exist; list those that do with: whaleflux queue ls")
            )
        limited = [one for one in chain(queues, queue) if one.most_bytes]
        if not limited or not more_bytes:
            return
        lately = list(_lately(datasets, now))
        for one in limited:
            held = await self._held_bytes(one.name) + below(queues, one.name, lately)
            check(one, held, more_bytes, dataset)

    async def _queues(self) -> dict[str, QueueQuota]:
        """By name; what cannot be read limits nobody here, and the scheduler gives it nothing."""
        found = {}
        for entry in (await self._store.list(keys.QUEUES)).entries:
            try:
                queue = scheduler_pb2.Queue.FromString(entry.value)
            except DecodeError:
                queue = scheduler_pb2.Queue(name=keys.name_of(entry.key))
            found[queue.name] = QueueQuota(queue.name, queue.parent, queue.data_quota_bytes)
        return found


def _lately(datasets: Iterable[pb.Dataset], now: datetime) -> Iterable[tuple[str, int]]:
    """What was pinned within the last while: queue and bytes."""
    for dataset in datasets:
        for pin in dataset.pins:
            if pin.queue and pin.HasField("create_time") and pin.create_time.ToDatetime(UTC) + HEARD > now:
                yield pin.queue, dataset.size_bytes
