"""What must be durable waits for room on a full disk."""

import asyncio
import errno
import os

import pytest

from whaleflux_agent import state as state_module
from whaleflux_agent.runtime import shim
from whaleflux_agent.state import StateDir


def full(times, number=errno.ENOSPC):
    """A write that fails so often, then says "written"."""
    left = [times]

    def write():
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return "written"

    return write


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "LOOK_FOR_ROOM_EVERY_S", 0.01)
    made = StateDir(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_write_is_repeated_until_there_is_room_and_later_ones_keep_their_order(state, number):
    order = []
    first = asyncio.create_task(state.run(lambda: order.append(full_write())))
    full_write = full(3, number)
    await asyncio.sleep(0)
    await state.run(order.append, "later")
    await first
    assert order == ["written", "later"]


async def test_another_failure_of_the_disk_is_raised_at_once(state):
    with pytest.raises(OSError, match="Input/output"):
        await state.run(full(1, errno.EIO))


async def test_stopping_does_not_wait_for_room(state):
    waiting = asyncio.create_task(state.run(full(10**9)))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(state.close)
    with pytest.raises(OSError, match="No space"):
        await waiting


def test_how_a_rank_ended_is_kept_until_it_can_be_written_down(tmp_path, monkeypatch):
    ended, write = {0: {"code": 0}, 1: {"code": 3}}, shim.write
    monkeypatch.setattr(shim, "write", lambda *_: full(1)())
    shim.record_exits(ended, str(tmp_path))
    assert ended == {0: {"code": 0}, 1: {"code": 3}}
    monkeypatch.setattr(shim, "write", write)
    shim.record_exits(ended, str(tmp_path))
    assert ended == {}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["exit-0.json", "exit-1.json"]
