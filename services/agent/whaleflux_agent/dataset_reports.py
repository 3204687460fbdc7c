"""What this node tells inventory of its copies of datasets."""

from __future__ import annotations

from collections.abc import Callable

from whaleflux import telemetry
from whaleflux.errors import StatusError
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2, inventory_pb2_grpc

_CALL_S = 10.0
_MAX_MESSAGE = 512
_log = telemetry.get_logger("whaleflux.agent")

READY = inventory_pb2.DATASET_COPY_STATE_READY
PULLING = inventory_pb2.DATASET_COPY_STATE_PULLING
PARTIAL = inventory_pb2.DATASET_COPY_STATE_PARTIAL
FAILED = inventory_pb2.DATASET_COPY_STATE_FAILED


class CopyReports:
    """`kept` says whether a whole copy stays (pinned, or read by a task); `address` is where others of the site get pieces."""

    def __init__(
        self,
        node: str,
        address: str,
        inventory: inventory_pb2_grpc.InventoryServiceStub,
        kept: Callable[[str], bool],
    ) -> None:
        self.node, self._address, self._inventory, self._kept = node, address, inventory, kept

    async def say(
        self,
        dataset: str,
        state: inventory_pb2.DatasetCopyState,
        present_bytes: int = 0,
        digest: str = "",
        message: str = "",
    ) -> inventory_pb2.Dataset | None:
        """The dataset as it is known then; None when nobody answers: a report is not worth holding a task for. READY without bytes: none."""
        copy = inventory_pb2.DatasetCopy(
            node=self.node,
            present_bytes=present_bytes,
            pinned=bool(present_bytes) and self._kept(dataset),
            state=state,
            manifest_digest=digest,
            message=message[:_MAX_MESSAGE],
            address=self._address,
        )
        request = inventory_pb2.ReportCachedDatasetRequest(dataset=dataset, copy=copy)
        try:
            known: inventory_pb2.Dataset = await self._inventory.ReportCachedDataset(request, timeout=_CALL_S)
            return known
        except StatusError as error:
            _log.info(Event.RPC_FAILED, method="ReportCachedDataset", reason=error.message)
            return None
