"""What inventory asks health_monitor and scheduler before a node may go for good."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from whaleflux.errors import FailedPrecondition, NotFound, StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import health_pb2, scheduler_pb2

TIMEOUT_S = 3.0
_ALIVE = {health_pb2.NODE_PHASE_READY, health_pb2.NODE_PHASE_CORDONED, health_pb2.NODE_PHASE_DRAINING}


class Peers:
    """Answers from the services themselves. A service that this inventory was not told of is not asked.

    A peer that does not answer, or does not know, makes the question fail: nothing is retired on a guess.
    """

    def __init__(self, health: Any = None, scheduler: Any = None) -> None:
        self._health, self._scheduler = health, scheduler  # stubs of HealthService and SchedulerService

    async def unreachable(self, node: str) -> bool:
        """Whether health_monitor has fenced the node."""
        if self._health is None:
            return False
        try:
            request = health_pb2.GetNodeHealthRequest(name=node)
            health = await self._health.GetNodeHealth(request, timeout=TIMEOUT_S)
        except NotFound:
            return False
        return bool(health.phase == health_pb2.NODE_PHASE_UNREACHABLE)

    async def connected_boot(self, node: str) -> str:
        """Boot id of the machine that gives signs of life as this node; "" when there is none, or health_monitor does not answer."""
        if self._health is None:
            return ""
        try:
            health = await self._health.GetNodeHealth(health_pb2.GetNodeHealthRequest(name=node), timeout=TIMEOUT_S)
        except StatusError:
            return ""
        return str(health.boot_id) if health.phase in _ALIVE else ""

    async def gpus_held(self, node: str) -> int:
        """How many GPUs of the node are allocated, and ranks without."""
        if self._scheduler is None:
            return 0
        tasks = [a.task async for a in self._allocations() if a.task.node == node]
        return sum(len(task.gpu_uuids) or task.ranks for task in tasks)

    async def data_held_bytes(self, queue: str) -> int:
        """What the queue holds of data on nodes. Raises Unavailable while nobody who counts it answers."""
        if self._scheduler is None:
            return 0
        found = await self._scheduler.GetQueue(scheduler_pb2.GetQueueRequest(name=queue), timeout=TIMEOUT_S)
        if not found.HasField("use"):
            raise Unavailable(
                f"what {queue} holds of data is not known now; try again",
                reason=ErrorReason.NOT_LEADER,
                retry_after_s=1.0,
            )
        return int(found.use.held_data_bytes)

    async def _allocations(self) -> AsyncIterator[scheduler_pb2.Allocation]:
        token = ""
        while True:
            request = scheduler_pb2.ListAllocationsRequest(page_token=token)
            page = await self._scheduler.ListAllocations(request, timeout=TIMEOUT_S)
            if page.unreadable:
                raise _not_known(page.unreadable[0])
            for allocation in page.allocations:
                yield allocation
            token = page.next_page_token
            if not token:
                return


def _not_known(job: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the record of {job} cannot be read, so where it runs is not known; update the scheduler or mend the record, "
        "or stop the node's agent: an unreachable node may be retired at once",
        reason=ErrorReason.RECORD_UNREADABLE,
        metadata={"name": job},
    )
