"""What was spent, for whoever asks: the ledger's answers, without what is in queues that the caller may not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.rpc import auth
from whaleflux.rpc.auth import Principal
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.asked_times import asked_ms
from whaleflux_console.bookkeeper import Progress
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CLASSES, CostClass
from whaleflux_console.forecasts import Forecasts
from whaleflux_console.ledger.answers import Answer, Answers, Sum
from whaleflux_console.ledger.manifest import DAY_MS, Kind
from whaleflux_console.ledger.question import BILL, Question
from whaleflux_console.ledger.rules import HourState, open_hours, state_of

DEFAULT_WINDOW_MS = 7 * DAY_MS
LONGEST_JOB_MS = 366 * DAY_MS
DEFAULT_LIMIT, MOST_GROUPS = 50, 1_000
MOST_QUEUES = 10_000
_SHOWN_FILES = 20
_LATE_MS = 120_000  # what was used is in the ledger within seconds
_NO_QUEUE = "queues/"  # has no name, so that nothing is in it
_BY = {
    pb.COST_GROUPING_QUEUE: "queue",
    pb.COST_GROUPING_USER: "user",
    pb.COST_GROUPING_JOB: "job",
    pb.COST_GROUPING_MODEL: "model",
    pb.COST_GROUPING_SITE: "site",
    pb.COST_GROUPING_GPU_CLASS: "gpu_class",
    pb.COST_GROUPING_NODE: "node",
    pb.COST_GROUPING_DAY: "day",
    pb.COST_GROUPING_HOUR: "hour",
}
NUMBER_OF: dict[CostClass, Any] = {kind: pb.CostClass.Value(f"COST_CLASS_{kind.name}") for kind in CLASSES}
CLASS_OF = {number: kind for kind, number in NUMBER_OF.items()}


@dataclass(frozen=True, slots=True)
class Costs:
    """See CostService."""

    answers: Answers
    queue_access: Callable[[str], Access]
    clock: Clock
    progress: Progress

    async def spent(self, request: pb.GetCostRequest) -> pb.GetCostResponse:
        """Groups of a window. Raises InvalidArgument naming what is wrong, Unavailable until the ledger was read once."""
        start_ms, end_ms = self._window(request.filter)
        by = _by(request.group_by)
        where = self._where(request.filter)
        order, limit = _order(request.order_by), most_groups(request.limit)
        seen, hidden, whole = await self._seen(Question(start_ms, end_ms, (), where))
        narrowed = where if seen is None else where | {"queue": seen}
        question = Question(start_ms, end_ms, by, narrowed, order, limit)
        shown = await self.answers.ask(question) if seen is None or seen else None
        unpriced = await self.answers.ask(Question(start_ms, end_ms, (), where | {"price_kind": ("",)}))
        response = pb.GetCostResponse(
            groups=[_group(row, by) for row in shown.rows] if shown and by else [],
            total=_group(whole.total),
            unpriced_gpu_hours=unpriced.total.gpu_ms / HOUR_MS,
            damaged_files=whole.damaged[:_SHOWN_FILES],
        )
        if shown is not None and by and (shown.others.bill_micros or shown.others.gpu_ms):
            response.others.CopyFrom(_group(shown.others))
        if hidden is not None:
            response.hidden.CopyFrom(_group(hidden))
        self._dated(response, whole, start_ms, end_ms)
        return response

    async def of_job(self, request: pb.GetJobCostRequest) -> pb.GetJobCostResponse:
        """One job's bill, whole and by day; nothing of one that held no GPU so far, or that the caller may not see."""
        queue, _ = names.split(request.job, "queues", "jobs", field="job")
        if not ownership.may_see(auth.principal(), self.queue_access(queue)):
            return pb.GetJobCostResponse()
        end_ms = (self._now_ms() // DAY_MS + 1) * DAY_MS
        question = Question(end_ms - LONGEST_JOB_MS, end_ms, ("day",), {"job": (request.job,)})
        answer = await self.answers.ask(question)
        if not answer.total.gpu_ms:
            return pb.GetJobCostResponse()
        useful_ms = answer.total.gpu_ms * answer.total.of(CostClass.USEFUL) // max(answer.total.bill_micros, 1)
        response = pb.GetJobCostResponse(
            total=_group(answer.total),
            days=[_group(row, ("day",)) for row in answer.rows],
            micros_per_useful_gpu_hour=answer.total.bill_micros * HOUR_MS // useful_ms if useful_ms else 0,
        )
        response.watermark.FromMilliseconds(answer.as_of_ms)
        return response

    async def forecast(self, where: Mapping[str, tuple[str, ...]]) -> pb.Forecast:
        """Of this month, of what the caller may see."""
        forecasts = Forecasts(self.answers, self.clock)
        seen, _, _ = await self._seen(forecasts.question(where))
        return await forecasts.of(where if seen is None else {**where, "queue": seen})

    def may_see_queue(self, queue: str) -> bool:
        """Whether the caller may; of no queue anybody."""
        return self._may_see(auth.principal(), queue)

    def ledger(self) -> pb.Ledger:
        """How far it is."""
        state = self.answers.state
        hours = [file for file in state.all_of(Kind.HOURS) if file.version]
        found = pb.Ledger(
            closed_hours=len(hours),
            restated_hours=sum(file.version > 1 for file in hours),
            manifest=state.number,
            size_bytes=sum(file.bytes for file in state.files.values()),
            damaged_files=self.answers.damaged[:_SHOWN_FILES],
            trouble=self.progress.trouble,
            missed_reports=state.position.missed,
            waiting_hours=sum(state_of(state, hour) is not HourState.OPEN for hour in state.unsettled),
        )
        if state.watermark_ms:
            found.watermark.FromMilliseconds(state.watermark_ms)
            found.trouble = found.trouble or _late(self._now_ms() - state.watermark_ms)
        starts = [start for kind, start in state.spans if kind in {Kind.HOURS, Kind.DAYS}]
        if starts:
            found.start_time.FromMilliseconds(min(starts))
        return found

    def _window(self, asked: pb.CostFilter) -> tuple[int, int]:
        """Whole hours, rounded outwards."""
        now_ms = self._now_ms()
        end_ms = asked_ms(asked, "end_time", now_ms, within="filter.")
        start_ms = asked_ms(asked, "start_time", end_ms - DEFAULT_WINDOW_MS, within="filter.")
        if start_ms >= end_ms:
            raise InvalidArgument(FieldViolation("filter.start_time", "is not before the end; give an earlier one"))
        first_ms = start_ms // HOUR_MS * HOUR_MS
        if first_ms < self.answers.hot_from_ms:  # what is older is kept by day
            first_ms = first_ms // DAY_MS * DAY_MS
        return max(first_ms, 0), -(-end_ms // HOUR_MS) * HOUR_MS

    async def _seen(self, asked: Question) -> tuple[tuple[str, ...] | None, Sum | None, Answer]:
        """Queues of the window that the caller may see (None: all there are), what is in the others, and all of it by queue."""
        who = auth.principal()
        by_queue = await self.answers.ask(
            Question(asked.start_ms, asked.end_ms, ("queue",), asked.where, limit=MOST_QUEUES)
        )
        hidden = [row for row in by_queue.rows if not self._may_see(who, row.keys[0])]
        if not hidden:
            ownership.note_asked()
            return None, None, by_queue
        unseen = {row.keys[0] for row in hidden}
        seen = tuple(row.keys[0] for row in by_queue.rows if row.keys[0] not in unseen)
        return seen, _summed(hidden), by_queue

    def _may_see(self, who: Principal, queue: str) -> bool:
        return not queue or ownership.may_see(who, self.queue_access(queue.removeprefix("queues/")))

    def _where(self, asked: pb.CostFilter) -> dict[str, tuple[str, ...]]:
        """What is asked for by the name of a queue, or of a job, that the caller may not see is as one that is not there."""
        found = _named(asked)
        sees = self.may_see_queue(asked.queue or asked.job.partition("/jobs/")[0])
        return found if sees else found | {"queue": (_NO_QUEUE,)}

    def _dated(self, response: Any, answer: Answer, start_ms: int, end_ms: int) -> None:
        response.start_time.FromMilliseconds(start_ms)
        response.end_time.FromMilliseconds(end_ms)
        state = self.answers.state
        if answer.as_of_ms:
            response.watermark.FromMilliseconds(answer.as_of_ms)
        if still_open := open_hours(state):
            response.open_since.FromMilliseconds(still_open[0])

    def _now_ms(self) -> int:
        return round(self.clock.now().timestamp() * 1000)


def _late(by_ms: int) -> str:
    """That nobody takes in what is used, in words; "" while somebody does."""
    if by_ms <= _LATE_MS:
        return ""
    return (
        f"nothing was taken in for {by_ms // 60_000} min: the console that leads, etcd or NATS does not go on; "
        "see the runbook WhaleFluxLedgerLagging"
    )


def _by(groupings: Iterable[int]) -> tuple[str, ...]:
    found = list(groupings)
    for number in found:
        if number not in _BY:
            raise InvalidArgument(FieldViolation("group_by", f"{number} is none of: {', '.join(_BY.values())}"))
    return tuple(_BY[number] for number in found)  # type: ignore[index]


def _named(asked: pb.CostFilter) -> dict[str, tuple[str, ...]]:
    site = names.last(asked.site) if asked.site.startswith("sites/") else asked.site
    values = {
        "queue": asked.queue,
        "user": asked.user,
        "job": asked.job,
        "model": asked.model,
        "site": site,
        "gpu_class": asked.gpu_class,
    }
    return {name: (value,) for name, value in values.items() if value}


def _order(asked: int) -> str:
    if asked and asked not in CLASS_OF:
        raise InvalidArgument(FieldViolation("order_by", f"{asked} is no cost class; leave it out for the bill"))
    return CLASS_OF[asked].value if asked else BILL


def most_groups(asked: int) -> int:
    """How many groups an answer may have. Raises InvalidArgument."""
    if not 0 <= asked <= MOST_GROUPS:
        raise InvalidArgument(FieldViolation("limit", f"{asked}: use 1 to {MOST_GROUPS}, or 0 for {DEFAULT_LIMIT}"))
    return asked or DEFAULT_LIMIT


def _group(row: Sum, by: tuple[str, ...] = ()) -> pb.CostGroup:
    keys = [_time(key) if name in {"day", "hour"} else key for name, key in zip(by, row.keys, strict=False)]
    return pb.CostGroup(
        keys=keys,
        bill_micros=row.bill_micros,
        classes=[
            pb.ClassCost(cost_class=NUMBER_OF[k], micros=m) for k, m in zip(CLASSES, row.micros, strict=True) if m
        ],
        gpu_hours=row.gpu_ms / HOUR_MS,
    )


def _time(key: str) -> str:
    return datetime.fromtimestamp(int(key) / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _summed(rows: Iterable[Sum]) -> Sum:
    found = list(rows)
    micros = tuple(sum(row.micros[place] for row in found) for place in range(len(CLASSES)))
    return Sum((), sum(row.gpu_ms for row in found), sum(row.bill_micros for row in found), micros)
