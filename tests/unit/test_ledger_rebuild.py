"""What is lost is made again: the same sums, as far as anybody still knows what they are made of."""

import shutil
from dataclasses import replace

from tests.support.ledger_world import BEGIN_MS, leading, reports, sample, step
from whaleflux.store.memory import MemoryStore
from whaleflux_console.core import facts as told
from whaleflux_console.core.bill import rows_of_hour
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.rows import CLASSES, CostClass

HALF_MS = HOUR_MS // 2
OWNERS = told.Facts(
    presences=tuple(told.Presence(f"gpu-{n}", f"gpu-{n}", "sites/s/nodes/n", "H200", 1_000_000, BEGIN_MS, BEGIN_MS + HOUR_MS) for n in range(2)),
    holdings=(told.Holding("gpu-0", "queues/q/jobs/j", "u1", 1, 1_000_000, BEGIN_MS, BEGIN_MS + HALF_MS),),
    attempts=(
        told.Attempt("queues/q/jobs/j", "u1", 1, "q", "user/ada", "", BEGIN_MS, BEGIN_MS, BEGIN_MS, BEGIN_MS + HALF_MS, plan=told.Plan()),
    ),
    prices=tuple(told.PriceSpan(f"gpu-{n}", BEGIN_MS, BEGIN_MS + HOUR_MS, 2_950_001, told.PriceKind.OWNED, "list") for n in range(2)),
)  # fmt: skip
SAMPLES = [
    sample("gpu-0", BEGIN_MS + n * 10_000, tensor_ppm=600_000, sm_active_ppm=900_000, sequence=n) for n in range(180)
]
STEPS = [
    step(0, BEGIN_MS + n * 10_000, first=n * 10 + 1, last=n * 10 + 10, data_us=1_000_000, host_us=0, save_us=0, comm_in_node_us=0, comm_cross_us=0, sequence=n)
    for n in range(180)
]  # fmt: skip


async def close(ledger):
    made = await ledger.inputs(BEGIN_MS)
    await ledger.close(made, rows_of_hour(made.facts, BEGIN_MS))
    return [replace(row, version=0) for row in await ledger.rows(BEGIN_MS)]


async def fill(ledger):
    await ledger.tell(BEGIN_MS, OWNERS)
    await ledger.append(reports(1, 90, samples=SAMPLES[:90], steps=STEPS[:90]))
    await ledger.append(reports(91, 180, samples=SAMPLES[90:], steps=STEPS[90:]))
    return await close(ledger)


def sums(rows):
    return {kind: sum(row.of(kind) for row in rows) for kind in CLASSES}


async def test_rows_are_the_same_when_reports_are_read_again(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path, store) as ledger:
        rows = await fill(ledger)
        assert sums(rows)[CostClass.USEFUL] > 0
    for lost in ("raw", "steps", "minutes", "work", "hours"):
        shutil.rmtree(tmp_path / lost)
    async with leading(tmp_path, store) as ledger:
        while again := ledger.state.position.again:
            first, last = again[0][0], min(again[0][1], again[0][0] + 49)
            await ledger.append_again(
                reports(first, last, samples=SAMPLES[first - 1 : last], steps=STEPS[first - 1 : last])
            )
        assert await close(ledger) == rows


async def test_owners_alone_give_bills_and_what_was_held_exactly_and_the_rest_is_unknown(tmp_path):
    store = MemoryStore()
    async with leading(tmp_path / "lost", store) as ledger:
        before = sums(await fill(ledger))
    async with leading(tmp_path / "new", store, rebuild=True) as ledger:
        await ledger.tell(BEGIN_MS, OWNERS)
        after = sums(await close(ledger))
    assert sum(after.values()) == sum(before.values()) == 2 * 2_950_001
    outside = (CostClass.IDLE, CostClass.FRAGMENTED, CostClass.UNAVAILABLE, CostClass.LOST)
    assert {kind: after[kind] for kind in outside} == {kind: before[kind] for kind in outside}
    assert after[CostClass.UNKNOWN] == sum(before[kind] for kind in CLASSES if kind not in outside)


async def test_late_reports_bring_the_hour_to_what_it_would_have_been(tmp_path):
    async with leading(tmp_path / "in time", MemoryStore()) as ledger:
        rows = await fill(ledger)
    async with leading(tmp_path / "late", MemoryStore()) as ledger:
        await ledger.tell(BEGIN_MS, OWNERS)
        await ledger.append(reports(1, 90, samples=SAMPLES[:90], steps=STEPS[:90]))
        assert await close(ledger) != rows
        await ledger.append(reports(91, 180, samples=SAMPLES[90:], steps=STEPS[90:]))
        assert await close(ledger) == rows
