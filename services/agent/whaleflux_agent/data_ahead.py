"""Data of jobs that are to start here: pulled while they wait for the node's GPUs, and kept until they start or their claim is over.

Which data that is the scheduler says on each stream, all of it at once; how far it is goes back on the same one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from whaleflux.clock import Clock
from whaleflux.v1 import agent_pb2
from whaleflux_agent.dataset_fetch import Fetch, Unkept
from whaleflux_agent.runtime.api import LaunchFailed

MOST = 1_000  # datasets
AT_ONCE = 4  # on their way: pulls of tasks that wait for theirs find threads and the network's rate left
LOOK_EVERY_S, AGAIN_S = 2.0, 60.0  # while some are on their way; after a failure
_MAX_MESSAGE = 512


class Cache(Protocol):
    """The node's cache of datasets, as far as it is needed here (`datasets.DatasetCache`)."""

    ahead: Mapping[str, str]

    def begin(self, dataset: str) -> Fetch: ...
    async def give_up(self, dataset: str) -> None: ...


@dataclass(slots=True)
class _One:
    """One dataset: its fetch, and what was last seen of it."""

    fetch: Fetch | None = None
    not_before_s: float = 0.0
    seen_s: float = 0.0
    seen_bytes: int = 0
    said: agent_pb2.DataProgress | None = None


class DataAhead:
    """See the module."""

    def __init__(self, cache: Cache, clock: Clock) -> None:
        self._cache, self._clock = cache, clock
        self._wanted: dict[str, _One] = {}
        self._changed = asyncio.Event()
        self._ending = set[asyncio.Task[None]]()  # of pulls that are given up: a source may take its time

    def desire(self, desired: agent_pb2.DesiredData) -> None:
        """All that is to be here; it replaces what was wanted before."""
        jobs = {claim.dataset: claim.job for claim in desired.claims[:MOST]}
        self._wanted = {name: self._wanted.get(name, _One()) for name in jobs}
        self._cache.ahead = jobs
        self._changed.set()

    def report(self) -> agent_pb2.DataReport:
        """How far all of it is, as it was last looked at."""
        return agent_pb2.DataReport(datasets=[one.said for one in self._wanted.values() if one.said is not None])

    async def run(self) -> None:
        """Begins what is missing, and gives up what nobody wants any more."""
        before = frozenset[str]()
        while True:
            self._changed.clear()
            wanted = frozenset(self._wanted)
            for name in sorted(before - wanted):
                self._end(name)
            before = wanted
            for name, one in list(self._wanted.items()):
                self._look_at(name, one)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S if wanted else None):
                    await self._changed.wait()

    def _end(self, name: str) -> None:
        ending = asyncio.create_task(self._cache.give_up(name))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _look_at(self, name: str, one: _One) -> None:
        now_s = self._clock.monotonic()
        if one.fetch is None and now_s >= one.not_before_s and self._on_their_way() < AT_ONCE:
            one.fetch = self._cache.begin(name)
            one.fetch.task.add_done_callback(lambda _: self._changed.set())
            one.seen_s, one.seen_bytes = now_s, 0
        if one.fetch is None:
            return
        if not one.fetch.task.done():
            one.said = self._on_its_way(name, one, now_s)
            return
        one.said = _ended(name, one.fetch)
        if not one.said.ready:
            given_up = one.fetch.progress.stop.is_set()  # for nobody wanted it for a moment
            one.fetch, one.not_before_s = None, now_s + (0.0 if given_up else AGAIN_S)

    def _on_their_way(self) -> int:
        fetches = (one.fetch for one in self._wanted.values())
        return len(self._ending) + sum(fetch is not None and not fetch.task.done() for fetch in fetches)

    @staticmethod
    def _on_its_way(name: str, one: _One, now_s: float) -> agent_pb2.DataProgress:
        assert one.fetch is not None
        progress = one.fetch.progress
        rate = (progress.pulled_bytes - one.seen_bytes) / (now_s - one.seen_s) if now_s > one.seen_s else 0.0
        one.seen_s, one.seen_bytes = now_s, progress.pulled_bytes
        total = progress.total_bytes
        return agent_pb2.DataProgress(
            dataset=name, done_bytes=min(progress.done_bytes, total), size_bytes=total, bytes_per_s=max(0.0, rate)
        )


def _ended(name: str, fetch: Fetch) -> agent_pb2.DataProgress:
    """What became of it."""
    try:
        copy = fetch.task.result()
    except (LaunchFailed, Unkept) as failed:
        return agent_pb2.DataProgress(dataset=name, message=str(failed)[:_MAX_MESSAGE])
    except asyncio.CancelledError:
        return agent_pb2.DataProgress(dataset=name, message="its pull was stopped")
    size = copy.size_bytes
    return agent_pb2.DataProgress(dataset=name, done_bytes=size, size_bytes=size, ready=True)
