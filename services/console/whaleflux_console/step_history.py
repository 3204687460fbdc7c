"""How trainings went, for whoever asks: what the ledger keeps of steps, losses for those alone who may read the job's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc import auth
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.trust.sight import Sight
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.progress import ATTEMPTS, POINTS

DEFAULT_POINTS, MOST_POINTS = 500, 2_000
MOST_ATTEMPTS = 1_000
_LAST_STEP = 1 << 53
# In the order of the columns behind the times of steps.
_OPTIONAL = ("data_s", "host_s", "save_s", "comm_in_node_s", "comm_cross_s", "tokens_per_s", "flops_per_s")


@dataclass(frozen=True, slots=True)
class StepHistory:
    """See CostService."""

    answers: Answers
    queue_access: Callable[[str], Access]

    async def of_job(self, request: pb.GetStepHistoryRequest) -> pb.GetStepHistoryResponse:
        """Raises InvalidArgument naming what is wrong, Unavailable until the ledger was read once."""
        queue, _ = names.split(request.job, "queues", "jobs", field="job")
        points, first, last = _points(request.points), *_range(request)
        ownership.note_asked()
        sight = Sight(auth.principal(), self.queue_access)
        rows = sorted(await self.answers.select(ATTEMPTS, [request.job, MOST_ATTEMPTS]))
        if not rows or not sight.sees(queue, rows[-1][5]):
            return pb.GetStepHistoryResponse()
        response = self._dated()
        response.attempts.extend(_attempts(rows))
        width = _width([one for one in response.attempts if one.last_step >= first], first, last, points)
        found = await self.answers.select(POINTS, [rows[0][6], rows[0][0], first, last, width])
        reads = sight.reads(queue, rows[-1][5])
        response.points.extend(_point(row, reads=reads) for row in found)
        response.losses_hidden = not reads and any(_has_loss(row) for row in found)
        return response

    def _dated(self) -> pb.GetStepHistoryResponse:
        response = pb.GetStepHistoryResponse()
        response.horizon.FromMilliseconds(self.answers.hot_from_ms)
        if self.answers.state.watermark_ms:
            response.watermark.FromMilliseconds(self.answers.state.watermark_ms)
        return response


def _points(asked: int) -> int:
    if not 0 <= asked <= MOST_POINTS:
        raise InvalidArgument(FieldViolation("points", f"{asked}: use 1 to {MOST_POINTS}, or 0 for {DEFAULT_POINTS}"))
    return asked or DEFAULT_POINTS


def _range(request: pb.GetStepHistoryRequest) -> tuple[int, int]:
    first, last = request.first_step or 1, request.last_step or _LAST_STEP
    if not 1 <= first <= last <= _LAST_STEP:
        limit = f"{request.first_step} to {request.last_step}: steps count from 1 on, the first is not above the last; leave them out for all"
        raise InvalidArgument(FieldViolation("first_step", limit))
    return first, last


def _width(attempts: Iterable[pb.StepAttempt], first: int, last: int, points: int) -> int:
    """How many steps a point is of: the attempts' steps in the range, together in `points` of them and one more of each attempt."""
    steps = sum(max(0, min(one.last_step, last) - max(one.first_step, first) + 1) for one in attempts)
    return max(1, -(-steps // points))


def _attempts(rows: Sequence[Sequence[Any]]) -> list[pb.StepAttempt]:
    """In their order; where a later one begins before the end of an earlier one, that one's steps from there on were done again."""
    found: list[pb.StepAttempt] = []
    again_from = _LAST_STEP
    for attempt, first, last, start_ms, end_ms, *_ in reversed(rows):
        made = pb.StepAttempt(attempt=attempt, first_step=first, last_step=last)
        _timed(made, start_ms, end_ms)
        if again_from <= last:
            made.done_again_after_step = max(again_from, first) - 1
        again_from = min(again_from, first)
        found.append(made)
    return found[::-1]


def _point(row: Sequence[Any], *, reads: bool) -> pb.StepPoint:
    attempt, first, last, start_ms, end_ms, ranks, step_s, fastest_s, slowest_s = row[:9]
    made = pb.StepPoint(
        attempt=attempt, first_step=first, last_step=last, ranks=ranks, step_s=step_s, fastest_step_s=fastest_s, slowest_step_s=slowest_s,
    )  # fmt: skip
    _timed(made, start_ms, end_ms)
    for name, value in zip(_OPTIONAL, row[9:16], strict=True):
        if value is not None:
            setattr(made, name, value)
    if reads and _has_loss(row):
        mean, least, most, not_finite = row[16:]
        made.loss.CopyFrom(pb.LossRange(mean=mean, min=least, max=most, not_finite=not_finite))
    return made


def _has_loss(row: Sequence[Any]) -> bool:
    return row[16] is not None or bool(row[19])


def _timed(made: pb.StepAttempt | pb.StepPoint, start_ms: int, end_ms: int) -> None:
    made.start_time.FromMilliseconds(start_ms)
    made.end_time.FromMilliseconds(end_ms)
