"""Nodes of a site pull a dataset from one another: read at its source once, every byte compared, whoever lies or dies."""

import asyncio
import contextlib
import os
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.agent_tasks import until
from tests.support.dataset_inventory import Inventory
from tests.support.dataset_site import Agent
from whaleflux.data import manifest as manifests
from whaleflux.data import sources
from whaleflux.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted
from whaleflux.rpc.channel import Channel
from whaleflux.v1 import agent_pb2, agent_pb2_grpc
from whaleflux_agent import dataset_peers, dataset_pull, dataset_versions, piece_order, piece_servicer
from whaleflux_agent.runtime.api import LaunchFailed
from whaleflux_inventory.dataset_makers import SILENT

pytestmark = pytest.mark.integration

CHUNK_BYTES = 4096
CHUNKS = 40
C4 = "datasets/c4"


@pytest.fixture(autouse=True)
def _small_and_soon(monkeypatch):
    monkeypatch.setattr(dataset_pull, "PAUSE_S", 0.0)
    monkeypatch.setattr(dataset_pull, "RUN_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(manifests, "MIN_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(dataset_versions, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(dataset_peers, "LIST_EVERY_S", 0.05)
    monkeypatch.setattr(dataset_peers, "LIST_S", 60.0)  # a slow host is no silent peer
    monkeypatch.setattr(piece_order, "PATIENCE_S", 60.0)
    monkeypatch.setattr(dataset_peers, "LOOK_EVERY_S", 0.1)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(os.urandom(CHUNK_BYTES * CHUNKS // 2))
    (folder / "sub" / "b").write_bytes(os.urandom(CHUNK_BYTES * CHUNKS // 2 - 100))
    return folder


class Counting:
    """What is read at the source, by all nodes; `may`: whether it answers."""

    def __init__(self):
        self.read, self.may, self.lock, self.away = Counter(), threading.Event(), threading.Lock(), False
        self.opened, self.gives, self.more = 0, 1 << 30, threading.Event()  # stretches before `more` is set
        self.may.set()

    def open(self, uri, authorization, act_as):
        counting = self

        class Counted(sources.Local):
            def scan(self):
                if counting.away:
                    raise sources.SourceFailed("nobody is there")
                return super().scan()

            @contextlib.contextmanager
            def open(self, found, offset, length):
                assert counting.may.wait(60)
                if counting.away:
                    raise sources.SourceFailed("nobody is there")
                with counting.lock:
                    counting.opened += 1
                    mine = counting.opened
                assert mine <= counting.gives or counting.more.wait(60)
                with counting.lock:
                    for at in range(offset, offset + length, CHUNK_BYTES):
                        counting.read[found.path, at] += 1
                with super().open(found, offset, length) as stream:
                    yield stream

        return Counted(Path(uri), act_as)


@pytest.fixture
def counting():
    made = Counting()
    yield made
    made.may.set()
    made.more.set()


def contents(folder):
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.asynccontextmanager
async def site(inventory, root, counting, *names, **more):
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Agent(inventory, root, name, open_source=counting.open, **more))
            for name in names
        ]


async def call(agent, asker, method, request):
    async with asker.peers.dial(agent.node, agent.address) as channel:
        stub = agent_pb2_grpc.PieceServiceStub(channel)
        if method == "ListPieces":
            return await stub.ListPieces(request, timeout=20)
        return b"".join([message.data async for message in stub.ReadPiece(request, timeout=20)])


async def test_nodes_that_begin_at_once_read_the_source_once(tmp_path, source, counting):
    inventory = Inventory(source)
    async with site(inventory, tmp_path, counting, "n1", "n2", "n3", "n4") as agents:
        folders = await asyncio.gather(*(agent.cache.fetch(C4) for agent in agents))
    assert all(contents(folder) == contents(source) for folder in folders)
    assert len(counting.read) == CHUNKS
    assert sum(counting.read.values()) <= 1.15 * CHUNKS, "one made the manifest, the others had it from their peers"
    assert not inventory.makers[C4]


async def test_ranks_that_share_it_have_their_files_from_a_neighbour_that_holds_all(tmp_path, source, counting):
    inventory = Inventory(source)
    spec = SimpleNamespace(require_local_data=False, partial_data=False, datasets_by_rank=(C4,), image="")
    work = SimpleNamespace(job="queues/q/jobs/j", remote_datasets=(), spec=spec, ranks=range(1, 2), world_size=2)
    async with site(inventory, tmp_path, counting, "n1", "n2") as [holder, asker]:
        await holder.cache.fetch(C4)
        counting.read.clear()
        assert contents(await asker.cache.fetch(C4, work)) == {"sub/b": (source / "sub" / "b").read_bytes()}
        assert not counting.read


async def test_who_waits_for_the_version_has_what_its_maker_has_already(tmp_path, source, counting):
    inventory, half = Inventory(source), CHUNKS // 2
    async with site(inventory, tmp_path, counting, "n1", "n2") as [maker, waiting]:
        counting.gives = half
        first = asyncio.create_task(maker.cache.fetch(C4))
        await until(lambda: inventory.makers.get(C4))
        second = asyncio.create_task(waiting.cache.fetch(C4))
        journal = tmp_path / "lab/n2/.partial/c4@ahead/journal"
        await until(lambda: journal.exists() and journal.stat().st_size == half * 36)
        assert not inventory.manifests
        counting.more.set()
        assert contents(await second) == contents(await first) == contents(source)
    assert sum(counting.read.values()) <= 1.15 * CHUNKS
    assert not list((tmp_path / "lab/n2/.partial").iterdir())


async def test_what_came_ahead_is_believed_no_more_than_anything_else(tmp_path, source, counting, monkeypatch):
    inventory, half = Inventory(source), CHUNKS // 2
    async with site(inventory, tmp_path, counting, "n1", "n2") as [maker, waiting]:
        counting.gives = half
        first = asyncio.create_task(maker.cache.fetch(C4))
        await until(lambda: inventory.makers.get(C4))
        reading = os.pread
        monkeypatch.setattr(piece_servicer.os, "pread", lambda *how: bytes(len(reading(*how))))
        second = asyncio.create_task(waiting.cache.fetch(C4))
        journal = tmp_path / "lab/n2/.partial/c4@ahead/journal"
        await until(lambda: journal.exists() and journal.stat().st_size == half * 36)
        monkeypatch.setattr(piece_servicer.os, "pread", reading)
        counting.more.set()
        assert contents(await second) == contents(await first) == contents(source)


async def test_nodes_that_know_the_version_share_its_chunks_among_them(tmp_path, source, counting):
    inventory = Inventory(source)
    async with site(inventory, tmp_path / "before", counting, "n0", site="other") as [maker]:
        await maker.cache.fetch(C4)
    counting.read.clear()
    counting.may.clear()
    async with site(inventory, tmp_path, counting, "n1", "n2", "n3") as agents:
        fetches = [asyncio.create_task(agent.cache.fetch(C4)) for agent in agents]
        await until(lambda: sum(copy.node.startswith("sites/lab") for copy in inventory.copies[C4]) == 3)
        # Who has asked all others twice has taken in what they said the first time: one look follows another.
        everybody = [(agent, other) for agent in agents for other in agents if other is not agent]
        await until(lambda: all(agent.servicer.asked[other.node] > 1 for agent, other in everybody))
        counting.may.set()
        folders = await asyncio.gather(*fetches)
    assert all(contents(folder) == contents(source) for folder in folders)
    assert len(counting.read) == CHUNKS
    assert sum(counting.read.values()) <= 1.5 * CHUNKS, "what was begun before others came may come twice"


async def test_a_peer_that_lies_is_asked_no_more_and_named(tmp_path, source, counting, monkeypatch):
    inventory = Inventory(source)
    async with site(inventory, tmp_path, counting, "n1", "n2") as [liar, reader]:
        await liar.cache.fetch(C4)
        reading = os.pread
        monkeypatch.setattr(piece_servicer.os, "pread", lambda *how: bytes(len(reading(*how))))
        counting.read.clear()
        assert contents(await reader.cache.fetch(C4)) == contents(source)
    assert sum(counting.read.values()) == CHUNKS
    assert f"{liar.node} gave wrong bytes: " in inventory.copies[C4][-1].message


async def test_a_peer_that_dies_in_mid_chunk_is_not_waited_for(tmp_path, source, counting, monkeypatch):
    inventory = Inventory(source)
    async with site(inventory, tmp_path, counting, "n1", "n2") as [peer, reader]:
        await peer.cache.fetch(C4)
        left, dead = [5], []
        reading = os.pread

        def read(number, count, at):
            left[0] -= 1
            if left[0] < 0 and not dead:
                dead.append(asyncio.run_coroutine_threadsafe(peer.server.drain(0), loop))
            return reading(number, min(count, 100), at) if left[0] < 0 else reading(number, count, at)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(piece_servicer.os, "pread", read)
        counting.read.clear()
        assert contents(await reader.cache.fetch(C4)) == contents(source)
    assert dead
    assert 0 < sum(counting.read.values()) < CHUNKS


async def test_who_is_no_peer_any_more_is_hung_up_on_while_the_pull_goes_on(tmp_path, source, counting, monkeypatch):
    inventory, closed, close = Inventory(source), [], Channel.close

    async def noted(channel):
        closed.append(channel)
        await close(channel)

    async with site(inventory, tmp_path, counting, "n1", "n2") as [holder, reader]:
        await holder.cache.fetch(C4)
        found = await inventory.GetDataset(SimpleNamespace(name=C4), None)
        monkeypatch.setattr(Channel, "close", noted)
        async with dataset_peers.swarm_of(reader.peers, found) as swarm:
            heard = []
            pull = SimpleNamespace(seen=lambda pieces, *_: heard.append(pieces))
            async with dataset_peers.following(swarm, pull):
                await until(lambda: heard and heard[-1])
                assert not closed
                inventory.copies[C4].clear()
                await until(lambda: closed and not heard[-1])
    assert len(closed) == 1


async def test_a_source_that_has_gone_is_not_needed_where_a_peer_holds_all(tmp_path, source, counting):
    inventory = Inventory(source)
    async with site(inventory, tmp_path, counting, "n1", "n2") as [holder, reader]:
        await holder.cache.fetch(C4)
        counting.away = True
        assert contents(await reader.cache.fetch(C4)) == contents(source)
        async with site(inventory, tmp_path, counting, "n1", site="other") as [elsewhere]:
            with pytest.raises(LaunchFailed, match="nobody is there"):
                await elsewhere.cache.fetch(C4)


async def test_who_makes_a_manifest_and_goes_silent_is_followed_by_another(tmp_path, source, counting, monkeypatch):
    inventory = Inventory(source)
    monkeypatch.setattr(dataset_versions, "SILENT_S", 0.1)
    async with site(inventory, tmp_path, counting, "n1", "n2") as [silent, waiting]:
        counting.may.clear()
        first = asyncio.create_task(silent.cache.fetch(C4))
        await until(lambda: inventory.makers.get(C4))
        second = asyncio.create_task(waiting.cache.fetch(C4))
        inventory.now += 2 * SILENT
        await until(lambda: inventory.makers[C4][0].node == waiting.node)
        counting.may.set()
        assert contents(await second) == contents(await first) == contents(source)


class TestWhatIsGivenToWhom:
    async def test_pieces_of_a_copy_and_of_one_on_its_way(self, tmp_path, source, counting):
        inventory = Inventory(source)
        async with site(inventory, tmp_path, counting, "n1", "n2", "n3") as [whole, partly, asker]:
            await whole.cache.fetch(C4)
            digest = manifests.from_proto(inventory.manifests[C4]).digest
            asked = agent_pb2.ListPiecesRequest(dataset=C4, manifest_digest=digest, node=asker.node)
            answer = await call(whole, asker, "ListPieces", asked)
            assert int.from_bytes(answer.chunks, "little") == (1 << CHUNKS) - 1
            piece = agent_pb2.ReadPieceRequest(
                dataset=C4,
                manifest_digest=digest,
                node=asker.node,
                path="a",
                offset=CHUNK_BYTES,
                size_bytes=2 * CHUNK_BYTES,
            )
            assert (
                await call(whole, asker, "ReadPiece", piece)
                == (source / "a").read_bytes()[CHUNK_BYTES:][: 2 * CHUNK_BYTES]
            )
            with pytest.raises(NotFound):
                await call(partly, asker, "ReadPiece", piece)
            os.chmod(next((tmp_path / "lab/n1").glob("c4@*")) / "a", 0o644)
            (next((tmp_path / "lab/n1").glob("c4@*")) / "a").write_bytes(b"other")
            with pytest.raises(NotFound):
                await call(whole, asker, "ReadPiece", piece)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("path", "../../etc/passwd", "path: '../../etc/passwd' is no file of datasets/c4"),
            ("offset", 1, f"offset: is 1; a chunk begins at multiples of {CHUNK_BYTES}"),
            ("offset", -CHUNK_BYTES, "offset: is -4096"),
            ("size_bytes", 1, "size_bytes: is 1; whole chunks"),
            ("size_bytes", 1 << 60, "size_bytes: is"),
            ("dataset", "c4", "dataset: "),
        ],
    )
    async def test_a_stretch_that_is_none_is_refused(self, tmp_path, source, counting, field, value, message):
        inventory = Inventory(source)
        async with site(inventory, tmp_path, counting, "n1", "n2") as [holder, asker]:
            await holder.cache.fetch(C4)
            piece = agent_pb2.ReadPieceRequest(
                dataset=C4,
                manifest_digest=manifests.from_proto(inventory.manifests[C4]).digest,
                node=asker.node,
                path="a",
                size_bytes=CHUNK_BYTES,
            )
            setattr(piece, field, value)
            with pytest.raises(InvalidArgument, match=message):
                await call(holder, asker, "ReadPiece", piece)

    async def test_what_is_for_some_goes_only_where_it_is_pinned_and_to_no_other_site(self, tmp_path, source, counting):
        inventory = Inventory(source)
        async with (
            site(inventory, tmp_path, counting, "n1", "n2") as [holder, asker],
            site(inventory, tmp_path, counting, "n2", site="other") as [elsewhere],
        ):
            await holder.cache.fetch(C4)
            digest = manifests.from_proto(inventory.manifests[C4]).digest
            asked = {
                agent: agent_pb2.ListPiecesRequest(dataset=C4, manifest_digest=digest, node=agent.node)
                for agent in (asker, elsewhere)
            }
            with pytest.raises(NotFound):
                await call(holder, elsewhere, "ListPieces", asked[elsewhere])
            with pytest.raises(PermissionDenied, match="may touch only"):
                await call(holder, elsewhere, "ListPieces", asked[asker])
            assert (await call(holder, asker, "ListPieces", asked[asker])).chunks
            inventory.members = ["groups/research"]
            holder.forget_what_inventory_said()
            with pytest.raises(NotFound):
                await call(holder, asker, "ListPieces", asked[asker])
            inventory.pins = [asker.node]
            holder.forget_what_inventory_said()
            assert (await call(holder, asker, "ListPieces", asked[asker])).chunks

    async def test_what_is_for_some_goes_where_a_job_of_theirs_reads_it_and_nowhere_by_a_lie(
        self, tmp_path, source, counting
    ):
        inventory = Inventory(source)
        async with site(inventory, tmp_path, counting, "n1", "n2", "n3") as [holder, asker, liar]:
            await holder.cache.fetch(C4)
            inventory.members = ["groups/research"]
            digest = manifests.from_proto(inventory.manifests[C4]).digest
            holder.readers.add((asker.node, C4, "queues/q/jobs/j"))

            def asked(agent, job):
                return agent_pb2.ListPiecesRequest(dataset=C4, manifest_digest=digest, node=agent.node, job=job)

            assert (await call(holder, asker, "ListPieces", asked(asker, "queues/q/jobs/j"))).chunks
            for agent, job in ((asker, "queues/q/jobs/other"), (asker, ""), (liar, "queues/q/jobs/j")):
                with pytest.raises(NotFound):
                    await call(holder, agent, "ListPieces", asked(agent, job))
            with pytest.raises(PermissionDenied, match="may touch only"):
                await call(holder, liar, "ListPieces", asked(asker, "queues/q/jobs/j"))
            with pytest.raises(InvalidArgument, match="job"):
                await call(holder, asker, "ListPieces", asked(asker, "j"))
            counting.read.clear()
            spec = SimpleNamespace(require_local_data=False, datasets_by_rank=(), image="")
            work = SimpleNamespace(job="queues/q/jobs/j", remote_datasets=(), spec=spec)
            assert contents(await asker.cache.fetch(C4, work)) == contents(source)
            assert not counting.read, "all of it came from its neighbour"
            assert contents(await liar.cache.fetch(C4, work)) == contents(source)
            assert counting.read, "who has no task of that job reads it at the source"

    async def test_so_many_at_a_time(self, tmp_path, source, counting, monkeypatch):
        monkeypatch.setattr(piece_servicer, "MAX_WAITING", 0)
        monkeypatch.setattr(piece_order, "PATIENCE_S", 0.1)
        inventory = Inventory(source)
        async with site(inventory, tmp_path, counting, "n1", "n2") as [holder, asker]:
            await holder.cache.fetch(C4)
            piece = agent_pb2.ReadPieceRequest(
                dataset=C4,
                manifest_digest=manifests.from_proto(inventory.manifests[C4]).digest,
                node=asker.node,
                path="a",
                size_bytes=CHUNK_BYTES,
            )
            with pytest.raises(ResourceExhausted, match="8 pieces at a time"):
                await call(holder, asker, "ReadPiece", piece)
            assert contents(await asker.cache.fetch(C4)) == contents(source), "the source is there"
