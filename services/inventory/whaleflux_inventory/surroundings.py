"""What inventory asks health_monitor and scheduler before a node may go for good."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from whaleflux.errors import NotFound
from whaleflux.v1 import health_pb2, scheduler_pb2

TIMEOUT_S = 3.0


class Peers:
    """Answers from the services themselves. A service that this inventory was not told of is not asked.

    A peer that does not answer makes the question fail with Unavailable: nothing is retired on a guess.
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

    async def gpus_held(self, node: str) -> int:
        """How many GPUs of the node are allocated."""
        if self._scheduler is None:
            return 0
        tasks = [a.task async for a in self._allocations() if a.task.node == node]
        return sum(len(task.gpu_indices) for task in tasks)

    async def _allocations(self) -> AsyncIterator[scheduler_pb2.Allocation]:
        token = ""
        while True:
            request = scheduler_pb2.ListAllocationsRequest(page_token=token)
            page = await self._scheduler.ListAllocations(request, timeout=TIMEOUT_S)
            for allocation in page.allocations:
                yield allocation
            token = page.next_page_token
            if not token:
                return
