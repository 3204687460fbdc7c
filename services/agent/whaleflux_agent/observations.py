"""What was seen on the node and health_monitor has not taken yet: in order, at least once, bounded in number and in rate."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from whaleflux.clock import Clock
from whaleflux.reasons import NodeReason, What
from whaleflux.v1 import health_pb2
from whaleflux_agent.task_runner import Task

_KEPT = 1000  # the oldest are dropped: what is new matters more
_DETAIL_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast observations of one kind may come: so many at once, and so many a second after that."""

    burst: int
    per_s: float


# A fault of a GPU is said by its first reports; what repeats is only counted.
_RATES: dict[str, Rate] = {
    What.XID: Rate(16, 0.1),
    NodeReason.GPU_LOST: Rate(4, 0.02),
    What.UNKNOWN_PROCESS: Rate(16, 0.1),
    What.RANK_REFUSED: Rate(64, 1.0),  # of all jobs of the node together
}
_OTHERWISE = Rate(256, 20.0)


class _Bucket:
    """Admits observations of one kind at its rate, and counts what it refused."""

    def __init__(self, rate: Rate, now_s: float) -> None:
        self._rate, self._tokens, self._at_s = rate, float(rate.burst), now_s
        self.suppressed = 0

    def admits(self, now_s: float) -> bool:
        self._tokens = min(self._rate.burst, self._tokens + (now_s - self._at_s) * self._rate.per_s)
        self._at_s = now_s
        if self._tokens < 1:
            self.suppressed += 1
            return False
        self._tokens -= 1
        return True

    def taken(self) -> int:
        """How many were suppressed since the last one that was admitted."""
        suppressed, self.suppressed = self.suppressed, 0
        return suppressed


class Observations:
    """An id is {node}/{boot}/{agent}/{sequence}: `agent` is new at each start, so that no id comes twice."""

    def __init__(self, node: str, boot: str, agent: str, clock: Clock) -> None:
        self._prefix, self._clock = f"{node}/{boot}/{agent}", clock
        self._sequence = 0
        self._waiting: deque[health_pb2.Observation] = deque(maxlen=_KEPT)
        self._buckets: dict[str, _Bucket] = {}
        self.on_change: Callable[[], None] = lambda: None

    def add(self, kind: str, task: Task | None, code: int, detail: str, *, gpu_index: int = -1) -> None:
        """Notes something that happened now, unless its kind comes too fast."""
        now_s = self._clock.monotonic()
        bucket = self._buckets.setdefault(kind, _Bucket(_RATES.get(kind, _OTHERWISE), now_s))
        if not bucket.admits(now_s):
            return
        self._sequence += 1
        seen = health_pb2.Observation(
            id=f"{self._prefix}/{self._sequence}",
            kind=kind,
            task=task.work.task if task else "",
            job=task.work.job if task else "",
            gpu_index=gpu_index,
            code=code,
            detail=detail[:_DETAIL_CHARS],
            suppressed=bucket.taken(),
        )
        seen.time.FromDatetime(self._clock.now())
        self._waiting.append(seen)
        self.on_change()

    def after(self, last: str) -> list[health_pb2.Observation]:
        """Those that were seen after the one with id `last`; all that wait when it is "" or not among them."""
        waiting = list(self._waiting)
        at = next((i for i, seen in enumerate(waiting) if seen.id == last), -1)
        return waiting[at + 1 :]

    def acknowledged(self, last: str) -> None:
        """Everything up to the one with id `last` was taken."""
        if any(seen.id == last for seen in self._waiting):
            while self._waiting.popleft().id != last:
                pass
