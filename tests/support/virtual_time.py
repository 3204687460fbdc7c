"""An event loop whose time jumps: when nothing is left to do it is at once the time of the next timer, so that no test waits.

`asyncio.sleep`, timeouts and `loop.time()` are virtual; work in threads is real, and time does not jump meanwhile. `LoopClock` shows the
loop's time to code that takes a `Clock`.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

T = TypeVar("T")
_STUCK_S = 10.0  # real seconds without anything to do and without a timer: everybody waits for everybody
_LOOK_EVERY_S = 0.05  # real seconds
_ROUNDING_S = 1e-6  # past the timer, whatever was rounded


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module. `time()` starts at a value that no real clock shows."""

    def __init__(self) -> None:
        self._now_s = 1_000_000.0
        self._working = set[Future[Any]]()
        self._threads = ThreadPoolExecutor(thread_name_prefix="virtual")
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        work = (executor or self._threads).submit(func, *args)
        self._working.add(work)
        told = asyncio.wrap_future(work, loop=self)
        work.add_done_callback(self._working.discard)  # after the loop was told: time does not move in between
        return told

    def close(self) -> None:
        super().close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def wait(self, timeout_s: float | None, select: Callable[[float], list[Any]]) -> list[Any]:
        """What is ready now; nothing, and it is later, when a timer is due next. While a thread works, time runs as outside."""
        working = bool(
            self._working
        )  # asked before the look: a thread that ends after it has told the loop by the next look
        if ready := select(0):
            return ready
        if timeout_s is None:
            return self._until_told(select)
        if working:
            began_s, ready = time.perf_counter(), select(min(timeout_s, _LOOK_EVERY_S))
            self._now_s += min(timeout_s, time.perf_counter() - began_s)
        else:
            self._now_s += timeout_s
        self._now_s += _ROUNDING_S
        return ready

    def _until_told(self, select: Callable[[float], list[Any]]) -> list[Any]:
        """No timer is set: only a thread can bring something."""
        for _ in range(int(_STUCK_S / _LOOK_EVERY_S)):
            if ready := select(_LOOK_EVERY_S):
                return ready
        raise RuntimeError("nothing can happen any more: no timer is set, no thread brings anything, and all wait")


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        return self._loop.wait(timeout, super().select)


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time, for tests that are not coroutines themselves."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


class LoopClock:
    """The running loop's time as a `Clock`."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._loop = asyncio.get_running_loop()  # threads ask for the time too
        self._start, self._began_s = start, self._loop.time()

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self.monotonic() - self._began_s)

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))
