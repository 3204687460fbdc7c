"""What steps were made of: waits for data and saves, tokens, FLOPs, communication, waits for the CPU; told ten steps at a time.

Nothing here waits for a GPU but a look at one step in some hundreds: what it has not finished when it is told counts with the next ten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from whaleflux.sdk.keeper import Loss, StepReport
from whaleflux.sdk.looks import Looks, is_on_gpu
from whaleflux.sdk.spans import Span, between, moment

TOLD_EVERY = 10


@dataclass(slots=True)
class _Kind:
    """Spans of one kind that are not told yet."""

    spans: list[Span]

    def take_s(self) -> float:
        """Of those that are over; the others stay."""
        seconds = [(span, span()) for span in self.spans]
        self.spans = [span for span, took in seconds if took is None]
        return sum(took for _, took in seconds if took is not None)


class StepTimes:
    """Of one rank. `tell` never blocks; `clock` is monotonic, `wall` UTC, seconds."""

    def __init__(
        self,
        model: nn.Module,
        world_size: int,
        tell: Callable[[StepReport], None],
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
        looks: Looks | None = None,
    ) -> None:
        self._tell, self._clock, self._wall = tell, clock, wall
        self._on_gpu, self._is_alone = is_on_gpu(model), world_size == 1
        self._looks = looks or Looks(world_size, self._on_gpu)
        self._data, self._save = _Kind([]), _Kind([])
        self._tokens: int | None = None
        self._flops: float | None = None
        self._losses: deque[Loss] = deque(maxlen=TOLD_EVERY)  # who has no steps() never tells them
        self._step = self._first = 0
        self._began_s = self._offset_s = 0.0

    @contextmanager
    def running(self, step: int) -> Iterator[None]:
        """While steps run, `step` of them done before; what is not told at the end is told then."""
        self._step = self._first = step
        self._began_s = self._clock()
        self._offset_s = self._wall() - self._began_s
        self._looks.start(step)
        try:
            yield
        finally:
            self._looks.stop()
            self._report()

    def waited_for_data(self) -> Callable[[], None]:
        """The wait begins; call what comes back when it is over."""
        arrived, begin_ns = self._open(self._data), time.time_ns()

        def over() -> None:
            arrived()
            self._looks.waited(begin_ns, time.time_ns())

        return over

    def saved(self) -> Callable[[], None]:
        """Training stands still for a save; call what comes back when it goes on."""
        self._looks.spoil()
        return self._open(self._save)

    def trained_on(self, tokens: int | None, flops: float | None, loss: Loss | None = None) -> None:
        """What this step was, of this rank."""
        if loss is not None:
            self._losses.append(loss)
        if tokens is not None:
            self._tokens = (self._tokens or 0) + tokens
        if flops is not None:
            self._flops = (self._flops or 0.0) + flops

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        self._step = step
        self._looks.stepped(step)
        if step - self._first >= TOLD_EVERY:
            self._report()

    def _open(self, kind: _Kind) -> Callable[[], None]:
        began = moment(self._on_gpu, self._clock)
        return lambda: kind.spans.append(between(began, moment(self._on_gpu, self._clock)))

    def _report(self) -> None:
        steps, ended_s = self._step - self._first, self._clock()
        if steps <= 0:
            return
        whole_s, save_s, data_s = ended_s - self._began_s, self._save.take_s(), self._data.take_s()
        seen = self._seen(steps, whole_s - save_s - data_s)
        told = _fitted([save_s, data_s, *seen], whole_s)
        self._tell(
            StepReport(
                start_s=self._began_s + self._offset_s,
                end_s=ended_s + self._offset_s,
                first_step=self._first + 1,
                last_step=self._step,
                save_s=told[0],
                data_s=told[1],
                comm_in_node_s=told[2],
                comm_cross_s=told[3],
                host_s=told[4],
                tokens=self._tokens,
                flops=self._flops,
                losses=tuple(self._losses)[-steps:],  # who reports by hand may do so without steps
            )
        )
        self._losses.clear()
        self._tokens = self._flops = None
        self._first, self._began_s = self._step, ended_s

    def _seen(self, steps: int, worked_s: float) -> tuple[float | None, float | None, float | None]:
        """Seconds of communication within the node and across nodes, and of waits for the CPU, of `steps` steps as the newest look saw one.

        What the step took longer under the profiler was the CPU's: it is no wait of other steps.
        """
        look = self._looks.newest
        in_node_s, cross_s = (0.0, 0.0) if self._is_alone else (look.in_node_s, look.cross_s) if look else (None, None)
        host_s = None
        if look is not None and look.host_s is not None:
            host_s = max(0.0, look.host_s - max(0.0, look.whole_s - worked_s / steps))
        return _times(in_node_s, steps), _times(cross_s, steps), _times(host_s, steps)


def _times(seconds: float | None, steps: int) -> float | None:
    return None if seconds is None else seconds * steps


def _fitted(parts: list[float | None], whole_s: float) -> list[float | None]:
    """Each part at most what those before it leave of the whole: one that spans two reports, or was measured on another step, may be more."""
    fitted: list[float | None] = []
    for part in parts:
        fitted.append(None if part is None else max(0.0, min(part, whole_s)))
        whole_s -= fitted[-1] or 0.0
    return fitted
