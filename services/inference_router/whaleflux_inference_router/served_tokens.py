"""What engines say that they have served: asked when somebody wants to know, each engine now and then at most."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from whaleflux.clock import Clock
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert
from whaleflux_inference_router.core.engine_counters import TokenCounters, token_counters
from whaleflux_inference_router.core.replicas import State
from whaleflux_inference_router.engine_probe import EngineProbe, HttpProbe

ASKED_EVERY_S = 5.0
_AT_ONCE = 64
_MOST_KNOWN = 10_000
_ANSWERS = (State.READY, State.DRAINING)


class ServedTokens:
    """Lives as long as its process; keeps what it was told last by address."""

    def __init__(self, clock: Clock, probe: EngineProbe | None = None) -> None:
        self._clock, self._probe = clock, probe or HttpProbe()
        self._known: dict[str, tuple[float, TokenCounters]] = {}
        self._asking = asyncio.Semaphore(_AT_ONCE)

    async def add_to(self, replicas: Iterable[pb.Replica]) -> None:
        """Sets what their engines tell; what is not told stays unset."""
        asked = [one for one in replicas if one.address and convert.state_of(one) in _ANSWERS]
        counted = await asyncio.gather(*(self._of(one.address) for one in asked))
        for replica, counters in zip(asked, counted, strict=True):
            if counters.input_tokens is not None:
                replica.input_tokens = counters.input_tokens
            if counters.output_tokens is not None:
                replica.output_tokens = counters.output_tokens

    async def _of(self, address: str) -> TokenCounters:
        async with self._asking:
            at_s, known = self._known.pop(address, (float("-inf"), TokenCounters()))
            if self._clock.monotonic() - at_s >= ASKED_EVERY_S:
                text = await self._probe.metrics(address)  # a tenant's, and as long as it likes up to a limit
                at_s, known = self._clock.monotonic(), await asyncio.to_thread(token_counters, text)
            self._known[address] = at_s, known
            while len(self._known) > _MOST_KNOWN:
                del self._known[next(iter(self._known))]
            return known
