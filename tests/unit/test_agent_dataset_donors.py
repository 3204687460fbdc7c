"""Chunks that another copy on the node has are taken from there: compared, and only where its readers allow it."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.dataset_inventory import Inventory
from whaleflux.data import manifest as manifests
from whaleflux.data import sources
from whaleflux.data.hashing import hashed
from whaleflux.v1 import inventory_pb2
from whaleflux_agent import dataset_pull
from whaleflux_agent.dataset_donors import may_give
from whaleflux_agent.datasets import DatasetCache

NODE, CHUNK_BYTES, CHUNKS = "sites/lab/nodes/n1", 4096, 20
OLD, NEW, OTHER = "datasets/c4", "datasets/new", "datasets/other"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(dataset_pull, "PAUSE_S", 0.0)
    monkeypatch.setattr(manifests, "MIN_CHUNK_BYTES", CHUNK_BYTES)


def written(folder, data):
    folder.mkdir()
    (folder / "weights").write_bytes(data)
    return folder


@pytest.fixture
def versions(tmp_path):
    """A set of weights, and the same with two chunks changed and some bytes more."""
    old = os.urandom(CHUNK_BYTES * CHUNKS)
    new = bytearray(old) + b"more"
    new[5 * CHUNK_BYTES] ^= 1
    new[9 * CHUNK_BYTES + 17] ^= 1
    return written(tmp_path / "old", old), written(tmp_path / "new", new)


class World:
    """A node, its inventory, and the bytes that were read at sources."""

    def __init__(self, tmp_path, old, new, room=1 << 30):
        self.inventory, self.read = Inventory(old, new=new, other=new), 0
        world = self

        class Counted(sources.Local):
            @contextlib.contextmanager
            def open(self, found, offset, length):
                world.read += length
                with super().open(found, offset, length) as stream:
                    yield stream

        def open_source(uri, authorization, act_as):
            return Counted(Path(uri), act_as)

        self.cache = DatasetCache(tmp_path / "cache", room, NODE, self.inventory, frozenset, open_source=open_source)

    def declare(self, name):
        """As who declared it with --hash has it."""
        self.inventory.manifests[name] = hashed(sources.Local(Path(self.inventory.uris[name]))).to_proto()

    async def fetched(self, name):
        before = self.read
        folder = Path(await self.cache.fetch(name))
        assert (folder / "weights").read_bytes() == (Path(self.inventory.uris[name]) / "weights").read_bytes()
        return self.read - before


async def test_of_a_new_version_only_what_changed_is_read_at_its_source(tmp_path, versions):
    world = World(tmp_path, *versions)
    assert await world.fetched(OLD) == CHUNK_BYTES * CHUNKS
    world.declare(NEW)
    assert await world.fetched(NEW) == 2 * CHUNK_BYTES + len(b"more")


async def test_without_a_manifest_there_is_nothing_to_look_for_and_all_of_it_is_read(tmp_path, versions):
    world = World(tmp_path, *versions)
    await world.fetched(OLD)
    assert await world.fetched(NEW) == CHUNK_BYTES * CHUNKS + len(b"more")


async def test_a_copy_that_was_torn_or_has_gone_gives_no_wrong_byte(tmp_path, versions):
    world = World(tmp_path, *versions)
    await world.fetched(OLD)
    copy = next((tmp_path / "cache").glob("c4@*")) / "weights"
    copy.chmod(0o644)
    torn = bytearray(copy.read_bytes())
    torn[3 * CHUNK_BYTES : 3 * CHUNK_BYTES + 4] = b"torn"
    copy.write_bytes(torn[: (CHUNKS - 2) * CHUNK_BYTES - 1])
    world.declare(NEW)
    assert await world.fetched(NEW) == 6 * CHUNK_BYTES + len(b"more")  # changed two, torn one, cut off three
    copy.unlink()
    world.declare(OTHER)
    assert await world.fetched(OTHER) == 0  # all of the other one is here


@pytest.mark.parametrize(
    ("old", "new", "gives"),
    [
        (("user/ann", []), ("user/bob", ["groups/b"]), True),  # what is for everybody
        (("user/ann", ["groups/a", "groups/b"]), ("user/ann", ["groups/b"]), True),
        (("user/ann", ["groups/a"]), ("user/ann", []), False),
        (("user/ann", ["groups/a"]), ("user/bob", ["groups/a"]), False),  # bob may know the digests, and not the bytes
    ],
)
async def test_whoever_may_not_read_a_copy_gets_nothing_of_it(tmp_path, versions, old, new, gives):
    world = World(tmp_path, *versions)
    world.inventory.rights = {OLD: old, NEW: new}
    await world.fetched(OLD)
    world.declare(NEW)
    assert (await world.fetched(NEW) < CHUNK_BYTES * CHUNKS) == gives


async def test_what_nobody_can_say_of_a_copy_now_is_no_right_to_it(tmp_path, versions):
    world = World(tmp_path, *versions)
    await world.fetched(OLD)
    world.declare(NEW)
    world.inventory.away_for = {OLD}
    assert await world.fetched(NEW) == CHUNK_BYTES * CHUNKS + len(b"more")


async def test_a_copy_of_an_earlier_dataset_of_the_name_has_not_the_rights_of_the_later_one(tmp_path, versions):
    world = World(tmp_path, *versions)
    world.inventory.rights = {OLD: ("user/ann", ["groups/a"])}
    await world.fetched(OLD)
    world.inventory.rights = {}
    world.inventory.manifests.clear()
    world.inventory.uris[OLD] = str(written(tmp_path / "later", b"something else"))
    world.declare(OLD)
    world.declare(NEW)
    assert await world.fetched(NEW) == CHUNK_BYTES * CHUNKS + len(b"more")


async def test_what_gives_chunks_goes_last_when_room_is_made(tmp_path, versions):
    size = CHUNK_BYTES * CHUNKS
    world = World(tmp_path, *versions, room=3 * size)
    other = bytearray(os.urandom(size))
    world.inventory.uris[OTHER] = str(written(tmp_path / "third", other))
    await world.fetched(OLD)
    await world.fetched(OTHER)  # used after the one that gives: worth more
    world.declare(NEW)
    assert await world.fetched(NEW) == 2 * CHUNK_BYTES + len(b"more")
    assert {path.name.partition("@")[0] for path in (tmp_path / "cache").glob("*@*")} == {"c4", "new"}


async def test_what_gives_chunks_goes_all_the_same_where_nothing_else_can(tmp_path, versions):
    world = World(tmp_path, *versions, room=CHUNK_BYTES * CHUNKS + 100)
    await world.fetched(OLD)
    world.declare(NEW)
    assert await world.fetched(NEW) == CHUNK_BYTES * CHUNKS + len(b"more")


PEOPLE = ("ann", "bob", "eve")


@st.composite
def datasets(draw):
    found = inventory_pb2.Dataset(owner=f"user/{draw(st.sampled_from(PEOPLE))}")
    found.members.extend(f"users/{name}" for name in draw(st.sets(st.sampled_from(PEOPLE))))
    if draw(st.booleans()):
        found.credentials.secret = draw(st.sampled_from(["secrets/a", "secrets/b"]))
    return found


def readers(dataset):
    """Who may read it, beside who may read everything."""
    people = [member.removeprefix("users/") for member in dataset.members] or PEOPLE
    return {*people, dataset.owner.removeprefix("user/")}


def opens(donor, to):
    """Whether who may read `to` may be shown the secret of `donor`."""
    mine = to.credentials.secret == donor.credentials.secret and to.owner == donor.owner
    return mine or not donor.HasField("credentials")


@given(datasets(), datasets())
@settings(deadline=None)
def test_nobody_reads_more_for_what_copies_give(donor, to):
    assert not may_give(donor, to) or (readers(to) <= readers(donor) and opens(donor, to))
