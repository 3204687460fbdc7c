"""Pieces of datasets for other agents of the site, on the agent's own mTLS port.

Given away is only what was compared with its digest, of whole copies and of those on their way, and only of datasets that everybody may
use, that whoever may say so pinned to the asking node, or that a job of somebody who may use it reads there. What anything else is, is not
found.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.data.manifest import chunks_of
from whaleflux.errors import DeadlineExceeded, FieldViolation, InvalidArgument, NotFound, ResourceExhausted, StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.retry import worth_repeating
from whaleflux.rpc import auth
from whaleflux.trust import ownership
from whaleflux.v1 import agent_pb2, agent_pb2_grpc, inventory_pb2, inventory_pb2_grpc
from whaleflux_agent.dataset_files import FIXED_NS
from whaleflux_agent.dataset_store import Held, made_of

MAX_STRETCH_BYTES = 256 << 20  # of one read, which holds a place for as long as it takes
MAX_READS, MAX_WAITING = 8, 64  # at a time; the node's disk and network are its own work's first
_MESSAGE_BYTES = 1 << 20
_MIN_BYTES_PER_S = 256 << 10  # of a reader; a slower one is cut off
_CALL_S, _WAIT_S = 5.0, 3.0
_MOVES, _MOVED_S = 20, 0.1  # how often, and how soon, a file is looked for that is being moved
_KNOWN_S, _MAX_KNOWN = 5.0, 256  # what inventory said of a dataset, and of how many
_PIECE = "piece"


Holding = Callable[[str, str], Held | None]
"""What is here of datasets/{dataset} in the version of that digest (`DatasetCache.held`)."""
Reads = Callable[[str, str, str], Awaitable[bool]]
"""Whether a node reads a dataset for a job of somebody who may (`DatasetReaders.reads`)."""


class PieceServicer(agent_pb2_grpc.PieceServiceServicer):
    """Asks inventory whose business a dataset is, at most each 5 s."""

    def __init__(
        self, node: str, held: Holding, inventory: inventory_pb2_grpc.InventoryServiceStub, clock: Clock, reads: Reads
    ) -> None:
        self._node, self._held, self._inventory, self._clock, self._reads_for = node, held, inventory, clock, reads
        self._known: OrderedDict[str, tuple[float, inventory_pb2.Dataset]] = OrderedDict()
        self._reads, self._waiting = asyncio.Semaphore(MAX_READS), 0

    async def ListPieces(self, request: agent_pb2.ListPiecesRequest, context: Any) -> agent_pb2.ListPiecesResponse:
        held = await self._given(request)
        size = (held.manifest.chunk_count + 7) // 8
        return agent_pb2.ListPiecesResponse(
            chunks=held.have.to_bytes(size, "little"), coming=held.coming.to_bytes(size, "little")
        )

    async def ReadPiece(
        self, request: agent_pb2.ReadPieceRequest, context: Any
    ) -> AsyncIterator[agent_pb2.ReadPieceResponse]:
        held = await self._given(request)
        _check_stretch(request, held)
        limit_s = _CALL_S + request.size_bytes / _MIN_BYTES_PER_S
        try:
            async with self._reading(), asyncio.timeout(limit_s):
                number = await self._opened(held, request)
                try:
                    async for data in _read(number, request):
                        yield agent_pb2.ReadPieceResponse(data=data)
                finally:
                    os.close(number)
        except TimeoutError:
            raise DeadlineExceeded(f"{request.path} was not read within {limit_s:.0f} s") from None

    async def _opened(self, held: Held | None, request: agent_pb2.ReadPieceRequest) -> int:
        """A descriptor of the file; the files of a copy that has just become whole are found where they are now. Raises NotFound."""
        made = held.made if held else ""
        for _ in range(_MOVES):
            if held is None or held.made != made:
                break
            if (number := await asyncio.to_thread(_open, held, request.path)) >= 0:
                return number
            await asyncio.sleep(0 if held.settled else _MOVED_S)
            held = self._held(request.dataset, request.manifest_digest)
        raise NotFound(_PIECE, request.path)

    async def _given(self, request: agent_pb2.ListPiecesRequest | agent_pb2.ReadPieceRequest) -> Held:
        """What is here of it, for who may have it. Raises NotFound, which says no more to who may not."""
        dataset, digest, node = request.dataset, request.manifest_digest, request.node
        names.split(dataset, "datasets", field="dataset")
        auth.require_own_node(node)
        if request.job:
            names.split(request.job, "queues", "jobs", field="job")
        ownership.note_asked()
        held = self._held(dataset, digest)
        near = names.top(node) == names.top(self._node)
        if held is None or not near or not await self._may_have(node, dataset, digest, held.made, request.job):
            raise NotFound(_PIECE, f"{dataset} on {self._node}")
        return held

    async def _may_have(self, node: str, name: str, digest: str, made: str, job: str) -> bool:
        """`made`: of which dataset of the name it is what is here; who may read a later one may not for that read these bytes."""
        dataset = await self._dataset(name, digest)
        if dataset is None or digest not in ("", dataset.manifest_digest) or dataset.HasField("credentials"):
            return False
        if made_of(dataset) != made:
            return False
        return not dataset.members or node in self._pinned(dataset) or await self._reads_for(node, name, job)

    def _pinned(self, dataset: inventory_pb2.Dataset) -> set[str]:
        now = self._clock.now()
        live = (p for p in dataset.pins if not p.HasField("expire_time") or p.expire_time.ToDatetime(UTC) > now)
        return {pin.node for pin in live}

    async def _dataset(self, name: str, digest: str) -> inventory_pb2.Dataset | None:
        """The record, as inventory said within some seconds, or last while it does not answer.

        A version that it did not know of then may be known by now; while there is none, all who wait for it ask often, and for none.
        """
        asked_s, known = self._known.get(name, (float("-inf"), None))
        if known and (known.manifest_digest or not digest) and self._clock.monotonic() - asked_s < _KNOWN_S:
            return known
        try:
            found: inventory_pb2.Dataset = await self._inventory.GetDataset(
                inventory_pb2.GetDatasetRequest(name=name), timeout=_CALL_S
            )
        except NotFound:
            self._known.pop(name, None)
            return None
        except StatusError as failed:
            if known is None or not worth_repeating(failed):
                raise
            return known
        self._known[name] = (self._clock.monotonic(), found)
        self._known.move_to_end(name)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return found

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        """One of the few reads at a time. Raises ResourceExhausted when that takes too long, or too many wait."""
        busy = ResourceExhausted(
            f"{self._node} gives {MAX_READS} pieces at a time; ask another",
            reason=ErrorReason.TOO_OFTEN,
            retry_after_s=1.0,
        )
        if self._waiting >= MAX_WAITING:
            raise busy
        self._waiting += 1
        try:
            async with asyncio.timeout(_WAIT_S):
                await self._reads.acquire()
        except TimeoutError:
            raise busy from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._reads.release()


def _check_stretch(request: agent_pb2.ReadPieceRequest, held: Held) -> None:
    """Whole chunks of one file, all of them here. Raises InvalidArgument, NotFound."""
    first = 0
    size, chunk_bytes = -1, held.manifest.chunk_bytes
    for file in held.manifest.files:
        if file.path == request.path:
            size = file.size_bytes
            break
        first += chunks_of(file.size_bytes, chunk_bytes)
    if size < 0:
        raise InvalidArgument(FieldViolation("path", f"{request.path[:80]!r} is no file of {request.dataset}"))
    end = request.offset + request.size_bytes
    if request.size_bytes > max(MAX_STRETCH_BYTES, chunk_bytes):
        raise InvalidArgument(
            FieldViolation(
                "size_bytes", f"is {request.size_bytes}; at most {max(MAX_STRETCH_BYTES, chunk_bytes)} in one read"
            )
        )
    if request.offset < 0 or request.offset % chunk_bytes:
        raise InvalidArgument(
            FieldViolation("offset", f"is {request.offset}; a chunk begins at multiples of {chunk_bytes}")
        )
    if request.size_bytes <= 0 or end > size or (end % chunk_bytes and end != size):
        raise InvalidArgument(
            FieldViolation(
                "size_bytes",
                f"is {request.size_bytes}; whole chunks of {chunk_bytes} within the file's {size} are given",
            )
        )
    first += request.offset // chunk_bytes
    wanted = ((1 << chunks_of(request.size_bytes, chunk_bytes)) - 1) << first
    if held.have & wanted != wanted:
        raise NotFound(_PIECE, f"{request.path} from {request.offset}")


async def _read(number: int, request: agent_pb2.ReadPieceRequest) -> AsyncIterator[bytes]:
    """Its bytes; raises NotFound when there are no more of them."""
    at, end = request.offset, request.offset + request.size_bytes
    while at < end:
        data = await asyncio.to_thread(os.pread, number, min(_MESSAGE_BYTES, end - at), at)
        if not data:
            raise NotFound(_PIECE, request.path)
        yield data
        at += len(data)


def _open(held: Held, path: str) -> int:
    """A descriptor of the file; -1 where it is not there as it was left."""
    try:
        number = os.open(held.folder / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1
    if held.settled and os.fstat(number).st_mtime_ns != FIXED_NS:
        os.close(number)
        return -1
    return number
