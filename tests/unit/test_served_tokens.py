"""Tokens that models serve: out of engines' counters into the ledger, each once, and what a million of them costs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_bookkeeper import LATE, MINUTE, T, World
from whaleflux.clock import VirtualClock
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import router_pb2
from whaleflux_console.core.chronicle import JobFacts
from whaleflux_console.core.facts import HOUR_MS, Attempt, Ending, Holding, Outcome
from whaleflux_console.core.served_tokens import TOLD_EVERY_MS, Counters, ServedTokens
from whaleflux_inference_router.core.engine_counters import token_counters
from whaleflux_inference_router.served_tokens import ASKED_EVERY_S
from whaleflux_inference_router.served_tokens import ServedTokens as Asked

VLLM = """# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 1200.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 3.4e+03
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.76e+09
vllm:generation_tokens_total{engine="0",model_name="a } b"} 77.0
"""


@pytest.mark.parametrize(
    ("text", "counters"),
    [
        (VLLM, (4600, 77)),
        ("sglang:prompt_tokens_total 5\nsglang:generation_tokens_total 6 1700000000000\n", (5, 6)),
        ("tgi_request_input_length_sum 5\ntgi_request_generated_tokens_sum 6\n", (5, 6)),
        ("llamacpp:prompt_tokens_total 5\nllamacpp:tokens_predicted_total 6\n", (5, 6)),
        ("generation_tokens_total 6\n", (None, 6)),
        ("prompt_tokens_total NaN\ngeneration_tokens_total -1\n", (None, None)),
        ("my_prompt_tokens_total 6\n", (None, None)),
        ("<html>", (None, None)),
        ("", (None, None)),
    ],
)
def test_what_engines_export_is_read(text, counters):
    assert token_counters(text) == counters


class Engines:
    """Metrics by address, and how often they were asked for."""

    def __init__(self, **metrics):
        self.texts, self.asked = metrics, 0

    async def metrics(self, address):
        self.asked += 1
        return self.texts.get(address, "")


async def test_engines_that_answer_are_asked_now_and_then():
    clock, engines = VirtualClock(), Engines(a="prompt_tokens_total 1\ngeneration_tokens_total 2\n")
    asked = Asked(clock, engines)

    async def told(address, state):
        one = router_pb2.Replica(address=address, state=state)
        await asked.add_to([one])
        return [one.input_tokens, one.output_tokens] if one.HasField("input_tokens") else None

    assert await told("a", router_pb2.REPLICA_STATE_READY) == [1, 2]
    assert await told("b", router_pb2.REPLICA_STATE_DRAINING) is None
    assert await told("a", router_pb2.REPLICA_STATE_STARTING) is None
    engines.texts["a"] = "prompt_tokens_total 3\ngeneration_tokens_total 4\n"
    assert await told("a", router_pb2.REPLICA_STATE_READY) == [1, 2]
    assert engines.asked == 2
    await clock.advance(ASKED_EVERY_S)
    assert await told("a", router_pb2.REPLICA_STATE_DRAINING) == [3, 4]


# how many minutes pass, what is served in them, and what happens then
_LIFE = st.lists(
    st.tuples(
        st.integers(1, 50), st.integers(0, 1000), st.sampled_from(["", "", "read", "read", "told", "crash", "restart"])
    ),
    max_size=40,
)


@given(_LIFE)
def test_each_token_counts_once_whatever_crashes(life):
    """The keeper of the ledger begins anew from what was told; engines count from 0 when they begin anew, having been read."""
    ledger, served, now, true, counter, attempt = {}, ServedTokens(), T, 0, 0, 1

    def read():
        served.read("u", attempt, Counters(counter, 2 * counter), now, now)

    def tell(told):
        for hour, facts in told.items():
            ledger.setdefault(hour, {}).update({one.uid: one for one in facts})

    read()
    for minutes, tokens, event in life:
        now += minutes * MINUTE
        counter, true = counter + tokens, true + tokens
        match event:
            case "read":
                read()
            case "told":
                read()
                tell(served.fresh(now))
            case "crash":
                served = ServedTokens()
                served.resume(one for hour in sorted(ledger)[-2:] for one in ledger[hour].values())
            case "restart":
                read()
                counter, attempt = 0, attempt + 1
                read()
    read()
    tell(served.fresh(now + 2 * TOLD_EVERY_MS))
    for hour in range(T, now + 1, HOUR_MS):
        tell({hour: served.of_hour(hour)} if served.of_hour(hour) else {})
    found = [one for hour in ledger.values() for one in hour.values()]
    # What an engine had counted that ended before it was told is lost with the keeper.
    lost = {"restart", "crash"} <= {event for *_, event in life}
    assert lost or sum(one.input_tokens for one in found) == true
    assert sum(one.output_tokens for one in found) == 2 * sum(one.input_tokens for one in found) <= 2 * true


def test_what_an_engine_counted_long_before_it_was_seen_is_of_no_hour():
    served = ServedTokens()
    served.read("u", 1, Counters(10**9, None), T + MINUTE, T - 3 * HOUR_MS)
    served.read("u", 1, Counters(10**9 + 5, None), T + 2 * MINUTE, T - 3 * HOUR_MS)
    served.read("u", 1, Counters(10**9 + 12, None), T + HOUR_MS, T - 3 * HOUR_MS)
    assert [one.input_tokens for one in served.of_hour(T)] == [None]
    assert [(one.input_tokens, one.output_tokens) for one in served.of_hour(T + HOUR_MS)] == [(7, None)]


def serve(world, uid, device, start=T):
    name = f"queues/q/jobs/{uid}"
    one = Attempt(name, uid, 1, "queues/q", "user/ann", "models/m", start, start, None, None)
    world.chronicle.job(JobFacts(name, (one,), (Holding(device, name, uid, 1, 1_000_000, start, start + 1),)))


def train(world, uid, device, end, ending):
    name = f"queues/q/jobs/{uid}"
    one = Attempt(name, uid, 1, "queues/q", "user/ann", "", T, T, None, end, ending is Ending.FAILED)
    held = (Holding(device, name, uid, 1, 1_000_000, T, end),)
    world.chronicle.job(JobFacts(name, (one,), held, Outcome(uid, ending)))


async def units(world, by, until=None):
    request = pb.GetUnitCostsRequest(group_by=by)
    request.start_time.FromMilliseconds(T)
    if until:
        request.end_time.FromMilliseconds(until)
    return {one.key: one for one in (await world.ask("GetUnitCosts", request)).units}


async def test_a_million_served_tokens_have_a_price_where_engines_tell(tmp_path):
    async with World(tmp_path).running() as world:
        world.fleet(gpus=2, micros=3_000_000)
        serve(world, "m-0", "g0")
        for minute in range(1, 60):
            await world.until(T + minute * MINUTE)
            world.chronicle.served("m-0", 1, Counters(minute * 1000, minute * 500), T + minute * MINUTE, T)
        await world.tick()
        await world.until(LATE)
        await world.tick()
        (one,) = (await units(world, pb.COST_GROUPING_MODEL, T + HOUR_MS)).values()
        assert (one.key, one.bill_micros) == ("models/m", 3_000_000)
        assert (one.input_tokens, one.output_tokens) == (59_000, 29_500)
        assert one.micros_per_million_served_tokens == 3_000_000 * 1_000_000 // 88_500
        assert one.micros_per_million_output_tokens == 3_000_000 * 1_000_000 // 29_500
        assert not one.HasField("tokens")


async def test_of_a_replica_that_tells_nothing_the_bill_is_not_divided(tmp_path):
    async with World(tmp_path).running() as world:
        world.fleet(gpus=2, micros=3_000_000)
        serve(world, "m-0", "g0")
        serve(world, "m-1", "g1")
        await world.until(T + MINUTE)
        world.chronicle.served("m-0", 1, Counters(1_000_000, 1_000_000), T + MINUTE, T)
        await world.until(LATE)
        await world.tick()
        (one,) = (await units(world, pb.COST_GROUPING_MODEL, T + HOUR_MS)).values()
        assert (one.runs, one.bill_micros) == (2, 6_000_000)
        assert one.micros_per_million_served_tokens == 1_500_000
        jobs = await units(world, pb.COST_GROUPING_JOB, T + HOUR_MS)
        assert not jobs["queues/q/jobs/m-1"].HasField("input_tokens")


async def test_what_ended_is_divided_into_what_ended_well(tmp_path):
    async with World(tmp_path).running() as world:
        world.fleet(gpus=4, micros=2_000_000)
        half = T + HOUR_MS // 2
        train(world, "a", "g0", half, Ending.SUCCEEDED)
        train(world, "b", "g1", half, Ending.FAILED)
        train(world, "c", "g2", half, Ending.CANCELLED)
        world.run(T, device="g3")
        await world.until(LATE)
        await world.tick()
        (one,) = (await units(world, pb.COST_GROUPING_QUEUE, T + HOUR_MS)).values()
        assert (one.runs, one.succeeded_runs, one.failed_runs, one.failed_micros) == (4, 1, 1, 1_000_000)
        assert one.micros_per_successful_run == 3_000_000, "without what goes on"
        jobs = await units(world, pb.COST_GROUPING_JOB, T + HOUR_MS)
        assert not jobs["queues/q/jobs/b"].HasField("micros_per_successful_run")
