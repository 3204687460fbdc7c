"""Which nodes were slower than the others of their run: what the ledger's files say of it, exactly, and what is remembered of them."""

import contextlib

import pytest

from tests.support.ledger_world import BEGIN_MS, leading, reports, row, step
from whaleflux.store.memory import MemoryStore
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.recommend.evidence import Pace
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.paces import MOST_AT_ONCE, MOST_KEPT, Paces, hours_of

USD = 1_000_000
JOB = "queues/q/jobs/j"
END_MS = BEGIN_MS + MOST_KEPT * HOUR_MS


def ranks(hour_ms, own_ms, **more):
    """By card: ten steps of a second, of which each is itself at work for so many milliseconds; the rest is communication."""
    return [
        step(0, hour_ms, hour_ms + 10_000, device=card, comm_in_node_us=2_000, comm_cross_us=(1_000 - own) * 10_000 - 2_000)
        | more
        for card, own in own_ms.items()
    ]  # fmt: skip


def cards(hour_ms, on):
    return tuple(row(hour_ms, card, JOB, f"sites/s/nodes/{node}", 3 * USD) for card, node in on.items())


ON = {"a": "m", "b": "m", "c": "n", "d": "slow"}
SLOW = {"a": 500, "b": 500, "c": 500, "d": 700}


@contextlib.asynccontextmanager
async def told(path, steps, on=ON, hours=1):
    """`Paces` of a ledger of closed hours, and its state."""
    async with leading(path, MemoryStore()) as ledger:
        await ledger.append(reports(1, steps=steps, taken_ms=BEGIN_MS + hours * HOUR_MS))
        for hour_ms in range(BEGIN_MS, BEGIN_MS + hours * HOUR_MS, HOUR_MS):
            await ledger.close(await ledger.inputs(hour_ms), cards(hour_ms, on))
        with contextlib.closing(Engine()) as engine:
            yield Paces(LocalFolder(path), engine), ledger.state


async def test_own_time_is_a_step_without_communication_and_others_pay_for_waiting(tmp_path):
    async with told(tmp_path, ranks(BEGIN_MS, SLOW)) as (paces, state):
        assert paces.slow(hours_of(state, BEGIN_MS, END_MS)) == [
            Pace(BEGIN_MS, JOB, "u1", "sites/s/nodes/slow", 700_000, 500_000, 1_000_000, 9 * USD)
        ]


@pytest.mark.parametrize(
    ("steps", "on"),
    [
        (ranks(BEGIN_MS, SLOW | {"d": 525}), ON),  # a twentieth, and no more
        (ranks(BEGIN_MS, SLOW), dict.fromkeys(ON, "m")),  # beside no other node
        (ranks(BEGIN_MS, SLOW, comm_cross_us=None), ON),  # nobody says how long it communicated
        (ranks(BEGIN_MS, SLOW, first_step=11), ON),  # no step is whole
        (ranks(BEGIN_MS, SLOW, device="elsewhere"), ON),  # of no card of the run
    ],
)
async def test_who_is_hardly_slower_or_does_not_say_it_is_not_judged(tmp_path, steps, on):
    async with told(tmp_path, steps, on) as (paces, state):
        assert paces.slow(hours_of(state, BEGIN_MS, END_MS)) == []


async def test_the_newest_hours_are_read_first_and_remembered_whichever_windows_are_asked_for_between(tmp_path):
    hours = MOST_AT_ONCE + 2
    steps = [one for n in range(hours) for one in ranks(BEGIN_MS + n * HOUR_MS, SLOW)]
    async with told(tmp_path, steps, hours=hours) as (paces, state):
        whole = hours_of(state, BEGIN_MS, END_MS)
        assert [pace.hour_ms for pace in paces.slow(whole)] == [hour[0].start_ms for hour in whole[2:]]
        assert len(paces.slow(whole)) == hours
        assert len(paces.slow(whole[-1:])) == 1
        for hour in whole:
            (tmp_path / hour[0].path).unlink()
        assert len(paces.slow(whole)) == hours, "without their files"


async def test_a_file_that_is_gone_is_said(tmp_path):
    async with told(tmp_path, ranks(BEGIN_MS, SLOW)) as (paces, state):
        whole = hours_of(state, BEGIN_MS, END_MS)
        (tmp_path / whole[0][0].path).unlink()
        with pytest.raises(Damaged):
            paces.slow(whole)
