"""What attempts that failed had saved by then: asked once for each, of the checkpoint service."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

from whaleflux import telemetry
from whaleflux.errors import StatusError
from whaleflux.telemetry import Event
from whaleflux.v1 import checkpoint_pb2
from whaleflux_console.core.chronicle import JobFacts
from whaleflux_console.core.facts import Attempt

_log = telemetry.get_logger("whaleflux.console.saves")
_MOST_WAITING = 10_000
_AT_ONCE = 20
_CALL_S = 5.0
_PAGE, _MOST_PAGES = 500, 20
_SAVED = frozenset(  # an expired one was there when the attempt failed
    {
        checkpoint_pb2.CHECKPOINT_STATE_COMMITTED,
        checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED,
        checkpoint_pb2.CHECKPOINT_STATE_EXPIRED,
    }
)


class Saves:
    """Bounded: of more jobs than fit the oldest wait no longer, and what they lost is told as a bound."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint
        self._waiting: OrderedDict[str, JobFacts] = OrderedDict()
        self._saved: OrderedDict[tuple[str, int], tuple[int, int]] = OrderedDict()  # uid, attempt -> step, when

    def known(self, facts: JobFacts) -> JobFacts:
        """The job with what is known of its saves; what is not is asked."""
        if any(one.failed and (one.uid, one.attempt) not in self._saved for one in facts.attempts):
            self._waiting[facts.name] = facts
            self._bound(self._waiting)
        return replace(facts, attempts=tuple(self._with_save(one) for one in facts.attempts))

    async def look_up(self) -> list[JobFacts]:
        """Asks for some of those that wait; returns the jobs of which more is known now."""
        found = []
        for name in list(self._waiting)[:_AT_ONCE]:
            facts = self._waiting[name]
            try:
                await self._ask(facts)
            except StatusError as error:
                _log.info(Event.FEED_BROKEN, feed="checkpoint", reason=error.reason)
                break
            if self._waiting.get(name) is facts:
                del self._waiting[name]
            found.append(replace(facts, attempts=tuple(self._with_save(one) for one in facts.attempts)))
        return found

    async def _ask(self, facts: JobFacts) -> None:
        saved = await self._saves_of(facts.name)
        for one in facts.attempts:
            if one.failed and one.end_ms is not None:
                within = [(step, ms) for step, ms in saved if one.allocate_ms <= ms <= one.end_ms]
                self._saved[one.uid, one.attempt] = max(within, default=(0, 0))
                self._bound(self._saved)

    async def _saves_of(self, job: str) -> list[tuple[int, int]]:
        """Step and time of each save."""
        found: list[tuple[int, int]] = []
        request = checkpoint_pb2.ListCheckpointsRequest(parent=job, page_size=_PAGE)
        for _ in range(_MOST_PAGES):
            listed = await self._checkpoint.ListCheckpoints(request, timeout=_CALL_S)
            found += [
                (each.step, each.commit_time.ToMilliseconds())
                for each in listed.checkpoints
                if each.state in _SAVED and each.HasField("commit_time")
            ]
            request.page_token = listed.next_page_token
            if not request.page_token:
                break
        return found

    def _with_save(self, one: Attempt) -> Attempt:
        step, at_ms = self._saved.get((one.uid, one.attempt), (0, 0))
        return replace(one, last_saved_step=step, last_saved_ms=at_ms) if at_ms else one

    def _bound(self, kept: OrderedDict[Any, Any]) -> None:
        while len(kept) > _MOST_WAITING:
            kept.popitem(last=False)
