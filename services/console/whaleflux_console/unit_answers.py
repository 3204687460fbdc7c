"""What units of work cost, for whoever asks."""

from __future__ import annotations

from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.trust import ownership
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.asked_times import asked_ms
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.units import UnitCost, unit_costs
from whaleflux_console.costs import DEFAULT_WINDOW_MS, Costs, most_groups
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.manifest import DAY_MS

LONGEST_MS = 35 * DAY_MS
_BY = {
    pb.COST_GROUPING_UNSPECIFIED: "job",
    pb.COST_GROUPING_JOB: "job",
    pb.COST_GROUPING_MODEL: "model",
    pb.COST_GROUPING_QUEUE: "queue",
}


async def unit_costs_of(costs: Costs, request: pb.GetUnitCostsRequest) -> pb.GetUnitCostsResponse:
    """Of runs in queues that the caller may see. Raises InvalidArgument naming what is wrong, FailedPrecondition where a file is damaged."""
    start_ms, end_ms = _window(request, round(costs.clock.now().timestamp() * 1000))
    if request.group_by not in _BY:
        raise InvalidArgument(FieldViolation("group_by", f"{request.group_by}: use job (3), model (4) or queue (1)"))
    most = most_groups(request.limit)
    try:
        runs = await costs.answers.runs(start_ms, end_ms)
    except Damaged as damage:
        raise FailedPrecondition(f"{damage}; it is made again by itself, see: whaleflux cost status") from None
    ownership.note_asked()
    may = {queue: costs.may_see_queue(queue) for queue in {run.queue for run in runs}}
    shown = [run for run in runs if may[run.queue] and request.queue in {"", run.queue}]
    found = unit_costs(shown, _BY[request.group_by])[:most]
    response = pb.GetUnitCostsResponse(units=map(_message, found))
    response.start_time.FromMilliseconds(start_ms)
    response.end_time.FromMilliseconds(end_ms)
    if costs.answers.state.watermark_ms:
        response.watermark.FromMilliseconds(costs.answers.state.watermark_ms)
    return response


def _window(asked: pb.GetUnitCostsRequest, now_ms: int) -> tuple[int, int]:
    """Whole hours, rounded outwards."""
    end_ms = asked_ms(asked, "end_time", now_ms)
    start_ms = asked_ms(asked, "start_time", end_ms - DEFAULT_WINDOW_MS)
    if not 0 <= start_ms < end_ms:
        raise InvalidArgument(FieldViolation("start_time", "is not before the end; give an earlier one"))
    if end_ms - start_ms > LONGEST_MS:
        most = LONGEST_MS // DAY_MS
        raise InvalidArgument(FieldViolation("start_time", f"is more than {most} days before the end; ask for a part"))
    return start_ms // HOUR_MS * HOUR_MS, -(-end_ms // HOUR_MS) * HOUR_MS


def _message(one: UnitCost) -> pb.UnitCost:
    return pb.UnitCost(
        key=one.key,
        runs=one.runs,
        bill_micros=one.bill_micros,
        gpu_hours=one.gpu_ms / HOUR_MS,
        useful_gpu_hours=one.useful_gpu_ms / HOUR_MS,
        tokens=one.tokens,
        micros_per_million_tokens=one.micros_per_million_tokens,
        micros_per_run=one.micros_per_run,
        micros_per_useful_gpu_hour=one.micros_per_useful_gpu_hour,
        input_tokens=one.input_tokens,
        output_tokens=one.output_tokens,
        micros_per_million_served_tokens=one.micros_per_million_served,
        micros_per_million_output_tokens=one.micros_per_million_output,
        succeeded_runs=one.succeeded_runs,
        failed_runs=one.failed_runs,
        failed_micros=one.failed_micros,
        micros_per_successful_run=one.micros_per_successful_run,
    )
