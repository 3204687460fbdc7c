"""A watch over etcd that survives its server and proves that nothing was left out."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import Any

from aetcd import rpc

from whaleflux.errors import Compacted, FailedPrecondition, PermissionDenied
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff
from whaleflux.store.api import Batch
from whaleflux.store.etcd.messages import event_of, range_of
from whaleflux.store.etcd.watch_stream import BehindError, BrokenError, Inbox, WatchStreams

log = logging.getLogger(__name__)

_BEHIND_LIMIT = 5  # streams in a row from members that know less than was told: no lag, but lost history
_RETRY = Backoff()


class Watch:
    """A watch that survives its server: every revision exactly once, in order, whole.

    It resumes with the last *delivered* revision, which must come again as it was: a server that forgot what it told (a
    restored backup, or one before 3.5.5 that was killed) has another history, and then the caller lists again. Progress
    proves that the server lives; it becomes a bookmark only when it came in order with the events (see `_bookmark`),
    and never moves the resume point.
    """

    def __init__(self, streams: WatchStreams, prefix: str, after: int) -> None:
        self._streams = streams
        key, range_end = range_of(prefix)
        # Fragments bound a message; an answer counts only when its last part is there.
        self._create = rpc.WatchCreateRequest(key=key, range_end=range_end, fragment=True, progress_notify=True)
        self._after = self._told = after
        self._last: Batch | None = None  # with events
        self._cluster_id = self._times_behind = 0
        self._began_at = 0  # the store's revision when the watch began on the stream in hand

    async def run(self) -> AsyncGenerator[Batch, None]:
        failures = 0
        while True:
            try:
                async with contextlib.aclosing(self._stream()) as stream:
                    async for batch in stream:
                        failures = 0
                        self._told = batch.revision
                        self._last = batch if batch.events else self._last
                        yield batch
            except BrokenError as reason:
                log.info("watch of %s broke after revision %d: %s", self._create.key, self._told, reason)
            failures += 1
            await asyncio.sleep(_RETRY.pause_s(failures))

    async def _stream(self) -> AsyncGenerator[Batch, None]:
        start = self._last.revision if self._last else self._after + 1
        create = rpc.WatchCreateRequest(start_revision=start)
        create.MergeFrom(self._create)
        async with self._streams.watching(create) as inbox, contextlib.aclosing(self._responses(inbox)) as responses:
            repeated = self._last
            async for response, batches in responses:
                if not batches and self._bookmark(response, ordered=inbox.ordered):
                    batches = (Batch(response.header.revision),)
                if batches and repeated:  # what was delivered last comes again, before all else
                    self._check_repeated(repeated, batches[0])
                    batches, repeated = batches[1:], None
                for batch in batches:
                    yield batch

    async def _responses(self, inbox: Inbox) -> AsyncGenerator[tuple[Any, tuple[Batch, ...]], None]:
        """Each whole answer with its revisions; the parts of a fragmented one are put together."""
        events: list[Any] = []
        while True:
            response = self._checked(await inbox.get())
            events.extend(response.events)
            if not response.fragment:
                groups = itertools.groupby(events, lambda event: event.kv.mod_revision)
                yield response, tuple(Batch(revision, tuple(map(event_of, group))) for revision, group in groups)
                events = []

    def _checked(self, response: Any) -> Any:
        self._check_cluster(response.header.cluster_id)
        if response.compact_revision:
            raise Compacted(response.compact_revision)
        if response.created:
            self._began_at = response.header.revision
            self._check_position(response.header.revision)
        if response.canceled:
            if "permission denied" in response.cancel_reason:
                raise PermissionDenied(f"etcd: {response.cancel_reason}")
            raise BrokenError(response.cancel_reason)
        return response

    def _check_cluster(self, cluster_id: int) -> None:
        self._cluster_id = self._cluster_id or cluster_id
        if cluster_id != self._cluster_id:
            told = f"the endpoints belong to cluster {cluster_id:x}, the watch began on {self._cluster_id:x}"
            raise FailedPrecondition(f"{told}; restart on one cluster", reason=ErrorReason.STORE_REPLACED)

    def _check_position(self, revision: int) -> None:
        """A member may lag behind what another one has told, but not for long."""
        self._times_behind = self._times_behind + 1 if revision < self._told else 0
        if self._times_behind > _BEHIND_LIMIT:
            log.error("etcd is at revision %d and has told %d before: it lost history", revision, self._told)
            raise Compacted(revision)
        if self._times_behind:
            raise BehindError(f"this member is at revision {revision}, {self._told} is known")

    def _check_repeated(self, last: Batch, again: Batch) -> None:
        if again != last:
            log.error("etcd tells revision %d otherwise than before: it lost history", last.revision)
            raise Compacted(again.revision)

    def _bookmark(self, response: Any, *, ordered: bool) -> bool:
        """Whether this answer proves that all events up to its revision have been read.

        Periodic notices (under the watch's own id) come in order with events. Answers to our questions (id -1) do so
        only since 3.5.8: before, they have been seen thousands of revisions ahead of events not yet delivered. And since
        watches share a stream, an answer may be to a question from before this one began, unless its revision is a later one.
        """
        revision = response.header.revision
        in_order = ordered and revision > self._began_at if response.watch_id == -1 else not response.created
        return in_order and bool(revision > self._told)
