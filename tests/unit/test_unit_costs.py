"""What units of work cost: out of closed hours and what ranks told, without what the caller may not see."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.ledger_world import reports, step
from tests.unit.test_bookkeeper import LATE, MINUTE, T, World
from whaleflux.errors import InvalidArgument
from whaleflux.trust.ownership import Access
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.units import Run, unit_costs


@st.composite
def runs(draw):
    bill, tokens = draw(st.integers(0, 10**9)), draw(st.one_of(st.none(), st.integers(0, 10**12)))
    job = draw(st.sampled_from(["a", "b", ""]))
    return Run(draw(st.text(max_size=3)), job, "q", "", bill, HOUR_MS, draw(st.integers(0, HOUR_MS)), tokens)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(st.lists(runs(), max_size=20))
def test_units_sum_to_what_their_runs_cost(some):
    found = unit_costs(some, "job")
    named = [run for run in some if run.job]
    assert sum(one.bill_micros for one in found) == sum(run.bill_micros for run in named)
    assert sum(one.runs for one in found) == len(named)
    assert [one.bill_micros for one in found] == sorted((one.bill_micros for one in found), reverse=True)
    assert unit_costs(some, "model") == []


def test_tokens_are_divided_into_the_bills_of_those_who_tell_them():
    told = Run("u1", "j", "q", "", 3_000_000, HOUR_MS, HOUR_MS // 2, 2_000_000)
    silent = Run("u2", "j", "q", "", 1_000_000, HOUR_MS, 0, None)
    (one,) = unit_costs([told, silent], "job")
    assert (one.tokens, one.micros_per_million_tokens) == (2_000_000, 1_500_000)
    assert (one.micros_per_run, one.micros_per_useful_gpu_hour) == (2_000_000, 8_000_000)
    (one,) = unit_costs([silent], "job")
    assert (one.tokens, one.micros_per_million_tokens, one.micros_per_useful_gpu_hour) == (None, None, None)


async def asked(world, by=pb.COST_GROUPING_JOB, **more):
    request = pb.GetUnitCostsRequest(group_by=by)
    request.start_time.FromMilliseconds(T)
    return list((await world.ask("GetUnitCosts", request, **more)).units)


@pytest.fixture
async def trained(tmp_path):
    """An hour of a run that tells the tokens of 30 minutes, by minute."""
    async with World(tmp_path).running() as world:
        world.fleet()
        world.run(T, T + HOUR_MS)
        steps = [
            step(
                0,
                T + n * MINUTE,
                T + (n + 1) * MINUTE,
                n + 1,
                n + 1,
                sequence=n + 1,
                device="g0",
                uid="u",
                tokens=1_000,
            )
            for n in range(30)
        ]
        await world.ledger.append(reports(1, steps=steps, taken_ms=T + 31 * MINUTE))
        await world.until(LATE)
        await world.tick()
        yield world


async def test_tokens_and_the_bill_of_closed_hours_come_together(trained):
    (one,) = await asked(trained)
    assert (one.key, one.runs, one.bill_micros, one.gpu_hours) == ("queues/q/jobs/j", 1, 2_000_000, 1.0)
    assert (one.tokens, one.micros_per_million_tokens) == (30_000, 66_666_666)
    assert [unit.key for unit in await asked(trained, pb.COST_GROUPING_QUEUE)] == ["queues/q"]
    assert await asked(trained, pb.COST_GROUPING_MODEL) == []


async def test_what_one_may_not_see_is_left_out(trained):
    trained.access["q"] = Access(members=frozenset({"users/bob"}))
    assert await asked(trained, role="user", name="ann") == []
    assert len(await asked(trained, role="user", name="bob")) == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GetUnitCostsRequest(group_by=8), "group_by"),
        (pb.GetUnitCostsRequest(limit=1001), "limit"),
        (pb.GetUnitCostsRequest(start_time={"seconds": 1}), "start_time"),
    ],
)
async def test_what_cannot_be_asked_names_its_field(trained, request_, field):
    with pytest.raises(InvalidArgument) as caught:
        await trained.ask("GetUnitCosts", request_)
    assert [violation.field for violation in caught.value.violations] == [field]
