"""What steps were made of: waits for data and saves, tokens, FLOPs, communication; told ten steps at a time.

Nothing here waits for a GPU: what it has not finished when it is told counts with the next ten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from whaleflux.sdk.exposed import ExposedCommunication, on_gpu
from whaleflux.sdk.keeper import StepReport
from whaleflux.sdk.spans import Span, between, moment

TOLD_EVERY = 10
_MEASURED = 1  # of these: steps whose collectives are timed


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
    ) -> None:
        self._tell, self._clock, self._wall = tell, clock, wall
        self._on_gpu = on_gpu(model)
        self._communication = ExposedCommunication(model, world_size, self._on_gpu)
        self._data, self._save = _Kind([]), _Kind([])
        self._tokens: int | None = None
        self._flops: float | None = None
        self._step = self._first = 0
        self._began_s = self._offset_s = 0.0

    @contextmanager
    def running(self, step: int) -> Iterator[None]:
        """While steps run, `step` of them done before; what is not told at the end is told then."""
        self._step = self._first = step
        self._began_s = self._clock()
        self._offset_s = self._wall() - self._began_s
        self._communication.start()
        self._communication.sampling = True
        try:
            yield
        finally:
            self._communication.stop()
            self._report()

    def waited_for_data(self) -> Callable[[], None]:
        """The wait begins; call what comes back when it is over."""
        return self._open(self._data)

    def saved(self) -> Callable[[], None]:
        """Training stands still for a save; call what comes back when it goes on."""
        self._communication.sampling = False  # what it communicates counts as the save
        return self._open(self._save)

    def trained_on(self, tokens: int | None, flops: float | None) -> None:
        """What this step was, of this rank."""
        if tokens is not None:
            self._tokens = (self._tokens or 0) + tokens
        if flops is not None:
            self._flops = (self._flops or 0.0) + flops

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        self._step = step
        self._communication.sampling = (step - self._first) % TOLD_EVERY < _MEASURED
        if step - self._first >= TOLD_EVERY:
            self._report()

    def _open(self, kind: _Kind) -> Callable[[], None]:
        began = moment(self._on_gpu, self._clock)
        return lambda: kind.spans.append(between(began, moment(self._on_gpu, self._clock)))

    def _report(self) -> None:
        steps, ended_s = self._step - self._first, self._clock()
        if steps <= 0:
            return
        here_s, cross_s = self._communication.take(min(_MEASURED, steps), steps)
        told = _fitted([self._save.take_s(), self._data.take_s(), here_s, cross_s], ended_s - self._began_s)
        save_s, data_s, here_s, cross_s = told
        self._tell(
            StepReport(
                start_s=self._began_s + self._offset_s,
                end_s=ended_s + self._offset_s,
                first_step=self._first + 1,
                last_step=self._step,
                data_s=data_s,
                save_s=save_s,
                comm_in_node_s=here_s,
                comm_cross_s=cross_s,
                tokens=self._tokens,
                flops=self._flops,
            )
        )
        self._tokens = self._flops = None
        self._first, self._began_s = self._step, ended_s


def _fitted(parts: list[float | None], whole_s: float) -> list[float | None]:
    """Each part at most what those before it leave of the whole: one that spans two reports, or was measured on one step of ten, may be more."""
    fitted: list[float | None] = []
    for part in parts:
        fitted.append(None if part is None else max(0.0, min(part, whole_s)))
        whole_s -= fitted[-1] or 0.0
    return fitted
