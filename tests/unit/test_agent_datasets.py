"""The node's cache of datasets: whole or not there, whoever stops waiting for it."""

import asyncio
import errno
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.agent_tasks import until
from tests.support.dataset_inventory import Inventory
from whaleflux.data import manifest, sources
from whaleflux.data.hashing import hashed
from whaleflux.sdk import Dataset
from whaleflux.v1 import inventory_pb2
from whaleflux_agent import dataset_files, dataset_pull, dataset_store
from whaleflux_agent.datasets import DatasetCache
from whaleflux_agent.runtime.api import LaunchFailed

NODE = "sites/lab/nodes/n1"
ROOM = 1000


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(dataset_pull, "PAUSE_S", 0.0)


class Slow(sources.Local):
    """Gives bytes once it may; counts how often a source was opened."""

    begun, may = 0, threading.Event()

    def open(self, found, offset, length):
        assert self.may.wait(60)
        return super().open(found, offset, length)


@pytest.fixture
def slow():
    count = SimpleNamespace(begun=0, may=threading.Event())

    class Counted(Slow):
        may = count.may

    def open_source(uri, authorization, act_as):
        count.begun += 1
        return Counted(Path(uri), act_as)

    count.open_source = open_source
    yield count
    count.may.set()


def work(**spec):
    return SimpleNamespace(
        job="queues/q/jobs/j",
        remote_datasets=(),
        spec=SimpleNamespace(
            **{"require_local_data": False, "partial_data": False, "datasets_by_rank": (), "image": "", **spec}
        ),
    )


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "part-0").write_bytes(b"abcdef")
    return folder


def cache_of(tmp_path, inventory, in_use=frozenset, room=ROOM, **more):
    return DatasetCache(tmp_path / "cache", room, NODE, inventory, in_use, **more)


async def test_a_fetch_that_its_task_gave_up_is_not_begun_a_second_time_beside_itself(tmp_path, source, slow):
    cache = cache_of(tmp_path, Inventory(source, other=source), open_source=slow.open_source)
    given_up = asyncio.create_task(cache.fetch("datasets/c4"))
    await until(lambda: slow.begun == 1)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    again = asyncio.create_task(cache.fetch("datasets/c4"))
    other = asyncio.create_task(cache.fetch("datasets/other"))
    await until(lambda: slow.begun >= 2)  # by then a second one of the first would have begun, too
    slow.may.set()
    folder, _ = await asyncio.gather(again, other)
    assert (Path(folder) / "part-0").read_bytes() == b"abcdef"
    assert slow.begun == 2


async def test_a_fetch_that_failed_is_tried_again(tmp_path):
    source = tmp_path / "absent"
    inventory = Inventory(source)
    cache = cache_of(tmp_path, inventory)
    with pytest.raises(LaunchFailed, match="cannot fetch"):
        await cache.fetch("datasets/c4")
    assert inventory.states("datasets/c4") == ["FAILED"]
    source.write_bytes(b"abcdef")
    assert (Path(await cache.fetch("datasets/c4")) / "absent").read_bytes() == b"abcdef"
    assert inventory.states("datasets/c4") == ["FAILED", "PULLING", "READY"]


async def test_the_second_node_is_told_what_the_first_has_read_and_takes_nothing_else(tmp_path, source):
    inventory = Inventory(source)
    await cache_of(tmp_path / "one", inventory).fetch("datasets/c4")
    (source / "part-0").write_bytes(b"ABCDEF")
    with pytest.raises(LaunchFailed, match="not what its manifest says") as rewritten:
        await cache_of(tmp_path / "two", inventory).fetch("datasets/c4")
    (source / "part-1").write_bytes(b"more")
    (source / "part-0").unlink()
    with pytest.raises(LaunchFailed, match="not what it was when it was first read") as other:
        await cache_of(tmp_path / "two", inventory).fetch("datasets/c4")
    assert rewritten.value.unfit and other.value.unfit, "no later try goes better"


async def test_a_copy_that_somebody_wrote_to_is_given_to_nobody(tmp_path, source):
    cache = cache_of(tmp_path, Inventory(source))
    file = Path(await cache.fetch("datasets/c4")) / "part-0"
    os.chmod(file, 0o644)
    file.write_bytes(b"abcdeF")
    assert (Path(await cache.fetch("datasets/c4")) / "part-0").read_bytes() == b"abcdef"


async def test_a_whole_copy_is_used_while_nobody_answers(tmp_path, source):
    inventory = Inventory(source)
    cache = cache_of(tmp_path, inventory)
    folder = await cache.fetch("datasets/c4")
    inventory.away = True
    assert await cache.fetch("datasets/c4") == folder


async def test_what_does_not_fit_is_read_where_it_is_and_nothing_is_written(tmp_path, source):
    said, inventory = [], Inventory(source)
    cache = cache_of(tmp_path, inventory, room=5)

    async def tell(text):
        said.append(text)

    assert await cache.fetch("datasets/c4", work(), tell) == str(source)
    assert "read where it is: 6 B do not fit" in said[-1]
    with pytest.raises(LaunchFailed, match="do not fit") as refused:
        await cache.fetch("datasets/c4", work(require_local_data=True), tell)
    assert refused.value.unfit
    assert not list((tmp_path / "cache" / ".partial").iterdir())
    assert inventory.copies["datasets/c4"][-1].message


async def test_a_disk_that_fills_up_meanwhile_ends_no_job(tmp_path, source, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert await cache_of(tmp_path, Inventory(source)).fetch("datasets/c4", work()) == str(source)


async def test_room_is_made_of_what_nobody_reads_and_only_when_it_is_enough(tmp_path, source):
    large, used = tmp_path / "large", {"datasets/c4"}
    large.write_bytes(bytes(8))
    inventory = Inventory(source, other=source, large=large)
    cache = cache_of(tmp_path, inventory, lambda: frozenset(used), room=13)
    kept = await cache.fetch("datasets/c4", work())
    idle = await cache.fetch("datasets/other", work())
    assert await cache.fetch("datasets/large", work()) == str(tmp_path), "c4 is in use, and other alone is too little"
    assert Path(kept).exists()
    assert Path(idle).exists()
    used.clear()
    assert (Path(await cache.fetch("datasets/large", work())) / "large").exists()
    assert not Path(kept).exists()
    assert not inventory.copies["datasets/c4"][-1].present_bytes


async def test_what_is_pinned_is_pulled_without_a_job_and_stays(tmp_path, source):
    inventory = Inventory(source, other=source)
    cache = cache_of(tmp_path, inventory, room=9)
    inventory.pinned = ["datasets/c4"]
    await cache.upkeep.follow_pins()
    await until(lambda: inventory.states("datasets/c4") == ["PULLING", "READY"])
    assert inventory.copies["datasets/c4"][-1].pinned
    assert await cache.fetch("datasets/other", work()) == str(source), "it makes no room for a job"
    inventory.pinned = []
    await cache.upkeep.follow_pins()
    assert not inventory.copies["datasets/c4"][-1].pinned
    assert await cache.fetch("datasets/other", work()) != str(source)


async def test_a_pin_that_does_not_fit_is_said_and_writes_nothing(tmp_path, source):
    inventory = Inventory(source)
    cache = cache_of(tmp_path, inventory, room=5)
    inventory.pinned = ["datasets/c4"]
    await cache.upkeep.follow_pins()
    await until(lambda: inventory.states("datasets/c4") == ["FAILED"])
    await cache.upkeep.follow_pins()
    assert inventory.states("datasets/c4") == ["FAILED"], "not asked for again at once"
    assert not list((tmp_path / "cache" / ".partial").iterdir())


async def test_an_agent_that_stops_ends_what_is_on_its_way(tmp_path, source, slow):
    cache = cache_of(tmp_path, Inventory(source), open_source=slow.open_source)
    waiting = asyncio.create_task(cache.fetch("datasets/c4"))
    await until(lambda: slow.begun == 1)
    closing = asyncio.create_task(cache.close())
    await asyncio.sleep(0)  # by then it has said so
    slow.may.set()
    await closing
    with pytest.raises(LaunchFailed, match="the agent stops"):
        await waiting
    assert Path(await cache.fetch("datasets/c4")).exists()


async def test_what_an_earlier_dataset_of_the_name_left_is_given_to_nobody(tmp_path, source):
    inventory, used = Inventory(source), set()
    cache = cache_of(tmp_path, inventory, lambda: frozenset(used))
    folder = Path(await cache.fetch("datasets/c4"))
    await cache.upkeep.tidy()
    assert folder.exists()
    assert inventory.copies["datasets/c4"][-1].present_bytes == 6
    inventory.manifests.clear()  # declared by another team, after the first was deleted
    used.add("datasets/c4")
    await cache.upkeep.tidy()
    assert folder.exists(), "a task reads it"
    used.clear()
    await cache.upkeep.tidy()
    assert not folder.exists()
    await cache.fetch("datasets/c4")
    inventory.uris.clear()
    await cache.upkeep.tidy()
    assert not [f for f in (tmp_path / "cache").iterdir() if "@" in f.name]


class TestDeclaredAnew:
    """Whoever declares a dataset may name any digest: what is here of an earlier dataset of the name is not theirs for that."""

    @pytest.fixture
    def inventory(self, source):
        made = Inventory(source)
        made.declared_s["datasets/c4"] = 1
        return made

    def declare_anew(self, inventory, uri):
        """The same name, the same digest, and a source that has nothing of it."""
        inventory.declared_s["datasets/c4"] += 1
        inventory.uris["datasets/c4"] = str(uri)

    async def test_a_copy_of_the_earlier_one_is_given_to_nobody_and_goes(self, tmp_path, source, inventory):
        cache = cache_of(tmp_path, inventory)
        earlier = Path(await cache.fetch("datasets/c4"))
        digest = manifest.from_proto(inventory.manifests["datasets/c4"]).digest
        assert cache.held("datasets/c4", digest).made == earlier.name.rpartition("-")[2], "what neighbours are asked by"
        again = cache_of(tmp_path, inventory)
        assert await again.fetch("datasets/c4") == str(earlier), "an agent that was restarted knows whose it is"
        hollow = tmp_path / "hollow"
        hollow.mkdir()
        (hollow / "part-0").write_bytes(b"000000")
        self.declare_anew(inventory, hollow)
        for one in (cache, again):
            with pytest.raises(LaunchFailed, match="not what its manifest says"):
                await one.fetch("datasets/c4")
        await cache.upkeep.tidy()
        assert not earlier.exists()

    async def test_what_was_pulled_of_it_is_not_gone_on_with(self, tmp_path, source, inventory):
        (source / "part-1").write_bytes(b"ghijkl")
        inventory.manifests["datasets/c4"] = hashed(sources.Local(source)).to_proto()
        (source / "part-1").write_bytes(b"GHIJKL")  # so that the first part comes and the second does not
        cache = cache_of(tmp_path, inventory)
        with pytest.raises(LaunchFailed, match="not what its manifest says"):
            await cache.fetch("datasets/c4")
        hollow = tmp_path / "hollow"
        hollow.mkdir()
        (hollow / "part-0").write_bytes(b"000000")
        (hollow / "part-1").write_bytes(b"ghijkl")
        self.declare_anew(inventory, hollow)
        with pytest.raises(LaunchFailed, match="part-0: bytes 0 to 6 are not what its manifest says"):
            await cache.fetch("datasets/c4")


async def test_an_agent_that_does_not_know_its_pins_yet_removes_nothing(tmp_path, source):
    inventory = Inventory(source, other=source)
    inventory.pinned = ["datasets/c4"]
    kept = await cache_of(tmp_path, inventory, room=9).fetch("datasets/c4", work())
    restarted = cache_of(tmp_path, inventory, room=9)
    inventory.tells_pins = False
    assert await restarted.fetch("datasets/other", work()) == str(source)
    assert Path(kept).exists()
    inventory.tells_pins = True
    assert await restarted.fetch("datasets/other", work()) == str(source), "it is pinned, as it has asked by now"
    inventory.pinned = []
    await restarted.upkeep.follow_pins()
    assert await restarted.fetch("datasets/other", work()) != str(source)


async def test_looks_at_pins_read_nothing_of_what_is_there(tmp_path, source, monkeypatch):
    inventory = Inventory(source)
    inventory.pinned = ["datasets/c4"]
    cache, looks = cache_of(tmp_path, inventory), []
    folder = Path(await cache.fetch("datasets/c4"))
    unchanged = dataset_files.unchanged
    monkeypatch.setattr(dataset_files, "unchanged", lambda *which: looks.append(which) or unchanged(*which))
    monkeypatch.setattr(Path, "read_bytes", lambda path: looks.append(path) or b"")
    for _ in range(3):
        await cache.upkeep.follow_pins()
    assert not looks
    assert inventory.states("datasets/c4") == ["PULLING", "READY", "READY"]
    folder.rename(tmp_path / "away")
    await cache.upkeep.follow_pins()
    monkeypatch.undo()
    await until(lambda: inventory.states("datasets/c4")[3:] == ["PULLING", "READY"])


async def test_a_pinned_copy_that_somebody_wrote_to_is_found_out_and_pulled_again(tmp_path, source):
    inventory = Inventory(source)
    inventory.pinned = ["datasets/c4"]
    cache = cache_of(tmp_path, inventory)
    file = Path(await cache.fetch("datasets/c4")) / "part-0"
    os.chmod(file, 0o644)
    file.write_bytes(b"abcdeF")
    await cache.upkeep.tidy()
    assert inventory.copies["datasets/c4"][-1].present_bytes == 0
    await cache.upkeep.follow_pins()
    await until(lambda: file.exists() and file.read_bytes() == b"abcdef")


async def test_a_copy_whose_manifest_cannot_be_read_stays_and_counts(tmp_path, source, monkeypatch):
    inventory = Inventory(source, other=source)
    kept = Path(await cache_of(tmp_path, inventory, room=9).fetch("datasets/c4", work()))
    reading, broken = Path.read_bytes, [True]

    def read(path):
        if broken[0] and path.name == kept.name:
            raise OSError(errno.EIO, "Input/output error")
        return reading(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    restarted = cache_of(tmp_path, inventory, room=9)
    monkeypatch.setattr(dataset_store, "allocated", lambda folder: 6 if folder == kept else 0)
    assert await restarted.fetch("datasets/other", work()) == str(source), "its room is taken"
    await restarted.upkeep.tidy()
    assert kept.exists()
    broken[0] = False
    assert await restarted.fetch("datasets/c4", work()) == str(kept)
    assert inventory.states("datasets/c4") == ["PULLING", "READY"], "not pulled a second time"


async def test_the_last_copy_of_what_no_source_gives_any_more_stays(tmp_path, source):
    large, gone = tmp_path / "large", tmp_path / "gone"
    large.write_bytes(bytes(8))
    (gone / "sub").mkdir(parents=True)
    (gone / "sub" / "x").write_bytes(b"ghijkl")
    inventory, used = Inventory(gone, other=source, large=large, more=source), set()
    cache = cache_of(tmp_path, inventory, lambda: frozenset(used), room=14)
    kept = Path(await cache.fetch("datasets/c4", work()))
    idle = Path(await cache.fetch("datasets/other", work()))
    (gone / "sub" / "x").unlink()
    assert (Path(await cache.fetch("datasets/large", work())) / "large").exists()
    assert not idle.exists()
    assert kept.exists(), "it is older, and nowhere else"
    elsewhere = inventory_pb2.DatasetCopy(
        node="sites/lab/nodes/n2",
        present_bytes=6,
        state=inventory_pb2.DATASET_COPY_STATE_READY,
        manifest_digest=manifest.from_proto(inventory.manifests["datasets/c4"]).digest,
    )
    inventory.copies["datasets/c4"].append(elsewhere)
    used.add("datasets/large")
    assert await cache.fetch("datasets/more", work()) != str(source)
    assert not kept.exists()


@pytest.fixture
def many(tmp_path):
    folder = tmp_path / "many"
    for number in range(400):
        (folder / f"{number % 7}").mkdir(parents=True, exist_ok=True)
        (folder / f"{number % 7}" / f"{number}.bin").write_bytes(os.urandom(50 + number % 13))
    return folder


def files_of(folder):
    return sorted(path for path in Path(folder).rglob("*") if not path.is_dir())


async def test_of_what_exceeds_the_cache_a_fixed_part_is_here_in_every_epoch(tmp_path, many):
    total = sum(path.stat().st_size for path in files_of(many))
    inventory = Inventory(many)
    cache = cache_of(tmp_path, inventory, room=total // 2)
    folder = await cache.fetch("datasets/c4", work())
    chance, hits = random.Random(1), []
    for _ in range(3):
        epoch = files_of(folder)
        chance.shuffle(epoch)
        assert len(epoch) == 400
        for path in epoch:
            assert path.read_bytes() == (many / path.relative_to(folder)).read_bytes()
        hits.append(sum(path.stat().st_size for path in epoch if not path.is_symlink()) / total)
    assert all(0.49 <= share <= 0.5 for share in hits)
    last = inventory.copies["datasets/c4"][-1]
    assert (inventory.states("datasets/c4")[-1], last.present_bytes, last.message[:3]) == (
        "PARTIAL",
        hits[0] * total,
        "50%",
    )


async def test_a_part_is_found_again_and_only_by_those_for_whom_it_will_do(tmp_path, many):
    total = sum(path.stat().st_size for path in files_of(many))
    inventory = Inventory(many)
    folder = await cache_of(tmp_path, inventory, room=total // 2).fetch("datasets/c4", work())
    before = {path: path.lstat().st_ino for path in files_of(folder)}
    restarted = cache_of(tmp_path, inventory, room=total // 2)
    await restarted.upkeep.tidy()
    assert await restarted.fetch("datasets/c4", work()) == folder
    assert {path: path.lstat().st_ino for path in files_of(folder)} == before
    assert await restarted.fetch("datasets/c4", work(image="pytorch")) == folder
    assert await restarted.home_of("datasets/c4", folder) == str(many), "so that a container has what links lead to"
    with pytest.raises(LaunchFailed, match="do not fit"):
        await restarted.fetch("datasets/c4", work(require_local_data=True))
    for home in (tmp_path / "cache" / ".homes").iterdir():
        home.unlink()  # as an agent left it that knew of no containers
    assert await restarted.fetch("datasets/c4", work(image="pytorch")) == folder
    assert await restarted.home_of("datasets/c4", folder) == str(many)
    (many / "0" / "0.bin").write_bytes(b"another version")
    assert await restarted.fetch("datasets/c4", work()) in (
        str(many),
        *map(str, (tmp_path / "cache").glob("c4@*~part")),
    )
    assert all(path.stat().st_size for path in files_of(many)), "what is linked to is nobody's to change"


@pytest.fixture
def bucket():
    """200 objects of one size, and the source that reads them."""
    fsspec = pytest.importorskip("fsspec")
    root = f"memory://{os.urandom(8).hex()}"
    for number in range(200):
        with fsspec.open(f"{root}/{number % 7}/{number}", "wb") as file:
            file.write(number.to_bytes(100))
    yield SimpleNamespace(uri=root, size=200 * 100, open_source=lambda uri, *_: sources.ByFsspec(uri))
    fsspec.filesystem("memory").rm(root.removeprefix("memory:/"), recursive=True)


async def test_of_a_bucket_that_exceeds_the_cache_a_reader_finds_a_fixed_half_here_and_the_rest_there(tmp_path, bucket):
    inventory = Inventory(bucket.uri)
    cache = cache_of(tmp_path, inventory, room=bucket.size // 2, open_source=bucket.open_source)
    folder = await cache.fetch("datasets/c4", work(partial_data=True))
    environment = {
        "WHALEFLUX_DATASET_C4": folder,
        "WHALEFLUX_DATASOURCE_C4": await cache.home_of("datasets/c4", folder),
    }
    chance, epochs = random.Random(1), []
    for _ in range(3):
        data = Dataset("c4", environment)
        paths = data.paths()
        chance.shuffle(paths)
        assert len(paths) == 200
        for path in paths:
            with data.open(path) as file:
                assert file.read() == int(path.partition("/")[2]).to_bytes(100)
        epochs.append({path for path in paths if data.is_here(path)})
    assert epochs[0] == epochs[1] == epochs[2]
    assert 0.49 <= len(epochs[0]) / 200 <= 0.51
    assert inventory.states("datasets/c4")[-1] == "PARTIAL"


async def test_of_a_bucket_no_part_is_pulled_for_code_that_does_not_look_for_the_rest(tmp_path, bucket):
    inventory = Inventory(bucket.uri)
    cache = cache_of(tmp_path, inventory, room=bucket.size // 2, open_source=bucket.open_source)
    assert await cache.fetch("datasets/c4", work()) == bucket.uri
    folder = await cache.fetch("datasets/c4", work(partial_data=True))
    assert await cache.fetch("datasets/c4", work()) == bucket.uri, "nor is one given to it that is there"
    assert Path(folder).is_dir()


async def test_a_pin_of_what_exceeds_the_cache_gets_no_part_for_it(tmp_path, many):
    inventory = Inventory(many)
    inventory.pinned = ["datasets/c4"]
    cache = cache_of(tmp_path, inventory, room=1000)
    await cache.upkeep.follow_pins()
    await until(lambda: "FAILED" in inventory.states("datasets/c4"))
    await cache.close()
    assert not [folder for folder in (tmp_path / "cache").iterdir() if "@" in folder.name]
    assert not list((tmp_path / "cache" / ".partial").iterdir())


async def test_what_nobody_foresaw_ends_this_fetch_and_not_the_agent(tmp_path):
    def open_source(uri, authorization, act_as):
        raise ZeroDivisionError("a driver's bug")

    cache = cache_of(tmp_path, Inventory("s3://bucket/corpus"), open_source=open_source)
    with pytest.raises(LaunchFailed, match="a driver's bug"):
        await cache.fetch("datasets/c4", work())


class TestBeyondTheQuota:
    """A task whose queue holds as much data as it may: nothing is pulled for it."""

    def beyond(self, **spec):
        made = work(**spec)
        made.remote_datasets = ("datasets/c4",)
        return made

    async def test_it_reads_a_copy_that_is_here_for_others_else_the_source(self, tmp_path, source):
        said, inventory = [], Inventory(source)
        cache = cache_of(tmp_path, inventory)

        async def tell(text):
            said.append(text)

        assert await cache.fetch("datasets/c4", self.beyond(), tell) == str(source)
        assert said == ["datasets/c4, which is read where it is: its queue holds as much data as it may"]
        assert inventory.states("datasets/c4") == [], "nothing was pulled"
        folder = await cache.fetch("datasets/c4", work())
        assert await cache.fetch("datasets/c4", self.beyond(), tell) == folder

    async def test_who_insists_on_a_copy_is_refused(self, tmp_path, source):
        cache = cache_of(tmp_path, Inventory(source))
        with pytest.raises(LaunchFailed, match="holds as much data as it may") as refused:
            await cache.fetch("datasets/c4", self.beyond(require_local_data=True))
        assert refused.value.unfit

    async def test_a_source_that_cannot_be_read_ends_the_task_and_not_the_agent(self, tmp_path):
        def open_source(uri, authorization, act_as):
            raise sources.SourceFailed("s3:// needs the package s3fs on this node: pip install s3fs")

        cache = cache_of(tmp_path, Inventory("s3://bucket/corpus"), open_source=open_source)
        with pytest.raises(LaunchFailed, match="pip install s3fs"):
            await cache.fetch("datasets/c4", self.beyond())
        cache = cache_of(tmp_path, Inventory(tmp_path / "absent"))
        with pytest.raises(LaunchFailed, match="No such file"):
            await cache.fetch("datasets/c4", self.beyond())

    async def test_of_a_source_that_is_one_file_the_folder_is_given_and_which_file_it_is(self, tmp_path, source):
        (source / "other").write_bytes(b"of somebody else")
        cache = cache_of(tmp_path, Inventory(source / "part-0"))
        folder = await cache.fetch("datasets/c4", self.beyond())
        home = await cache.home_of("datasets/c4", folder)
        assert (folder, home) == (str(source), str(source / "part-0"))
        data = Dataset("c4", {"WHALEFLUX_DATASET_C4": folder, "WHALEFLUX_DATASOURCE_C4": home})
        assert data.paths() == ["part-0"]
        folder = await cache.fetch("datasets/c4", work())
        assert Path(folder).is_relative_to(tmp_path / "cache")
        assert await cache.home_of("datasets/c4", folder) == "", "the copy has just this file"

    async def test_what_is_not_there_is_said(self, tmp_path, source):
        cache = cache_of(tmp_path, Inventory(source))
        gone = self.beyond()
        gone.remote_datasets = ("datasets/gone",)
        with pytest.raises(LaunchFailed, match="gone"):
            await cache.fetch("datasets/gone", gone)
