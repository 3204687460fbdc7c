"""What a node's GPUs did over time, for whoever asks: figures of the fleet, in which no work has a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.asked_times import asked_ms
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.devices import FIGURES, Asked
from whaleflux_console.ledger.manifest import DAY_MS

DEFAULT_POINTS, MOST_POINTS = 240, 1_000
LONGEST_MS = 7 * DAY_MS
_MOST_DEVICE_CHARS = 100


@dataclass(frozen=True, slots=True)
class DeviceHistory:
    """See CostService."""

    answers: Answers
    clock: Clock

    async def of_node(self, request: pb.GetDeviceHistoryRequest) -> pb.GetDeviceHistoryResponse:
        """Raises InvalidArgument naming what is wrong, Unavailable until the ledger was read once."""
        asked = _asked(request, round(self.clock.now().timestamp() * 1000))
        rows = await self.answers.devices(asked)
        response = pb.GetDeviceHistoryResponse(points=map(_point, rows))
        response.step.FromMilliseconds(rows[0][0] if rows else asked.width_ms)
        if self.answers.state.watermark_ms:
            response.watermark.FromMilliseconds(self.answers.state.watermark_ms)
        return response


def _asked(request: pb.GetDeviceHistoryRequest, now_ms: int) -> Asked:
    names.split(request.node, "sites", "nodes", field="node")
    if len(request.device) > _MOST_DEVICE_CHARS:
        limit = f"has {len(request.device)} characters; use the UUID of a GPU or MIG instance, or leave it out for all"
        raise InvalidArgument(FieldViolation("device", limit))
    if not 0 <= request.points <= MOST_POINTS:
        limit = f"{request.points}: use 1 to {MOST_POINTS}, or 0 for {DEFAULT_POINTS}"
        raise InvalidArgument(FieldViolation("points", limit))
    end_ms = asked_ms(request, "end_time", now_ms)
    start_ms = asked_ms(request, "start_time", max(0, end_ms - HOUR_MS))
    if not 0 < end_ms - start_ms <= LONGEST_MS:
        limit = f"is {(end_ms - start_ms) / HOUR_MS:g} h before end_time; use more than 0 and at most {LONGEST_MS // HOUR_MS} h"
        raise InvalidArgument(FieldViolation("start_time", limit))
    width_ms = -(-(end_ms - start_ms) // (request.points or DEFAULT_POINTS))
    return Asked(request.node, request.device, start_ms, end_ms, width_ms)


def _point(row: Sequence[Any]) -> pb.DevicePoint:
    _, device, start_ms, end_ms, source, *figures = row
    made = pb.DevicePoint(device=device, source=source or "")
    made.start_time.FromMilliseconds(start_ms)
    made.end_time.FromMilliseconds(end_ms)
    for place, name in enumerate(FIGURES):
        mean, least, most = figures[3 * place : 3 * place + 3]
        if mean is not None:
            getattr(made, name).CopyFrom(pb.MeasuredRange(mean=mean, min=least, max=most))
    return made
