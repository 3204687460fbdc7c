"""The one way into the planner: one piece of work at a time is inside, and a bounded line of questions waits outside.

Work goes to the planner's thread. A caller that stops waiting does not stop it: what was begun is finished before anything else
begins. Questions are taken one at a time, so that a decision waits for one of them at most. The decisions of a small fleet are made
where the event loop stands, when the thread has nothing to do: two threads that hand the interpreter to each other take far longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TypeVar

from whaleflux.clock import Clock
from whaleflux.errors import ResourceExhausted, Unavailable
from whaleflux.manifests.job_fields import Spec
from whaleflux.reasons import ErrorReason
from whaleflux_scheduler.core.plan import Move, News, Plan

MOST_QUESTIONS = 64  # that wait for their turn
SMALL_FLEET, SMALL_BUDGET_S = 256, 0.004  # nodes; how long such a decision may keep the event loop
BUDGET_S = 0.05  # of any other
T = TypeVar("T")


class PlannerThread:
    """See the module."""

    def __init__(self, clock: Clock, plan: Plan | None = None) -> None:
        self._planner = plan or Plan(clock.monotonic)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._unended = 0  # pieces of work that its thread has not ended yet, whoever still waits for them
        self._turn = asyncio.Semaphore(1)  # of the questions
        self._questions = 0
        self._over = False

    def shutdown(self) -> None:
        """The leadership is over: what is under way ends by itself, what waits is refused."""
        self._over = True
        self._worker.shutdown(wait=False, cancel_futures=True)

    @property
    def waiting(self) -> int:
        """Jobs that wait for GPUs."""
        return self._planner.waiting

    @property
    def unfinished(self) -> bool:
        """True when the last decision ran out of time before it had answered every job."""
        return self._planner.unfinished

    @property
    def next_look(self) -> datetime | None:
        """When the plan has to be asked again, whatever comes until then."""
        return self._planner.next_look

    def could_hold(self, queue: str, spec: Spec) -> bool:
        """As the planner's; needs no turn."""
        return self._planner.could_hold(queue, spec)

    async def step(self, news: News, now: datetime) -> list[Move]:
        """As the plan's: takes in what changed, and decides."""
        if not self._unended and self._planner.nodes <= SMALL_FLEET and not self._planner.unfinished:
            return self._planner.step(news, now, SMALL_BUDGET_S)
        return await asyncio.shield(self._in_thread(lambda plan: plan.step(news, now, BUDGET_S)))

    def _in_thread(self, work: Callable[[Plan], T]) -> asyncio.Future[T]:
        """Ends when the work has ended, and is cancelled by nobody who waits for it: shield it."""
        self._unended += 1
        ending = asyncio.get_running_loop().run_in_executor(self._worker, work, self._planner)
        ending.add_done_callback(self._ended)
        return ending

    def _ended(self, ending: asyncio.Future[T]) -> None:
        self._unended -= 1
        if not ending.cancelled():
            ending.exception()  # who asked may have left

    async def ask(self, question: Callable[[Plan], T]) -> T:
        """The answer to `question`, which has the planner for itself while it runs.

        Raises ResourceExhausted when too many wait, Unavailable when this leadership ends before it is answered.
        """
        if self._questions >= MOST_QUESTIONS:
            raise ResourceExhausted(
                f"{MOST_QUESTIONS} questions to the planner are waiting; ask again later",
                reason=ErrorReason.PLANNER_BUSY,
                retry_after_s=1.0,
            )
        self._questions += 1
        try:
            await self._turn.acquire()
        finally:
            self._questions -= 1
        if self._over:
            self._turn.release()
            raise _over()
        answer = self._in_thread(question)
        answer.add_done_callback(lambda _: self._turn.release())
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if self._over and answer.cancelled():  # by the end of the leadership, not by the asker
                raise _over() from None
            raise


def _over() -> Unavailable:
    return Unavailable("this scheduler leads no longer; ask again", reason=ErrorReason.NOT_LEADER, retry_after_s=0.2)
