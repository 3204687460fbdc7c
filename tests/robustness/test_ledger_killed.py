"""The ledger's leader is killed while it writes, on a real etcd: what it acknowledged is there, once (`benchmarks.ledger_speed` kills 200 times)."""

import random
import resource

import pytest

from benchmarks.ledger_lab.killing import faults, kill_again_and_again
from benchmarks.ledger_lab.worker import reports
from tests.support.etcd_server import EtcdServer
from whaleflux.errors import Unavailable
from whaleflux.store.election import elect
from whaleflux.store.memory import MemoryStore
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.ledger import open_ledger

pytestmark = pytest.mark.robustness


@pytest.mark.timeout(600)
async def test_nothing_acknowledged_is_lost_or_doubled(tmp_path):
    async with EtcdServer(tmp_path) as etcd:
        said = await kill_again_and_again(etcd.endpoint, tmp_path / "ledger", 8, random.Random(7))
        assert said.rounds == 8
        assert said.reports > 0
        assert await faults(etcd.endpoint, tmp_path / "ledger", said) == []


async def test_no_room_refuses_the_commit_and_leaves_the_ledger_as_it_was(tmp_path):
    store, engine = MemoryStore(), Engine()
    async with elect(store, "console", "here") as leader:
        ledger = await open_ledger(LocalFolder(tmp_path), store, leader, engine=engine)
        await ledger.append(reports(1, 20))
        before = ledger.state.number
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
        try:
            with pytest.raises(Unavailable, match="free room"):
                await ledger.append(reports(21, 40))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert ledger.state.number == before
        await ledger.append(reports(21, 40))
        assert ledger.state.position.sequence == 40
        assert await ledger.verify(ledger.state.files[next(iter(ledger.state.files))].start_ms) == ()
    engine.close()
    assert not list(tmp_path.rglob("*.partial"))
