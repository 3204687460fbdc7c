"""The node's cache of datasets: whole or not there, whoever stops waiting for it."""

import asyncio
import threading
from pathlib import Path

import pytest

from tests.support.agent_tasks import until
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.datasets import DatasetCache, copy
from whaleflux_agent.runtime.api import LaunchFailed

NODE = "sites/lab/nodes/n1"


class Inventory:
    """Knows every dataset."""

    def __init__(self, uri):
        self.uri, self.declared_s = uri, 0.0

    async def GetDataset(self, request, timeout):
        found = inventory_pb2.Dataset(name=request.name, uri=str(self.uri), size_bytes=6)
        found.create_time.FromSeconds(int(self.declared_s))
        return found

    async def ReportCachedDataset(self, request, timeout):
        return inventory_pb2.Dataset(name=request.dataset)


class SlowCopy:
    """Copies once it may; counts how often it was asked to."""

    def __init__(self):
        self.begun, self.may = 0, threading.Event()

    def __call__(self, uri, folder):
        self.begun += 1
        assert self.may.wait(60)
        return copy(uri, folder)


async def test_a_fetch_that_its_task_gave_up_is_not_begun_a_second_time_beside_itself(tmp_path):
    source, slow = tmp_path / "source", SlowCopy()
    source.mkdir()
    (source / "part-0").write_bytes(b"abcdef")
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, Inventory(source), frozenset, copy=slow)
    given_up = asyncio.create_task(cache.fetch("datasets/c4"))
    await until(lambda: slow.begun == 1)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    again = asyncio.create_task(cache.fetch("datasets/c4"))
    other = asyncio.create_task(cache.fetch("datasets/other"))
    await until(lambda: slow.begun >= 2)  # by then a second one of the first would have begun, too
    slow.may.set()
    await asyncio.gather(again, other)
    assert (tmp_path / "cache" / "c4" / "part-0").read_bytes() == b"abcdef"
    assert slow.begun == 2


async def test_a_fetch_that_failed_is_tried_again(tmp_path):
    source = tmp_path / "source"
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, Inventory(source), frozenset)
    with pytest.raises(LaunchFailed, match="cannot fetch"):
        await cache.fetch("datasets/c4")
    source.write_bytes(b"abcdef")
    assert (await cache.fetch("datasets/c4")).endswith("c4")


async def test_what_an_earlier_dataset_of_the_name_left_is_given_to_nobody_for_long(tmp_path):
    source, inventory = tmp_path / "source", Inventory(tmp_path / "source")
    source.write_bytes(b"abcdef")
    used = set()
    cache = DatasetCache(tmp_path / "cache", 1000, NODE, inventory, lambda: frozenset(used))
    folder = Path(await cache.fetch("datasets/c4"))
    await cache.tidy()
    assert folder.exists()
    inventory.declared_s = folder.stat().st_mtime + 60  # by another team, after the first was deleted
    used.add("datasets/c4")
    await cache.tidy()
    assert folder.exists(), "a task reads it"
    used.clear()
    await cache.tidy()
    assert not folder.exists()
