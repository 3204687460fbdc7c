"""What GPUs of a node did: closed hours by minute, open ones as reported; few points keep every peak, and what is not measured is not there."""

import contextlib
from datetime import UTC, datetime

import pytest

from tests.support.ledger_world import BEGIN_MS, MINUTE_MS, leading, reports, sample
from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.rpc import auth
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.store.memory import MemoryStore
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.device_history import DeviceHistory
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.devices import MOST_ROWS
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import LocalFolder
from whaleflux_console.ledger.manifest import Kind

NODE = "sites/s/nodes/n"


def at(ms):
    return datetime.fromtimestamp(ms / 1000, UTC)


@contextlib.asynccontextmanager
async def asking(tmp_path, samples, *, closed=(), now_ms=BEGIN_MS + HOUR_MS):
    """A function that asks of the node, by default of the last hour."""
    store, engine = MemoryStore(), Engine()
    async with leading(tmp_path, store) as ledger:
        await ledger.append(reports(1, samples=samples, taken_ms=now_ms))
        for hour_ms in closed:
            await ledger.close(await ledger.inputs(hour_ms), [])
        with contextlib.closing(engine):
            answers = Answers(LocalFolder(tmp_path), store, engine)
            await answers.follow()

            async def ask(node=NODE, **asked):
                request = pb.GetDeviceHistoryRequest(node=node, **asked)
                request.start_time.FromMilliseconds(asked_from)
                request.end_time.FromMilliseconds(now_ms)
                with auth.acting_as(Principal(Identity("viewer", "vic"))):
                    return await DeviceHistory(answers, VirtualClock()).of_node(request)

            asked_from = now_ms - HOUR_MS
            ask.ledger, ask.answers = ledger, answers
            yield ask


def tens(count, device="gpu-0", start_ms=BEGIN_MS, **figures):
    """Samples of ten seconds, one after the other; each figure is a function of its number."""
    return [
        sample(device, start_ms + n * 10_000, sequence=n + 1, **{name: of(n) for name, of in figures.items()})
        for n in range(count)
    ]


async def test_a_point_is_the_mean_by_time_and_keeps_its_peak(tmp_path):
    samples = tens(12, tensor_ppm=lambda n: 900_000 if n == 3 else 300_000, power_mw=lambda n: 500_000 + n)
    async with asking(tmp_path, samples) as ask:
        (point,) = (await ask(points=1)).points
    assert (point.device, point.source) == ("gpu-0", "gpm")
    assert (point.tensor_ppm.mean, point.tensor_ppm.min, point.tensor_ppm.max) == (350_000, 300_000, 900_000)
    assert (point.power_mw.min, point.power_mw.max) == (500_000, 500_011)
    assert not point.HasField("sm_active_ppm"), "nobody measured it"
    assert point.end_time.ToMilliseconds() - point.start_time.ToMilliseconds() == 120_000


@pytest.mark.parametrize("closed", [(), (BEGIN_MS,)])
async def test_an_open_hour_and_a_closed_one_tell_the_same(tmp_path, closed):
    samples = tens(60, sm_active_ppm=lambda n: 1000 * (n // 6)) + tens(60, "gpu-1", sm_active_ppm=lambda n: 5)
    async with asking(tmp_path, samples, closed=closed) as ask:
        assert bool(ask.ledger.state.of(Kind.MINUTES, BEGIN_MS)) == bool(closed)
        answer, one = await ask(points=60), await ask(points=60, device="gpu-1")
    assert [p.sm_active_ppm.mean for p in answer.points if p.device == "gpu-0"] == [1000 * n for n in range(10)]
    assert {p.device for p in one.points} == {"gpu-1"}
    assert answer.step.ToMilliseconds() == MINUTE_MS


async def test_what_was_not_reported_is_a_gap_and_other_nodes_are_theirs(tmp_path):
    samples = [
        *tens(6, busy_ppm=lambda n: 1),
        *tens(6, start_ms=BEGIN_MS + 30 * MINUTE_MS, busy_ppm=lambda n: 2),
        sample("gpu-9", node="sites/s/nodes/other", busy_ppm=3),
    ]
    async with asking(tmp_path, samples) as ask:
        found = (await ask(points=60)).points
        assert (await ask(node="sites/s/nodes/none")).points == []
    starts = [(p.start_time.ToMilliseconds() - BEGIN_MS) // MINUTE_MS for p in found]
    assert (starts, [p.busy_ppm.mean for p in found]) == ([0, 30], [1, 2])


async def test_of_many_devices_there_are_fewer_points_each(tmp_path):
    samples = [
        sample(f"gpu-{device}", BEGIN_MS + n * 30_000, BEGIN_MS + (n + 1) * 30_000, busy_ppm=1)
        for device in range(100)
        for n in range(120)
    ]
    async with asking(tmp_path, samples) as ask:
        answer = await ask(points=1000)
    assert MOST_ROWS // 2 < len(answer.points) <= MOST_ROWS + 100
    assert len({point.device for point in answer.points}) == 100


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("node", {"node": "n"}),
        ("points", {"points": 1001}),
        ("points", {"points": -1}),
        ("device", {"device": "x" * 101}),
    ],
)
async def test_what_cannot_be_asked_is_refused_with_the_field(tmp_path, field, asked):
    async with asking(tmp_path, tens(1)) as ask:
        with pytest.raises(InvalidArgument) as refused:
            await ask(**asked)
    assert refused.value.violations[0].field == field


@pytest.mark.parametrize("hours", [-1, 0, 169])
async def test_a_window_is_at_most_a_week(tmp_path, hours):
    request = pb.GetDeviceHistoryRequest(node=NODE, start_time=at(BEGIN_MS), end_time=at(BEGIN_MS + hours * HOUR_MS))
    with contextlib.closing(Engine()) as engine:
        history = DeviceHistory(Answers(LocalFolder(tmp_path), MemoryStore(), engine), VirtualClock())
        with pytest.raises(InvalidArgument, match="168 h"):
            await history.of_node(request)


async def test_before_the_ledger_was_read_nobody_is_told_that_there_is_nothing(tmp_path):
    with contextlib.closing(Engine()) as engine:
        history = DeviceHistory(Answers(LocalFolder(tmp_path), MemoryStore(), engine), VirtualClock())
        with pytest.raises(Unavailable):
            await history.of_node(pb.GetDeviceHistoryRequest(node=NODE))
