"""The store of code on NATS JetStream: replicated and durable as the events are, and there already.

A stream of its own holds each chunk as the only message of its subject `code.{digest}.{upload}.{index}`, and a record beside them,
`code.{digest}.record`, which alone decides what is there and whose chunks it is: it is compared and swapped. JetStream's own object store reads an object
from its beginning through a consumer; here any chunk is one request, so that a broken download goes on where it stopped.
The stream refuses what does not fit (an object that lost its first chunks would be worse than none).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import TypeVar

import nats.errors
import nats.js.errors
from nats.js.api import DiscardPolicy, Header, RawStreamMsg, StorageType, StreamConfig

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.code.api import StoredCode
from whaleflux.code.memory import deleted_meanwhile, store_full
from whaleflux.errors import FailedPrecondition, NotFound, StatusError, Unavailable
from whaleflux.events.nats import NatsBus
from whaleflux.reasons import ErrorReason

T = TypeVar("T")
STREAM = "CODE"
DEFAULT_MAX_BYTES = 2 << 30
_RECORD = "record"
_RACES = 8
# the server's error codes
_NO_STREAM, _OTHER_SEQUENCE, _FULL = 10059, 10071, 10077


class NatsCode:
    """See `code.api.CodeStore`."""

    def __init__(self, bus: NatsBus, clock: Clock, max_bytes: int = DEFAULT_MAX_BYTES, replicas: int = 1) -> None:
        self._bus, self._clock, self.max_bytes = bus, clock, max_bytes
        self._config = StreamConfig(
            name=STREAM,
            subjects=[f"code.*.{_RECORD}", "code.*.*.*"],
            storage=StorageType.FILE,
            max_bytes=max_bytes,
            discard=DiscardPolicy.NEW,
            max_msgs_per_subject=1,
            allow_direct=True,
            num_replicas=replicas,
        )
        self._made = False

    async def find(self, digest: str) -> StoredCode | None:
        found = await self._record(digest)
        return found if found is not None and found.whole else None

    async def begin(self, digest: str, size_bytes: int) -> str:
        seen = 0
        for _ in range(_RACES):
            known = await self._record(digest)
            if known is not None and known.whole:
                if 0 < seen < known.version or await self._put(replace(known, kept=self._clock.now())):
                    return ""  # kept by us, or by somebody else since we looked
                seen = known.version
                continue
            version = known.version if known is not None else 0
            if await self._put(StoredCode(digest, size_bytes, False, self._clock.now(), version)):
                return names.ulid()
        raise _contended(digest)

    async def write(self, digest: str, upload: str, index: int, chunk: bytes) -> None:
        await self._publish(f"code.{digest}.{upload}.{index}", chunk)

    async def finish(self, digest: str, upload: str, size_bytes: int) -> StoredCode:
        for _ in range(_RACES):
            known = await self._record(digest)
            if known is None or known.size_bytes < 0:
                raise deleted_meanwhile(digest)
            if known.whole:
                await self.abandon(digest, upload)
                return known
            done = StoredCode(digest, size_bytes, True, self._clock.now(), known.version, upload)
            if await self._put(done):
                return done
        raise _contended(digest)

    async def abandon(self, digest: str, upload: str) -> None:
        js = self._bus.jetstream()
        await self._with_stream(lambda: js.purge_stream(STREAM, subject=f"code.{digest}.{upload}.*"))

    async def read(self, code: StoredCode, index: int) -> bytes:
        message = await self._get(f"code.{code.digest}.{code.upload}.{index}")
        if message is None:
            raise NotFound("code", code.digest)
        return message.data or b""

    async def keep(self, digest: str, holder: str = "") -> bool:
        seen = 0
        for _ in range(_RACES):
            known = await self._record(digest)
            if known is None or not known.whole or (holder and holder not in known.holders):
                return False
            if 0 < seen < known.version or await self._put(replace(known, kept=self._clock.now())):
                return True  # by us, or by somebody else since we looked
            seen = known.version
        raise _contended(digest)

    async def admit(self, digest: str, holder: str) -> bool:
        for _ in range(_RACES):
            known = await self._record(digest)
            if known is None or not known.whole:
                return False
            if await self._put(replace(known, kept=self._clock.now(), holders=known.with_holder(holder))):
                return True
        raise _contended(digest)

    async def list(self) -> list[StoredCode]:
        js = self._bus.jetstream()
        info = await self._with_stream(lambda: js.stream_info(STREAM, subjects_filter=f"code.*.{_RECORD}"))
        subjects = info.state.subjects or {}
        found = [await self._record(subject.split(".")[1]) for subject in subjects]
        return [one for one in found if one is not None]

    async def delete(self, code: StoredCode) -> bool:
        """A mark in place of the record first: what is written behind it is not touched by the purge that follows."""
        mark = await self._swap(replace(code, size_bytes=-1, whole=False))
        if mark is None:
            return False
        js, subject = self._bus.jetstream(), f"code.{code.digest}.>"
        await self._with_stream(lambda: js.purge_stream(STREAM, seq=mark + 1, subject=subject))
        return True

    async def _record(self, digest: str) -> StoredCode | None:
        message = await self._get(f"code.{digest}.{_RECORD}", newest=True)
        if message is None:
            return None
        kept = json.loads(message.data or b"{}")
        when = datetime.fromisoformat(kept["kept"])
        return StoredCode(
            digest,
            int(kept["size_bytes"]),
            bool(kept["whole"]),
            when,
            int(message.seq or 0),
            str(kept["upload"]),
            tuple(map(str, kept.get("holders", ()))),
        )

    async def _put(self, code: StoredCode) -> bool:
        return await self._swap(code) is not None

    async def _swap(self, code: StoredCode) -> int | None:
        """Writes a record in place of the version that it names; None when there is another one."""
        content = {
            "size_bytes": code.size_bytes, "whole": code.whole, "kept": code.kept.isoformat(), "upload": code.upload,
            "holders": code.holders,
        }  # fmt: skip
        headers = {str(Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value): str(code.version)}
        try:
            return await self._publish(f"code.{code.digest}.{_RECORD}", json.dumps(content).encode(), headers)
        except FailedPrecondition as refused:
            if _error_code(refused) != _OTHER_SEQUENCE:
                raise
            return None

    async def _publish(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> int:
        js = self._bus.jetstream()
        try:
            taken = await self._with_stream(lambda: js.publish(subject, data, headers=headers))
        except StatusError as refused:
            if _error_code(refused) == _FULL:
                raise store_full(self.max_bytes) from None
            raise
        return int(taken.seq)

    async def _get(self, subject: str, *, newest: bool = False) -> RawStreamMsg | None:
        """The message of a subject; `newest` asks the stream's leader, others may be a moment behind."""
        js = self._bus.jetstream()
        try:
            return await self._with_stream(lambda: js.get_last_msg(STREAM, subject, direct=not newest))
        except StatusError as refused:
            if isinstance(refused.__cause__, nats.js.errors.NotFoundError):  # the stream is there, see `_with_stream`
                return None
            raise

    async def _with_stream(self, call: Callable[[], Awaitable[T]]) -> T:
        """The answer; the stream is made before the first call, and again when the server came back without it."""
        if not self._made:
            await self._make()
        try:
            return await self._bus.call(call())
        except FailedPrecondition as refused:
            if _error_code(refused) != _NO_STREAM:
                raise
        except Unavailable as away:
            if not isinstance(away.__cause__, nats.js.errors.NoStreamResponseError | nats.errors.NoRespondersError):
                raise
        await self._make()
        return await self._bus.call(call())

    async def _make(self) -> None:
        """Changes it where it is there: the server would count its bytes twice if it were asked to make it again."""
        js = self._bus.jetstream()
        try:
            await self._bus.call(js.update_stream(self._config))
        except FailedPrecondition as refused:
            if _error_code(refused) != _NO_STREAM:
                raise
            await self._bus.call(js.add_stream(self._config))
        self._made = True


def _error_code(error: StatusError) -> int:
    """The server's own number for what it refused; 0 where it said nothing."""
    return int(getattr(error.__cause__, "err_code", 0) or 0)


def _contended(digest: str) -> Unavailable:
    return Unavailable(f"code {digest[:12]} keeps changing; try again", reason=ErrorReason.BUS_UNAVAILABLE)
