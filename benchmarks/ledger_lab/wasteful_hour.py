"""An hour of eight simulated GPUs on two nodes, of which is known to the millisecond what it was wasted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from benchmarks.ledger_lab.histories import START_MS
from benchmarks.ledger_lab.pipeline import step as pipeline_step
from whaleflux_console.core import facts as told
from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM
from whaleflux_console.core.rows import CostClass

END_MS = START_MS + HOUR_MS
GPUS, STAGES, MICRO_BATCHES = 8, 4, 8
JOB, UID = "queues/q/jobs/j", "uid"
DETECT_MS, RESTART_MS = 15_000, 45_000
STEP_MS, REPORT_STEPS, SAVE_STEPS, SAMPLE_MS = 2_000.0, 10, 50, 10_000
COMPUTING = (CostClass.USEFUL, CostClass.RECOMPUTE)
ACROSS = (CostClass.COMM_AVOIDABLE, CostClass.COMM_STRUCTURAL)
BEFORE = (
    CostClass.UNAVAILABLE,
    CostClass.IDLE,
    CostClass.FRAGMENTED,
)  # nobody held it, in this order, before the job came
Wasted = Mapping[CostClass, float]  # shares: of the hour for what is outside of steps, of a step for what is within


@dataclass(slots=True)
class Hour:
    """What happened, and what was told of it."""

    facts: told.Facts
    truth_ms: Counter[CostClass]  # over all GPUs


@dataclass(slots=True)
class _Gpu:
    """What one GPU did: pieces that follow each other."""

    name: str
    at_ms: float = START_MS
    pieces: list[tuple[float, float, CostClass]] = field(default_factory=list)
    vain: list[tuple[float, float]] = field(default_factory=list)  # when all that it did was lost
    reports: list[told.Steps] = field(default_factory=list)

    def spend(self, kind: CostClass, ms: float) -> None:
        ends = min(float(END_MS), self.at_ms + ms)
        if ends > self.at_ms:
            self.pieces.append((self.at_ms, ends, kind))
            self.at_ms = ends


class WastefulHour:
    """Plays a job that wastes given shares, with noise."""

    def __init__(self, wasted: Wasted, random: Random) -> None:
        self._wasted, self._random = wasted, random
        self._gpus = [_Gpu(f"GPU-{i}") for i in range(GPUS)]
        self._stages = STAGES if wasted.get(CostClass.BUBBLE) else 1
        self._step = 0
        self._attempts: list[told.Attempt] = []
        self._holdings: list[told.Holding] = []

    def play(self) -> Hour:
        """The whole hour."""
        for kind in BEFORE:
            self._all(kind, self._of_hour(kind))
        self._attempt(1)
        if self._share(CostClass.LOST):
            self._attempt(2)
        truth: Counter[CostClass] = Counter()
        for gpu in self._gpus:
            for start, end, kind in gpu.pieces:
                lost = any(first <= start < last for first, last in gpu.vain)
                truth[CostClass.LOST if lost else kind] += round(end - start)
        return Hour(self._facts(), truth)

    def _share(self, kind: CostClass) -> float:
        return self._wasted.get(kind, 0.0)

    def _of_hour(self, kind: CostClass) -> float:
        return self._share(kind) * HOUR_MS

    def _all(self, kind: CostClass, ms: float) -> None:
        for gpu in self._gpus:
            gpu.spend(kind, ms)

    @property
    def _now(self) -> int:
        return round(self._gpus[0].at_ms)

    def _attempt(self, number: int) -> None:
        """Starts, works, and (the first of two) fails: work since the last save is in vain."""
        allocated, restored = self._now, self._step or None
        fails = number == 1 and self._share(CostClass.LOST) > 0
        self._all(
            CostClass.STARTUP if number == 1 else CostClass.LOST,
            self._of_hour(CostClass.STARTUP) if number == 1 else RESTART_MS,
        )
        first = self._now
        work_ms = (END_MS - first) * (0.4 if fails else 1)
        self._work(number, first + work_ms, hang_ms=self._of_hour(CostClass.ALLOCATED_IDLE) if number == 1 else 0)
        kept, saved = self._step, self._now
        if fails:
            self._fail(number)
        end = self._now if fails else None
        self._attempts.append(self._record(number, allocated, first, end, restored, kept, saved))
        self._holdings += [
            told.Holding(gpu.name, JOB, UID, number, WHOLE_PPM, allocated, self._now) for gpu in self._gpus
        ]

    def _fail(self, number: int) -> None:
        """Steps after the last save, then silence until it is noticed. They are told of as every step is."""
        began = [gpu.at_ms for gpu in self._gpus]
        kept, lost_ms = self._step, self._of_hour(CostClass.LOST) - DETECT_MS - RESTART_MS
        self._work(number, self._now + lost_ms, hang_ms=0)
        self._all(CostClass.LOST, DETECT_MS)
        for gpu, start in zip(self._gpus, began, strict=True):
            gpu.vain.append((start, gpu.at_ms))
        self._last, self._step = self._step, kept

    def _record(
        self, number: int, allocated: int, first: int, end: int | None, restored: int | None, kept: int, saved: int
    ) -> told.Attempt:
        actual_s, best_s = self._scores()
        return told.Attempt(
            JOB, UID, number, "queues/q", "researcher/r", "", allocated, first - 1_000, first, end,
            failed=end is not None, restored_step=restored, last_step=self._last if end else kept,
            last_saved_step=kept, last_saved_ms=saved, cross_node=True, plan=self._plan(),
            communication_s=actual_s, best_communication_s=best_s * 0.8, best_free_communication_s=best_s,
        )  # fmt: skip

    def _plan(self) -> told.Plan:
        return told.Plan(self._stages, 1, MICRO_BATCHES, round(self._share(CostClass.RECOMPUTE) * WHOLE_PPM))

    def _scores(self) -> tuple[float, float]:
        """What the placement core said of this placement, 5 % off, and of the best one."""
        actual = sum(self._share(kind) for kind in ACROSS) * STEP_MS / 1000
        return actual * 1.05, self._share(CostClass.COMM_STRUCTURAL) * STEP_MS / 1000

    def _work(self, number: int, until_ms: float, hang_ms: float) -> None:
        """Steps until then; in the middle of some report nothing at all happens for `hang_ms`."""
        hang_at = self._now + 0.4 * (until_ms - self._now) if hang_ms else float("inf")
        while self._now + REPORT_STEPS * STEP_MS < min(until_ms, END_MS):
            began, first = [gpu.at_ms for gpu in self._gpus], self._step + 1
            marks = [len(gpu.pieces) for gpu in self._gpus]
            for _ in range(REPORT_STEPS):
                self._one_step()
                if self._now >= hang_at:
                    self._all(CostClass.ALLOCATED_IDLE, hang_ms)
                    hang_at = float("inf")
            for rank, gpu in enumerate(self._gpus):
                gpu.reports.append(_report(gpu, number, rank, round(began[rank]), first, self._step, marks[rank]))
        self._all(
            CostClass.STARTUP if until_ms < END_MS and not self._step else CostClass.UNKNOWN,
            max(0.0, min(until_ms, END_MS) - self._now),
        )

    def _one_step(self) -> None:
        self._step += 1
        for kind in (CostClass.DATA, CostClass.HOST):
            self._all(kind, self._noisy(self._share(kind) * STEP_MS))
        outside = sum(self._share(kind) for kind in (CostClass.DATA, CostClass.HOST, CostClass.SAVE, *ACROSS))
        self._compute((1 - outside) * STEP_MS)
        for kind in ACROSS:
            self._all(kind, self._noisy(self._share(kind) * STEP_MS))
        if self._step % SAVE_STEPS == 0:
            self._all(CostClass.SAVE, self._noisy(self._share(CostClass.SAVE) * STEP_MS * SAVE_STEPS))

    def _compute(self, ms: float) -> None:
        """Micro-batches; what talks within the node (tensor parallelism) does so in each of them."""
        slots = 3 * (MICRO_BATCHES + self._stages - 1)
        whole, busy = pipeline_step(self._stages, MICRO_BATCHES, ms / slots, 0.05, self._random)
        again, talk = self._share(CostClass.RECOMPUTE), self._noisy(self._share(CostClass.COMM_IN_NODE) * STEP_MS) / ms
        for i, gpu in enumerate(self._gpus):
            mine = busy[i % self._stages] * (1 - talk)
            gpu.spend(CostClass.COMM_IN_NODE, busy[i % self._stages] * talk)
            gpu.spend(CostClass.USEFUL, mine * (1 - again))
            gpu.spend(CostClass.RECOMPUTE, mine * again)
            gpu.spend(CostClass.BUBBLE, whole - busy[i % self._stages])

    def _noisy(self, ms: float) -> float:
        return ms * self._random.uniform(0.5, 1.5)

    def _facts(self) -> told.Facts:
        return told.Facts(
            presences=tuple(self._presences()),
            holdings=tuple(self._holdings),
            attempts=tuple(self._attempts),
            steps=tuple(report for gpu in self._gpus for report in gpu.reports),
            samples=tuple(sample for gpu in self._gpus for sample in _samples(gpu)),
            fragmented=tuple(
                told.Fragmented(gpu.name, round(start), round(end))
                for gpu in self._gpus
                for start, end, kind in gpu.pieces
                if kind is CostClass.FRAGMENTED
            ),
            prices=tuple(
                told.PriceSpan(gpu.name, START_MS - 1_234, END_MS + 1, 3_500_000, told.PriceKind.ON_DEMAND, "simulated")
                for gpu in self._gpus
            ),
        )

    def _presences(self) -> Iterator[told.Presence]:
        out_until = START_MS + round(self._of_hour(CostClass.UNAVAILABLE))
        for i, gpu in enumerate(self._gpus):
            node = f"sites/s/nodes/n{i // 4}"
            yield told.Presence(gpu.name, gpu.name, node, "H200", WHOLE_PPM, START_MS, out_until, available=False)
            yield told.Presence(gpu.name, gpu.name, node, "H200", WHOLE_PPM, out_until, END_MS)


def _report(gpu: _Gpu, number: int, rank: int, began: int, first: int, last: int, mark: int) -> told.Steps:
    spent: Counter[CostClass] = Counter()
    flat: dict[CostClass, float] = dict.fromkeys(CostClass, 0.0)
    for start, end, kind in gpu.pieces[mark:]:
        flat[kind] += end - start
    spent.update({kind: round(ms) for kind, ms in flat.items()})
    return told.Steps(
        UID, number, rank, gpu.name, began, round(gpu.at_ms), first, last,
        data_ms=spent[CostClass.DATA], host_ms=spent[CostClass.HOST], save_ms=spent[CostClass.SAVE],
        comm_in_node_ms=spent[CostClass.COMM_IN_NODE], comm_cross_ms=spent[CostClass.COMM_AVOIDABLE] + spent[CostClass.COMM_STRUCTURAL],
    )  # fmt: skip


def _samples(gpu: _Gpu) -> Iterator[told.Sample]:
    """What counters show each 10 s: tensor pipes work for 80 % of what computes, SMs for all of it and for communication."""
    tensor, active = Counter[int](), Counter[int]()
    for start, end, kind in gpu.pieces:
        for slot, ms in _by_slot(start, end):
            tensor[slot] += round(0.8 * ms * 1000) if kind in COMPUTING else 0
            active[slot] += round(ms * 1000) if kind in (*COMPUTING, *ACROSS, CostClass.COMM_IN_NODE) else 0
    for slot in range(HOUR_MS // SAMPLE_MS):
        start = START_MS + slot * SAMPLE_MS
        ppm = [counted[slot] * 1000 // SAMPLE_MS for counted in (tensor, active)]
        yield told.Sample(gpu.name, start, start + SAMPLE_MS, ppm[0], ppm[1], ppm[1] < 10_000, "simulated")


def _by_slot(start: float, end: float) -> Iterator[tuple[int, float]]:
    at = start - START_MS
    last = end - START_MS
    while at < last:
        slot = int(at // SAMPLE_MS)
        until = min(last, (slot + 1) * SAMPLE_MS)
        yield slot, until - at
        at = until
