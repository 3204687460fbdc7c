"""Code on its way: from who submits into the store, from the store to the agents that start it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator

from whaleflux.code.api import CodeStore, StoredCode
from whaleflux.code.limits import CHUNK_BYTES, DIGEST, MAX_PACKED_BYTES
from whaleflux.code.memory import deleted_meanwhile
from whaleflux.errors import (
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    StatusError,
    Unavailable,
)
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth, roles
from whaleflux.trust import ownership
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core.model import ACTIVE, Job
from whaleflux_scheduler.jobs import Jobs

UPLOADS, DOWNLOADS = 16, 64  # at a time, of one replica; each holds a chunk or two in memory
SILENCE_S = 30.0  # between two messages of an upload
UPLOAD_S = 900.0  # for all of one: whoever sends a byte now and then keeps others out
_LARGEST_MESSAGE_BYTES = 1 << 20


class CodeTransfer:
    """Bounded in number, size and time. `store` None: this fleet has no event bus, and so no place for code."""

    def __init__(self, store: CodeStore | None, jobs: Jobs) -> None:
        self._maybe_store, self._jobs = store, jobs
        self._uploads, self._downloads = _Slots(UPLOADS), _Slots(DOWNLOADS)

    @property
    def _store(self) -> CodeStore:
        if self._maybe_store is None:
            raise FailedPrecondition(
                "this fleet has no place for code (its scheduler has no event bus: setting nats); "
                "say `workdir: none` and use an image, or a `directory` on the nodes",
                reason=ErrorReason.CODE_MISSING,
            )
        return self._maybe_store

    async def get(self, digest: str) -> pb.Code:
        """What is stored under a digest that the caller has shown. Raises NotFound: others' code is not told of, either."""
        ownership.note_asked()
        found = await self._store.find(_checked(digest))
        if found is None or _holder() not in found.holders:
            raise NotFound("code", digest, "send it with UploadCode")
        return _message(found)

    async def hold(self, digest: str) -> None:
        """Sees to it that a job which is about to be stored finds its code. Raises FailedPrecondition with CODE_MISSING."""
        if not await self._store.keep(digest, _holder()):
            raise FailedPrecondition(
                f"the code {digest[:12]} of this job is not stored by you; send it first: whaleflux submit does, or UploadCode",
                reason=ErrorReason.CODE_MISSING,
                metadata={"digest": digest},
            )

    async def upload(self, requests: AsyncIterator[pb.UploadCodeRequest]) -> pb.Code:
        """Stores what is sent, if it is what the first message announced; twice the same is stored once."""
        try:
            with self._uploads:
                async with asyncio.timeout(UPLOAD_S):
                    return await self._stored(requests)
        except TimeoutError:
            slow = f"the upload took longer than {UPLOAD_S / 60:g} min; send it over a faster connection, or send less"
            raise Unavailable(slow, reason=ErrorReason.TOO_MANY) from None

    async def _stored(self, requests: AsyncIterator[pb.UploadCodeRequest]) -> pb.Code:
        store = self._store
        first = await _next(requests)
        if first is None:
            raise InvalidArgument(FieldViolation("digest", "must be in the first message"))
        digest, size_bytes = _checked(first.digest), _checked_size(first.size_bytes)
        if await store.keep(digest, _holder()):
            return pb.Code(digest=digest, size_bytes=size_bytes)
        upload, pieces = await store.begin(digest, size_bytes), _rechunked(first, requests, size_bytes)
        try:
            await self._written(digest, upload, pieces)
        except BaseException:
            with contextlib.suppress(StatusError):  # what is left goes with the digest's record
                await asyncio.shield(store.abandon(digest, upload) if upload else asyncio.sleep(0))
            raise
        if upload:
            await store.finish(digest, upload, size_bytes)
        if not await store.admit(digest, _holder()):
            raise deleted_meanwhile(digest)
        return pb.Code(digest=digest, size_bytes=size_bytes)

    async def _written(self, digest: str, upload: str, pieces: AsyncGenerator[bytes, None]) -> None:
        """Stores the chunks. Raises FailedPrecondition where they are not what was announced.

        Without an upload they are there already, and whoever sends them shows that they have them, too.
        """
        seen, index = hashlib.sha256(), 0
        async with contextlib.aclosing(pieces) as chunks:
            async for chunk in chunks:
                seen.update(chunk)
                if upload:
                    await self._store.write(digest, upload, index, chunk)
                index += 1
        if seen.hexdigest() != digest:
            raise _damaged(f"the bytes have the digest {seen.hexdigest()[:12]}, announced was {digest[:12]}")

    async def download(self, request: pb.DownloadCodeRequest) -> AsyncGenerator[pb.DownloadCodeResponse, None]:
        """The code of a job from an offset on, for the agent of a node that a task of it is placed on."""
        job = (await self._jobs.placed(request.job)).value
        check_placed(job, request.epoch)
        with self._downloads:
            found = await self._store.find(job.spec.code) if job.spec.code else None
            if found is None:
                raise NotFound("code", job.spec.code or job.name, "submit the job again: that sends it")
            if not 0 <= request.offset <= found.size_bytes:
                raise InvalidArgument(FieldViolation("offset", f"{request.offset} is not in 0 to {found.size_bytes}"))
            yield pb.DownloadCodeResponse(size_bytes=found.size_bytes)
            skipped = request.offset % CHUNK_BYTES
            for index in range(request.offset // CHUNK_BYTES, found.chunks):
                chunk = await self._store.read(found, index)
                yield pb.DownloadCodeResponse(size_bytes=found.size_bytes, data=chunk[skipped:])
                skipped = 0


class _Slots:
    """At most so many blocks at a time; one more is refused."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0

    def __enter__(self) -> None:
        if self._taken >= self._most:
            busy = f"{self._most} transfers of code are under way; try again"
            raise ResourceExhausted(busy, reason=ErrorReason.TOO_MANY, retry_after_s=1.0)
        self._taken += 1

    def __exit__(self, *_: object) -> None:
        self._taken -= 1


async def _next(requests: AsyncIterator[pb.UploadCodeRequest]) -> pb.UploadCodeRequest | None:
    """The next message; None at the end. Whoever falls silent is cut off."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await anext(requests, None)
    except TimeoutError:
        raise Unavailable(f"no more came for {SILENCE_S:g} s; send it again", reason=ErrorReason.TOO_MANY) from None


async def _rechunked(
    first: pb.UploadCodeRequest, requests: AsyncIterator[pb.UploadCodeRequest], size_bytes: int
) -> AsyncGenerator[bytes, None]:
    """The bytes in the store's chunks. Raises InvalidArgument when they are not as many as announced."""
    waiting, received = bytearray(), 0
    message: pb.UploadCodeRequest | None = first
    while message is not None:
        received += len(message.data)
        if len(message.data) > _LARGEST_MESSAGE_BYTES or received > size_bytes:
            raise _damaged(f"{received} bytes came, {size_bytes} were announced; at most 1 MiB in a message")
        waiting += message.data
        while len(waiting) >= CHUNK_BYTES:
            yield bytes(waiting[:CHUNK_BYTES])
            del waiting[:CHUNK_BYTES]
        message = await _next(requests)
    if received != size_bytes:
        raise _damaged(f"{received} bytes came, {size_bytes} were announced")
    if waiting:
        yield bytes(waiting)


def check_placed(job: Job, epoch: int) -> None:
    """Refuses agents without a task of the job in this attempt: its code and secrets are nobody else's business."""
    ownership.note_asked()
    node = auth.caller().node
    attempt = job.attempt
    placed = attempt is not None and attempt.epoch == epoch and job.state in ACTIVE
    if not placed or attempt is None or not any(task.node == node and not task.over for task in attempt.tasks):
        raise PermissionDenied(
            f"no task of {job.name} in epoch {epoch} is placed on {node}", reason=ErrorReason.NOT_OWN_NODE
        )


def _holder() -> str:
    """The caller as a holder of code: people by name, whatever their role is today."""
    who = auth.caller()
    return f"people/{who.name}" if who.role in roles.HUMANS else who.subject


def _checked(digest: str) -> str:
    if not DIGEST.fullmatch(digest):
        raise InvalidArgument(FieldViolation("digest", "must be the sha256 of all bytes, 64 hexadecimal digits"))
    return digest


def _checked_size(size_bytes: int) -> int:
    if not 0 < size_bytes <= MAX_PACKED_BYTES:
        raise InvalidArgument(FieldViolation("size_bytes", f"{size_bytes} is not in 1 to {MAX_PACKED_BYTES}"))
    return size_bytes


def _damaged(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"{what}; nothing was stored, send it again", reason=ErrorReason.CODE_DAMAGED)


def _message(code: StoredCode) -> pb.Code:
    return pb.Code(digest=code.digest, size_bytes=code.size_bytes)
