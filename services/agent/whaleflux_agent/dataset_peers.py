"""Other agents of the site as sources of a dataset: found in inventory, dialled on their own mTLS ports, read from threads.

A peer is believed to be the node that its certificate names, and nothing else: what it gives is compared like what any source gives.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import heapq
import operator
import random
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from whaleflux import hostport, names
from whaleflux.data.sources import Found, Readable, SourceBusy, SourceFailed
from whaleflux.errors import InvalidArgument, ResourceExhausted, StatusError
from whaleflux.rpc.channel import Channel, Stream, connect
from whaleflux.rpc.pki import Tls, TlsFiles, server_name
from whaleflux.v1 import agent_pb2, agent_pb2_grpc, inventory_pb2, inventory_pb2_grpc

T = TypeVar("T")
MAX_WHOLE, MAX_PULLING = 8, 24  # peers that one pull asks
LIST_EVERY_S, LOOK_EVERY_S = 0.5, 5.0
LIST_S, READ_S = 3.0, 10.0  # for an answer of a peer
_CALL_S = 10.0
_MIN_BYTES_PER_S = 256 << 10  # of one stretch from a peer
READY = (inventory_pb2.DATASET_COPY_STATE_UNSPECIFIED, inventory_pb2.DATASET_COPY_STATE_READY)
PULLING = inventory_pb2.DATASET_COPY_STATE_PULLING


class Pulling(Protocol):
    """A pull, as far as peers are its business (`dataset_pull.Pull`)."""

    def seen(self, pieces: Mapping[str, int], fellows: frozenset[str], coming: int) -> None: ...


def peers_of(found: inventory_pb2.Dataset, node: str) -> tuple[dict[str, str], dict[str, str]]:
    """Nodes of the same site that hold this version, and those that pull it: name -> address."""
    site = names.top(node)
    near = [
        copy
        for copy in found.copies
        if copy.node != node and names.top(copy.node) == site and _is_address(copy.address)
    ]
    whole = {
        copy.node: copy.address
        for copy in near
        if copy.state in READY and copy.present_bytes and copy.manifest_digest == found.manifest_digest
    }
    pulling = {copy.node: copy.address for copy in near if copy.state == PULLING and _may_be_of(copy, found)}
    return whole, pulling


def _may_be_of(copy: inventory_pb2.DatasetCopy, found: inventory_pb2.Dataset) -> bool:
    """Whether it is of this version, or of none yet: who made the manifest has all of it before that is known of its copy."""
    return copy.manifest_digest in ("", found.manifest_digest)


@dataclass(frozen=True, slots=True)
class Peers:
    """How this node reaches other agents, and what it shows them."""

    node: str
    tls: Tls | TlsFiles
    trust_domain: str
    inventory: inventory_pb2_grpc.InventoryServiceStub

    def dial(self, node: str, address: str) -> Channel:
        """To that agent, under that address; whoever answers there has to show the node's certificate."""
        site, node_id = names.split(node, "sites", "nodes")
        return connect(address, self.tls, server=server_name("agent", f"{site}/{node_id}", self.trust_domain))


class Swarm:
    """The peers of one pull: asked again and again what they have. For one event loop; its sources may be read from threads."""

    def __init__(self, peers: Peers, found: inventory_pb2.Dataset, job: str = "") -> None:
        self._peers, self._found, self._job = peers, found, job
        self._channels: dict[tuple[str, str], Channel] = {}
        self._addresses: dict[str, str] = {}
        self._fellows = frozenset[str]()
        self._loop = asyncio.get_running_loop()
        self._choose(found)

    async def close(self) -> None:
        """Ends what is open."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    async def follow(self, pull: Pulling) -> None:
        """Tells the pull what peers have and who pulls beside it, until it is cancelled."""
        looked_s = self._loop.time()
        while True:
            pull.seen(*await self.look())
            await asyncio.sleep(LIST_EVERY_S * (0.5 + random.random()))
            if self._loop.time() - looked_s >= LOOK_EVERY_S:
                looked_s = self._loop.time()
                await self._look_in_inventory()

    async def look(self) -> tuple[dict[str, int], frozenset[str], int]:
        """What each peer has now, which of those that pull are heard, and what these read at the source."""
        asked = list(self._addresses.items())
        answers = await asyncio.gather(*(self._pieces_of(node, address) for node, address in asked))
        heard = {node: bits for (node, _), bits in zip(asked, answers, strict=True) if bits is not None}
        silent = {node for node, _ in asked} - heard.keys()
        coming = functools.reduce(operator.or_, (bits for _, bits in heard.values()), 0)
        return {node: have for node, (have, _) in heard.items() if have}, self._fellows - silent, coming

    async def _look_in_inventory(self) -> None:
        with contextlib.suppress(StatusError):  # those that are known go on
            request = inventory_pb2.GetDatasetRequest(name=self._found.name)
            found = await self._peers.inventory.GetDataset(request, timeout=_CALL_S)
            if found.manifest_digest == self._found.manifest_digest:
                self._choose(found)
                await self._close_others()

    def _choose(self, found: inventory_pb2.Dataset) -> None:
        """Some of those that hold it and some of those that pull it, other ones for each node."""
        whole, pulling = peers_of(found, self._peers.node)
        chosen = [*_some(whole, MAX_WHOLE, self._peers.node), *_some(pulling, MAX_PULLING, self._peers.node)]
        self._addresses, self._fellows = dict(chosen), frozenset(pulling)

    async def _close_others(self) -> None:
        """Channels to peers that are none any more; what still comes from them is taken elsewhere."""
        gone = [key for key in list(self._channels) if self._addresses.get(key[0]) != key[1]]
        for channel in [self._channels.pop(key) for key in gone]:
            await channel.close()

    async def _pieces_of(self, node: str, address: str) -> tuple[int, int] | None:
        """Bitmaps of what it has, and of what it reads at the source; None: it does not answer."""
        request = agent_pb2.ListPiecesRequest(
            dataset=self._found.name,
            manifest_digest=self._found.manifest_digest,
            node=self._peers.node,
            job=self._job,
        )
        try:
            answer = await self._stub(node, address).ListPieces(request, timeout=LIST_S)
        except StatusError:
            return None
        return int.from_bytes(answer.chunks, "little"), int.from_bytes(answer.coming, "little")

    def _stub(self, node: str, address: str) -> agent_pb2_grpc.PieceServiceStub:
        if (channel := self._channels.get((node, address))) is None:
            channel = self._channels.setdefault((node, address), self._peers.dial(node, address))
        return agent_pb2_grpc.PieceServiceStub(channel)

    def source(self, node: str) -> PeerSource:
        """That peer, for threads."""
        return PeerSource(self, node)

    def read(self, node: str, path: str, offset: int, length: int) -> Stream[agent_pb2.ReadPieceResponse]:
        """Starts to read when it is asked for."""
        request = agent_pb2.ReadPieceRequest(
            dataset=self._found.name,
            manifest_digest=self._found.manifest_digest,
            node=self._peers.node,
            path=path,
            offset=offset,
            size_bytes=length,
            job=self._job,
        )
        address = self._addresses.get(node)
        if address is None:
            raise SourceFailed(f"{node} is no peer any more")
        stub, limit_s = self._stub(node, address), READ_S + length / _MIN_BYTES_PER_S
        stream: Stream[agent_pb2.ReadPieceResponse] = stub.ReadPiece(request, timeout=limit_s)
        return stream

    def wait(self, doing: Coroutine[Any, Any, T], limit_s: float) -> T:
        """What the loop makes of it, for a thread. Raises SourceFailed."""
        waiting = asyncio.run_coroutine_threadsafe(doing, self._loop)
        try:
            return waiting.result(limit_s)
        except concurrent.futures.TimeoutError:
            waiting.cancel()
            raise SourceFailed(f"no answer within {limit_s:.0f} s") from None
        except concurrent.futures.CancelledError:
            raise SourceFailed("the agent stops") from None
        except ResourceExhausted as busy:
            raise SourceBusy(busy.message) from None
        except StatusError as failed:
            raise SourceFailed(failed.message) from None


@contextlib.asynccontextmanager
async def swarm_of(peers: Peers | None, found: inventory_pb2.Dataset, job: str = "") -> AsyncIterator[Swarm | None]:
    """The peers of a pull while it runs, for that job; None where there are none."""
    swarm = Swarm(peers, found, job) if peers else None
    try:
        yield swarm
    finally:
        if swarm:
            await swarm.close()


@contextlib.asynccontextmanager
async def following(swarm: Swarm, pull: Pulling) -> AsyncIterator[None]:
    """The pull hears of its peers in the block."""
    task = asyncio.create_task(swarm.follow(pull))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class PeerSource:
    """Another agent's pieces. Its files are those of a manifest, so that nothing is scanned."""

    ranged = True

    def __init__(self, swarm: Swarm, node: str) -> None:
        self._swarm, self._node = swarm, node

    def scan(self) -> list[Found]:
        raise SourceFailed("a peer is read by the manifest")

    def home(self) -> str:
        return ""

    def lone_file(self) -> str:
        return ""

    @contextlib.contextmanager
    def open(self, found: Found, offset: int, length: int) -> Iterator[Readable]:
        stream = _Pieces(self._swarm, self._swarm.read(self._node, found.path, offset, length))
        try:
            yield stream
        finally:
            stream.close()


class _Pieces:
    """The answers of a peer, as bytes."""

    def __init__(self, swarm: Swarm, stream: Stream[agent_pb2.ReadPieceResponse]) -> None:
        self._swarm, self._stream, self._left = swarm, stream, memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        """Raises SourceFailed."""
        if not self._left:
            message = self._swarm.wait(self._next(), READ_S)
            self._left = memoryview(message.data if message else b"")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    async def _next(self) -> agent_pb2.ReadPieceResponse | None:
        return await anext(self._stream, None)

    def close(self) -> None:
        with contextlib.suppress(SourceFailed):
            self._swarm.wait(self._stream.aclose(), READ_S)


def _is_address(text: str) -> bool:
    """Whether it is a host and a port: gRPC would dial other things as well."""
    try:
        return bool(hostport.parse(text))
    except InvalidArgument:
        return False


def _some(nodes: dict[str, str], most: int, seed: str) -> list[tuple[str, str]]:
    """The same ones as long as they are there, whoever comes or goes beside them."""
    return heapq.nsmallest(most, nodes.items(), key=lambda node: hashlib.blake2b(f"{seed} {node[0]}".encode()).digest())
