"""Whether a neighbour reads a dataset that is for some for a job of somebody who may: asked of the scheduler, and remembered for a while."""

from __future__ import annotations

from collections import OrderedDict

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2, agent_pb2_grpc

CALL_S = 5.0
YES_S, NO_S = 30.0, 3.0  # for how long an answer counts
MAX_KNOWN = 4096
_log = telemetry.get_logger("whaleflux.agent")


class DatasetReaders:
    """Nobody who answers is a no that is not remembered: the neighbour reads at the source meanwhile."""

    def __init__(self, scheduler: agent_pb2_grpc.TaskServiceStub, clock: Clock) -> None:
        self._scheduler, self._clock = scheduler, clock
        self._known: OrderedDict[tuple[str, str, str], tuple[float, bool]] = OrderedDict()

    async def reads(self, node: str, dataset: str, job: str) -> bool:
        """Whether the node reads it for that job now."""
        if not job:
            return False
        until_s, said = self._known.get((node, dataset, job), (0.0, False))
        if self._clock.monotonic() < until_s:
            return said
        request = agent_pb2.FindDatasetReaderRequest(dataset=dataset, node=node, job=job)
        try:
            said = bool((await self._scheduler.FindDatasetReader(request, timeout=CALL_S)).reads)
        except StatusError as failed:
            _log.info(Event.RPC_FAILED, method="FindDatasetReader", reason=failed.message)
            return False
        self._known[node, dataset, job] = self._clock.monotonic() + (YES_S if said else NO_S), said
        self._known.move_to_end((node, dataset, job))
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return said
