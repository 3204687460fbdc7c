"""One agent that gives pieces of a dataset, with a fault of its own: a process, so that it can be killed.

`python -m benchmarks.dataset_lab.faulty_peer FOLDER KIND SEED CHUNK_BYTES` serves the whole copy below FOLDER/cache and prints its address.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from whaleflux.clock import SystemClock
from whaleflux.data import manifest as manifests
from whaleflux.errors import Unavailable
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.server import Server
from whaleflux.rpc.tls_files import TlsFiles
from whaleflux.v1 import agent_pb2, agent_pb2_grpc, inventory_pb2
from whaleflux_agent.datasets import DatasetCache
from whaleflux_agent.piece_servicer import PieceServicer

KINDS = ("as it should", "flips", "stalls", "breaks off", "claims all")
_CHANCE = 0.4  # of one read


class Known:
    """Inventory, of one dataset that does not change."""

    def __init__(self, record: inventory_pb2.Dataset) -> None:
        self._record = record

    async def GetDataset(self, request: Any, timeout: float) -> inventory_pb2.Dataset:
        return self._record


class FaultyPieces(PieceServicer):
    """Some of its reads go wrong, by `kind`; `marks` has a byte for each of them."""

    kind, chance, marks = KINDS[0], random.Random(0), Path()

    async def ListPieces(self, request: agent_pb2.ListPiecesRequest, context: Any) -> agent_pb2.ListPiecesResponse:
        answer = await super().ListPieces(request, context)
        if self.kind == "claims all":
            answer.chunks = b"\xff" * (len(answer.chunks) + 3)
        return answer

    async def ReadPiece(
        self, request: agent_pb2.ReadPieceRequest, context: Any
    ) -> AsyncIterator[agent_pb2.ReadPieceResponse]:
        faulty = self.kind != KINDS[0] and self.chance.random() < _CHANCE
        if faulty:
            with open(self.marks, "ab") as marks:  # noqa: ASYNC230  # a byte
                marks.write(b".")
        async for message in super().ReadPiece(request, context):
            if faulty and self.kind == "flips":
                data = bytearray(message.data)
                data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
                message.data = bytes(data)
            if faulty and self.kind in ("breaks off", "claims all"):
                message.data = message.data[: self.chance.randrange(len(message.data))]
                yield message
                raise Unavailable("gone in the middle of a chunk")
            if faulty and self.kind == "stalls":
                await asyncio.sleep(3600)
            yield message


async def _for_nobody(*_: str) -> bool:
    return False


async def serve(folder: Path, kind: str, seed: int, chunk_bytes: int) -> None:
    """Until it is killed."""
    manifests.MIN_CHUNK_BYTES = chunk_bytes
    record = inventory_pb2.Dataset.FromString((folder / "record").read_bytes())
    node, inventory = (folder / "node").read_text(), Known(record)
    cache = DatasetCache(folder / "cache", 1 << 40, node, inventory, frozenset)  # type: ignore[arg-type]
    await cache.fetch(record.name)
    server = Server(TlsFiles.under(folder, "peer").load(), Authority())
    pieces = FaultyPieces(node, cache.held, inventory, SystemClock(), _for_nobody)  # type: ignore[arg-type]
    pieces.kind, pieces.chance, pieces.marks = kind, random.Random(seed), folder / "struck"
    server.add(agent_pb2_grpc.add_PieceServiceServicer_to_server, pieces, "whaleflux.v1.PieceService")
    port = server.bind("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
