"""Datasets that ranks divide among themselves: each file is one rank's, a node pulls what its own ranks read, and no more than is missing."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.agent_tasks import until
from tests.support.dataset_inventory import Inventory
from whaleflux.data import sources
from whaleflux.data.division import part_of
from whaleflux.data.hashing import hashed
from whaleflux.data.manifest import File, Manifest
from whaleflux.sdk import Dataset
from whaleflux_agent import dataset_division, dataset_pull
from whaleflux_agent.datasets import DatasetCache
from whaleflux_agent.runtime.api import LaunchFailed

C4, NODE = "datasets/c4", "sites/lab/nodes/n1"
FILES, SIZE = 40, 100


@given(st.integers(0, 300), st.integers(1, 100))
def test_each_file_is_one_rank_s_and_no_rank_has_many_more_than_another(count, world_size):
    parts = [part_of(range(count), rank, world_size) for rank in range(world_size)]
    assert [file for part in parts for file in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_what_neighbours_have_of_the_whole_is_found_in_the_part(chunks, data):
    whole = Manifest(10, tuple(File(f"{number:02}", 10 * count) for number, count in enumerate(chunks)))
    part = Manifest(10, tuple(file for file in whole.files if data.draw(st.booleans())))
    bits, seen = data.draw(st.integers(0, (1 << whole.chunk_count) - 1)), []
    pull = SimpleNamespace(seen=lambda pieces, fellows, coming: seen.append((pieces, fellows, coming)))
    dataset_division.OfPart(pull, dataset_division.spans(whole, part)).seen({"n": bits}, frozenset({"n"}), bits)
    index = {(whole.files[c.file].path, c.offset): c.index for c in whole.chunks()}
    wanted = sum((bits >> index[part.files[c.file].path, c.offset] & 1) << c.index for c in part.chunks())
    assert seen == [({"n": wanted} if wanted else {}, frozenset(), wanted)]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(dataset_pull, "PAUSE_S", 0.0)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for number in range(FILES):
        (folder / str(number % 3)).mkdir(parents=True, exist_ok=True)
        (folder / str(number % 3) / f"{number:02}").write_bytes(os.urandom(SIZE))
    return folder


@pytest.fixture
def inventory(source):
    made = Inventory(source)
    made.declared_s[C4] = 1
    made.manifests[C4] = hashed(sources.Local(source)).to_proto()
    return made


class Reads:
    """What is read at the source, by path."""

    def __init__(self):
        self.paths = list[str]()

    def open_source(self, uri, authorization, act_as):
        reads = self

        class Noted(sources.Local):
            def open(self, found, offset, length):
                reads.paths.append(found.path)
                return super().open(found, offset, length)

        return Noted(Path(uri), act_as)

    def take(self):
        taken, self.paths = self.paths, []
        return taken


@pytest.fixture
def reads():
    return Reads()


def work(first, ranks, world, step=1):
    spec = {"require_local_data": False, "partial_data": False, "image": "", "datasets_by_rank": (C4,)}
    return SimpleNamespace(
        job="queues/q/jobs/j",
        remote_datasets=(),
        world_size=world,
        ranks=range(first, first + ranks * step, step),
        spec=SimpleNamespace(**spec),
    )


def cache_of(tmp_path, inventory, reads, room=10**6, name="n1", **more):
    node = f"sites/lab/nodes/{name}"
    return DatasetCache(tmp_path / name, room, node, inventory, frozenset, open_source=reads.open_source, **more)


async def read_by(cache, rank, task):
    """What the code of a rank reads there: its files, by path."""
    folder = await cache.fetch(C4, task)
    environment = {"WHALEFLUX_DATASET_C4": folder, "RANK": str(rank), "WORLD_SIZE": str(task.world_size)}
    if listing := await cache.home_of(C4, folder, task):
        environment["WHALEFLUX_DATAFILES_C4"] = listing
    data, found = Dataset("c4", environment), {}
    assert len(data.paths()) == FILES
    for path in data.part():
        with data.open(path) as file:
            found[path] = file.read()
    return found


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_each_node_pulls_what_its_ranks_read_and_all_of_them_have_read_all_of_it_once(
    tmp_path, source, inventory, reads
):
    found = {}
    for number in range(4):
        cache, task = cache_of(tmp_path, inventory, reads, name=f"n{number}"), work(number * 2, 2, 8)
        parts = [await read_by(cache, rank, task) for rank in task.ranks]
        assert len(reads.take()) == FILES // 4
        for part in parts:
            assert len(part) == FILES // 8 and found.keys().isdisjoint(part)
            found |= part
        last = inventory.copies[C4][-1]
        assert (inventory.states(C4)[-1], last.present_bytes) == ("PARTIAL", SIZE * FILES // 4)
        assert cache.held(C4, last.manifest_digest) is None, "neighbours are given nothing of a part"
    assert found == contents(source)


async def test_another_division_pulls_what_is_missing_and_nothing_twice(tmp_path, source, inventory, reads):
    cache = cache_of(tmp_path, inventory, reads)
    for task in (work(0, 2, 8), work(0, 2, 4), work(2, 2, 8), work(0, 2, 5, step=3)):
        for rank in task.ranks:
            part = await read_by(cache, rank, task)
            assert part == {path: (source / path).read_bytes() for path in part}
    assert len(reads.paths) == len(set(reads.paths))
    again = cache_of(tmp_path, inventory, reads)
    reads.take()
    await read_by(again, 0, work(0, 2, 4))
    assert not reads.take(), "an agent that was restarted has it still"
    await again.fetch(C4)
    assert inventory.states(C4)[-1] == "READY"
    await read_by(again, 7, work(7, 1, 8))
    assert inventory.states(C4)[-1] == "READY", "a whole copy is nobody's part"


async def test_a_node_with_more_ranks_than_files_has_the_folder(tmp_path, inventory, reads):
    cache, task = cache_of(tmp_path, inventory, reads), work(0, 1, 1000)
    assert await read_by(cache, 0, task) == {}
    assert await read_by(cache_of(tmp_path, inventory, reads), 0, task) == {}, "known to the next agent"
    assert len(await read_by(cache, 999, work(999, 1, 1000))) == 1


async def test_files_that_came_before_their_agent_could_say_so_take_no_room_of_the_next_one(tmp_path, inventory, reads):
    cache, task = cache_of(tmp_path, inventory, reads), work(0, 1, 8)
    folder = Path(await cache.fetch(C4, task))
    (tmp_path / "n1" / ".manifests" / folder.name).unlink()
    again = cache_of(tmp_path, inventory, reads)
    await again.upkeep.tidy()
    assert not folder.exists()
    assert len(await read_by(again, 0, task)) == FILES // 8


async def test_its_room_is_that_of_the_part_and_without_it_ranks_read_the_source(tmp_path, source, inventory, reads):
    cache = cache_of(tmp_path, inventory, reads, room=SIZE * FILES // 2)
    assert len(await read_by(cache, 1, work(0, 4, 8))) == FILES // 8
    folder = await cache.fetch(C4, work(0, 5, 8))
    assert folder == str(source), "five eighths do not fit"
    assert len(await read_by(cache, 4, work(0, 5, 8))) == FILES // 8
    assert len(contents(next((tmp_path / "n1").glob("*~ranks")))) == FILES // 2, "what is there stays"


async def test_while_its_version_is_not_known_it_is_pulled_as_any_other(tmp_path, source, inventory, reads):
    del inventory.manifests[C4]
    assert len(await read_by(cache_of(tmp_path, inventory, reads), 3, work(2, 2, 8))) == FILES // 8
    assert inventory.states(C4)[-1] == "READY"
    reads.take()
    assert len(await read_by(cache_of(tmp_path, inventory, reads, name="n2"), 3, work(2, 2, 8))) == FILES // 8
    assert len(reads.take()) == FILES // 4, "the second node knows it"


async def test_a_part_that_somebody_wrote_to_and_one_of_an_earlier_dataset_are_no_longer_used(
    tmp_path, source, inventory, reads
):
    cache, task = cache_of(tmp_path, inventory, reads), work(0, 1, 8)
    folder = Path(await cache.fetch(C4, task))
    file = next(path for path in folder.rglob("*") if path.is_file())
    os.chmod(file, 0o644)
    file.write_bytes(bytes(SIZE))
    assert await read_by(cache, 0, task) == {path: (source / path).read_bytes() for path in reads.paths[-5:]}
    inventory.declared_s[C4] = 2
    await cache.upkeep.tidy()
    assert not folder.exists()
    assert not list((tmp_path / "n1" / ".lists").iterdir())


async def test_a_task_that_stops_stops_its_pull_and_the_next_one_goes_on_with_it(tmp_path, source, inventory, reads):
    cache, task = cache_of(tmp_path, inventory, reads), work(0, 8, 8)
    bringing = asyncio.create_task(cache.fetch(C4, task))
    await until(lambda: cache.rank_parts.fetching)
    (progress,) = [fetch.progress for _, fetch in cache.rank_parts.fetches.values()]
    bringing.cancel()
    await asyncio.gather(bringing, return_exceptions=True)
    assert progress.stop.is_set()
    assert len(await read_by(cache, 0, task)) == FILES // 8


async def test_a_source_that_fails_is_said(tmp_path, source, inventory, reads):
    for path in source.rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(SIZE))
    with pytest.raises(LaunchFailed, match=r"cannot fetch /.* not what its manifest says"):
        await cache_of(tmp_path, inventory, reads).fetch(C4, work(0, 1, 8))
    assert inventory.states(C4) == ["FAILED"]


def test_a_rank_that_is_none_of_so_many_is_refused():
    data = Dataset("c4", {"WHALEFLUX_DATASET_C4": "/none", "RANK": "8", "WORLD_SIZE": "8"})
    with pytest.raises(ValueError, match="rank 8 is none of 8; give one from 0 to 7"):
        data.part()
