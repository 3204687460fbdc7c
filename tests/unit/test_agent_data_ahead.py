"""Data that is pulled for jobs that are to start here: at once, kept while it is wanted, and stopped when nobody wants it any more."""

import asyncio
import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.agent_tasks import until
from tests.support.dataset_inventory import Inventory
from tests.support.virtual_time import LoopClock
from whaleflux.data import sources
from whaleflux.v1 import agent_pb2
from whaleflux_agent import data_ahead
from whaleflux_agent.data_ahead import DataAhead
from whaleflux_agent.dataset_store import DatasetStore
from whaleflux_agent.datasets import DatasetCache

NODE = "sites/lab/nodes/n1"
TEXT, OTHER = "datasets/c4", "datasets/other"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "part-0").write_bytes(b"abcdef")
    return folder


@pytest.fixture
def gate():
    """Sources that give their bytes once they may."""
    may = threading.Event()

    class Gated(sources.Local):
        def open(self, found, offset, length):
            assert may.wait(60)
            return super().open(found, offset, length)

    yield SimpleNamespace(may=may, open_source=lambda uri, authorization, act_as: Gated(Path(uri), act_as))
    may.set()


@contextlib.asynccontextmanager
async def running(cache):
    ahead = DataAhead(cache, LoopClock())
    task = asyncio.create_task(ahead.run())
    try:
        yield ahead
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def claims(*datasets):
    return agent_pb2.DesiredData(claims=[agent_pb2.DataClaim(dataset=name, job="queues/q/jobs/j") for name in datasets])


def said(ahead, dataset):
    return next((one for one in ahead.report().datasets if one.dataset == dataset), agent_pb2.DataProgress())


async def test_it_is_pulled_before_a_task_asks_and_stays_while_it_is_wanted(tmp_path, source):
    inventory = Inventory(source, other=source)
    cache = DatasetCache(tmp_path / "cache", 7, NODE, inventory, frozenset)  # room for one of them
    async with running(cache) as ahead:
        ahead.desire(claims(TEXT))
        await until(lambda: said(ahead, TEXT).ready)
        assert said(ahead, TEXT).size_bytes == 6
        assert inventory.copies[TEXT][-1].pinned, "others are told that it stays"
        ahead.desire(claims(TEXT, OTHER))
        await until(lambda: said(ahead, OTHER).message)
        assert "do not fit" in said(ahead, OTHER).message
        ahead.desire(claims(OTHER))
        folder = Path(await cache.fetch(OTHER))
        assert folder.is_relative_to(tmp_path / "cache"), "what nobody wants any more makes room"


async def test_a_pull_that_nobody_wants_any_more_stops_and_whoever_comes_begins_anew(tmp_path, source, gate):
    inventory = Inventory(source)
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, inventory, frozenset, open_source=gate.open_source)
    async with running(cache) as ahead:
        ahead.desire(claims(TEXT))
        await until(lambda: "PULLING" in inventory.states(TEXT))
        ahead.desire(claims())
        await until(cache.begin(TEXT).progress.stop.is_set)
        came = asyncio.create_task(cache.fetch(TEXT))
        gate.may.set()
        assert (Path(await came) / "part-0").read_bytes() == b"abcdef"


async def test_a_pull_that_a_task_waits_for_goes_on(tmp_path, source, gate):
    inventory = Inventory(source)
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, inventory, frozenset, open_source=gate.open_source)
    async with running(cache) as ahead:
        ahead.desire(claims(TEXT))
        await until(lambda: "PULLING" in inventory.states(TEXT))
        task = asyncio.create_task(cache.fetch(TEXT))
        await asyncio.sleep(0)
        ahead.desire(claims())
        await cache.give_up(TEXT)
        assert not cache.begin(TEXT).progress.stop.is_set()
        gate.may.set()
        assert (Path(await task) / "part-0").read_bytes() == b"abcdef"


async def test_what_failed_is_said_and_tried_again_later(tmp_path):
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, Inventory(tmp_path / "absent"), frozenset)
    async with running(cache) as ahead:
        ahead.desire(claims(TEXT))
        await until(lambda: said(ahead, TEXT).message)
        assert "cannot fetch" in said(ahead, TEXT).message
        assert not said(ahead, TEXT).ready


async def test_what_is_wanted_again_while_its_pull_stops_begins_anew(tmp_path, source, gate):
    inventory = Inventory(source)
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, inventory, frozenset, open_source=gate.open_source)
    async with running(cache) as ahead:
        ahead.desire(claims(TEXT))
        await until(lambda: "PULLING" in inventory.states(TEXT))
        ahead.desire(claims())
        await until(cache.begin(TEXT).progress.stop.is_set)
        ahead.desire(claims(TEXT))
        gate.may.set()
        await until(lambda: said(ahead, TEXT).ready)


async def test_a_pull_that_ended_meanwhile_leaves_a_copy_that_others_are_told_of(tmp_path, source, gate, monkeypatch):
    inventory = Inventory(source)
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, inventory, frozenset, open_source=gate.open_source)
    async with running(cache) as ahead:
        ahead.desire(claims(TEXT))
        await until(lambda: "PULLING" in inventory.states(TEXT))
        publish, may_end = DatasetStore.publish, threading.Event()
        monkeypatch.setattr(
            DatasetStore, "publish", lambda *what, **more: (may_end.wait(60), publish(*what, **more))[1]
        )
        gate.may.set()
        await until(lambda: cache.begin(TEXT).progress.done_bytes == 6)
        ahead.desire(claims())
        await until(cache.begin(TEXT).progress.stop.is_set)
        may_end.set()
        await until(lambda: inventory.states(TEXT)[-2:] == ["READY", "READY"])
        assert inventory.copies[TEXT][-1].present_bytes == 6, "all of it is here"
        assert not inventory.copies[TEXT][-1].pinned, "and stays as long as its room is not needed"


async def test_only_some_come_at_a_time_so_that_tasks_find_room_beside_them(tmp_path, source, gate):
    others = {f"other-{number}": source for number in range(6)}
    inventory = Inventory(source, **others)
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, inventory, frozenset, open_source=gate.open_source)

    def begun():
        return [name for name in inventory.uris if inventory.states(name)]

    async with running(cache) as ahead:
        ahead.desire(claims(*(f"datasets/{name}" for name in others)))
        await until(lambda: len(begun()) == data_ahead.AT_ONCE)
        task = asyncio.create_task(cache.fetch(TEXT))
        await until(lambda: inventory.states(TEXT))
        assert len(begun()) == data_ahead.AT_ONCE + 1
        gate.may.set()
        assert (Path(await task) / "part-0").read_bytes() == b"abcdef"
        await until(lambda: all(said(ahead, f"datasets/{name}").ready for name in others))
