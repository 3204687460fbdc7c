"""The ledger ends anywhere, and the next leader goes on: nothing that was acknowledged is lost, nothing is there twice."""

import json
import shutil

import pytest

from tests.support.failing_folder import Ended, EndingFolder
from tests.support.ledger_world import BEGIN_MS, MINUTE_MS, leading, reports, row, sample
from whaleflux.errors import Aborted, Unavailable
from whaleflux.store import keys
from whaleflux.store.api import Delete, Put
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.ledger import writer
from whaleflux_console.ledger.damage import Damaged, OtherFolder
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import open_ledger
from whaleflux_console.ledger.manifest import DAY_MS, Kind
from whaleflux_console.ledger.shelf import table_of


@pytest.fixture(autouse=True)
def checkpoints_are_near(monkeypatch):
    monkeypatch.setattr(writer, "CHECKPOINT_EVERY", 3)


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    yield engine
    engine.close()


def kept(ledger):
    """Sequences of all samples that are in the ledger's raw files."""
    files = [file for file in ledger.state.files.values() if file.kind is Kind.RAW]
    return sorted(n for file in files for n in table_of(ledger.folder, file)["sequence"].to_pylist())


async def work(ledger, acknowledged, until=6):
    """Appends report after report, over two hours, and closes what is due; goes on where the ledger is."""
    while (n := ledger.state.position.sequence + 1) <= until:
        at_ms = BEGIN_MS + n * 20 * MINUTE_MS
        await ledger.append(reports(n, samples=[sample(start_ms=at_ms, sequence=n)], taken_ms=at_ms))
        acknowledged.append(n)
        for hour_ms in ledger.due():
            await ledger.close(await ledger.inputs(hour_ms), [row(hour_ms)])


async def begin(folder, store, engine, **more):
    async with elect(store, "console", "here") as leader:
        return await open_ledger(folder, store, leader, engine=engine, **more)


async def count_changes(tmp_path, engine):
    folder, store = EndingFolder(LocalFolder(tmp_path)), MemoryStore()
    async with elect(store, "console", "here") as leader:
        await work(await open_ledger(folder, store, leader, engine=engine), [])
    return folder.changes


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_it_may_end_at_any_change_of_a_file(tmp_path, engine, after):
    changes = await count_changes(tmp_path / "whole", engine)
    assert changes > 15
    for at in range(changes):
        place, store, acknowledged = tmp_path / str(at), MemoryStore(), []
        with pytest.raises(Ended):
            async with elect(store, "console", "first") as leader:
                ending = EndingFolder(LocalFolder(place), at, after=after)
                await work(await open_ledger(ending, store, leader, engine=engine), acknowledged)
        async with elect(store, "console", "second") as leader:
            ledger = await open_ledger(LocalFolder(place), store, leader, engine=engine)
            assert ledger.state.position.sequence >= max(acknowledged, default=0)
            await work(ledger, [])
            assert kept(ledger) == list(range(1, 7))
            assert (await ledger.rows(BEGIN_MS))[0].bill_micros == row().bill_micros
            assert await ledger.verify(BEGIN_MS) == ()
            await ledger.keep_house(BEGIN_MS)
        data = {found.path for kind in Kind for found in LocalFolder(place).list(kind)}
        assert data == set(ledger.state.files), "nothing that no manifest names is left"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_any_change_of_a_file_may_fail_and_the_same_leader_goes_on(tmp_path, engine, after):
    for at in range(await count_changes(tmp_path / "whole", engine)):
        place, store = tmp_path / str(at), MemoryStore()
        failing, tries = EndingFolder(LocalFolder(place), at, after=after, error=Unavailable), 0
        async with elect(store, "console", "first") as leader:
            while True:
                try:
                    ledger = await open_ledger(failing, store, leader, engine=engine)
                    await work(ledger, [])
                    break
                except Unavailable:
                    tries += 1
            assert tries <= 1
            assert kept(ledger) == list(range(1, 7))
            assert (await ledger.rows(BEGIN_MS))[0].bill_micros == row().bill_micros
            assert await ledger.verify(BEGIN_MS) == ()
        async with elect(store, "console", "second") as leader:
            ledger = await open_ledger(LocalFolder(place), store, leader, engine=engine)
            assert kept(ledger) == list(range(1, 7))
            await ledger.keep_house(BEGIN_MS)
        assert {found.path for kind in Kind for found in LocalFolder(place).list(kind)} == set(ledger.state.files)


async def test_an_old_leader_cannot_commit(tmp_path, engine):
    store, folder = MemoryStore(), LocalFolder(tmp_path)
    async with elect(store, "console", "old") as leader:
        old = await open_ledger(folder, store, leader, engine=engine)
        await work(old, [], until=2)
    async with leading(tmp_path, store) as ledger:
        await work(ledger, [], until=3)
        with pytest.raises(Aborted):
            await work(old, [])
        with pytest.raises(Unavailable, match="opened anew"):
            await work(old, [])
        await work(ledger, [])
        assert kept(ledger) == list(range(1, 7))
    async with leading(tmp_path, store) as ledger:
        assert kept(ledger) == list(range(1, 7))
        assert await ledger.verify(BEGIN_MS) == ()


async def test_a_commit_whose_answer_never_came_is_taken_up(tmp_path, engine):
    store, folder = MemoryStore(), LocalFolder(tmp_path)
    async with leading(tmp_path, store) as ledger:
        await work(ledger, [], until=4)
        before = await store.get(keys.LEDGER_HEAD)
        await work(ledger, [], until=5)
    await store.commit(Put(keys.LEDGER_HEAD, before.value))
    ledger = await begin(folder, store, engine)
    assert ledger.state.position.sequence == 5
    assert "taken up" in ledger.notes[0]
    assert kept(ledger) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kept_commits", [0, 1, 4, 9])
async def test_a_store_that_went_back_to_a_backup_follows_the_folder(tmp_path, engine, kept_commits):
    store, heads = MemoryStore(), []
    async with leading(tmp_path, store) as ledger:
        heads.append(await store.get(keys.LEDGER_HEAD))
        for n in range(1, 13):
            await work(ledger, [], until=n)
            heads.append(await store.get(keys.LEDGER_HEAD))
    await store.commit(Put(keys.LEDGER_HEAD, heads[kept_commits].value))
    async with leading(tmp_path, store) as ledger:
        assert kept(ledger) == list(range(1, 13))
        assert ledger.notes
        await work(ledger, [], until=14)
    async with leading(tmp_path, store) as ledger:
        assert kept(ledger) == list(range(1, 15))
        assert ledger.notes == ()


async def test_a_store_that_lost_everything_follows_the_folder(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await work(ledger, [], until=12)
    await store.commit(Delete(keys.LEDGER_HEAD))
    async with leading(tmp_path, store) as ledger:
        assert kept(ledger) == list(range(1, 13))
        assert "no head" in ledger.notes[0]


async def test_a_folder_that_went_back_is_read_again_from_where_it_is(tmp_path):
    store, copy = MemoryStore(), tmp_path / "copy"
    async with leading(tmp_path / "ledger", store) as ledger:
        await work(ledger, [], until=5)
        shutil.copytree(tmp_path / "ledger", copy)
        await work(ledger, [], until=12)
    async with leading(copy, store) as ledger:
        assert "went back" in ledger.notes[0]
        assert ledger.state.position.sequence == 5
        await work(ledger, [], until=12)
        assert kept(ledger) == list(range(1, 13))


async def test_a_volume_that_is_not_mounted_is_not_taken_for_a_loss(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path / "ledger", store) as ledger:
        await work(ledger, [], until=5)
    head = await store.get(keys.LEDGER_HEAD)
    with pytest.raises(OtherFolder, match="--ledger-rebuild"):
        async with leading(tmp_path / "empty", store):
            pass
    assert await store.get(keys.LEDGER_HEAD) == head
    async with leading(tmp_path / "empty", store, rebuild=True) as ledger:
        assert ledger.state.position.sequence == 0
        await work(ledger, [], until=5)
        assert kept(ledger) == [1, 2, 3, 4, 5]


async def test_reports_whose_files_are_gone_are_read_again(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await work(ledger, [], until=8)
    for name in ("raw", "steps", "minutes", "work", "hours"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    async with leading(tmp_path, store) as ledger:
        assert "is gone" in ledger.notes[0]
        assert ledger.state.position.again == ((1, 8),)
        again = [sample(start_ms=BEGIN_MS + n * 20 * MINUTE_MS, sequence=n) for n in range(1, 9)]
        await ledger.append_again(reports(1, 3, samples=again[:3]))
        assert ledger.state.position.again == ((4, 8),)
        await ledger.give_up(4)
        await ledger.append_again(reports(5, 8, samples=again[4:]))
        assert ledger.state.position.again == ()
        assert ledger.state.position.missed == 1
        assert kept(ledger) == [1, 2, 3, 5, 6, 7, 8]
        assert ledger.due() == (BEGIN_MS, BEGIN_MS + HOUR_MS)


async def test_a_torn_file_is_named_set_aside_and_its_hour_made_again(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await work(ledger, [], until=8)
        torn = ledger.state.newest(Kind.HOURS, BEGIN_MS)
        (tmp_path / torn.path).write_bytes(b"PAR1 torn")
        with pytest.raises(Damaged, match="hour=00"):
            await ledger.rows(BEGIN_MS)
        (damage,) = await ledger.verify(BEGIN_MS)
        await ledger.recover([damage])
        assert (tmp_path / "aside" / torn.path).read_bytes() == b"PAR1 torn"
        assert ledger.due() == (BEGIN_MS,)
        await ledger.close(await ledger.inputs(BEGIN_MS), [row()])
        assert await ledger.verify(BEGIN_MS) == ()
        assert await ledger.rows(BEGIN_MS) == (row(version=1),)


async def test_what_cannot_be_reached_is_not_called_damaged(tmp_path, monkeypatch):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        await work(ledger, [], until=8)

        def unreachable(path):
            raise Unavailable("no answer")

        monkeypatch.setattr(ledger.folder, "read", unreachable)
        with pytest.raises(Unavailable):
            await ledger.verify(BEGIN_MS)
        with pytest.raises(Unavailable):
            await ledger.rows(BEGIN_MS)


async def test_a_commit_and_a_checkpoint_cost_the_same_with_a_long_history(tmp_path):
    store = MemoryStore()
    sizes = []
    async with leading(tmp_path, store) as ledger:
        for day in range(40):
            at_ms = BEGIN_MS + day * DAY_MS
            n = ledger.state.position.sequence
            for more in range(1, 4):
                await ledger.append(
                    reports(n + more, samples=[sample(start_ms=at_ms + more * HOUR_MS)], taken_ms=at_ms)
                )
            links = [file for file in (tmp_path / "manifest").rglob("*.json") if file.parent.name != "checkpoints"]
            sizes.append(max(file.stat().st_size for file in links))
            own = list((tmp_path / "manifest").glob("*.json"))
            assert len(own) <= 9
        head = json.loads((await store.get(keys.LEDGER_HEAD)).value)
    assert max(sizes) < 4_000
    assert len(json.dumps(head)) < 1_000
