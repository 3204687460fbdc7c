"""Who was there, who held it, and what of it was of no use: from what owners say, as facts of the hours that it touches."""

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whaleflux_console.core.chronicle import Chronicle, Device, JobFacts, NodePrice
from whaleflux_console.core.facts import HOUR_MS, Attempt, Facts, Holding, Presence, PriceKind, PriceSpan
from whaleflux_console.core.fragmentation import WaitingGang, fragmented
from whaleflux_console.core.price_book import NODE_SAYS
from whaleflux_console.core.spans import Spans

N = "sites/a/nodes/n"
T = 1_000 * HOUR_MS
MINUTE = 60_000
PRICE = NodePrice(2_000_000, PriceKind.OWNED)


def device(name="g0", node=N, available=True, memory=80, gpu_class="H100"):
    return Device(name, name, node, gpu_class, 1_000_000, available, memory)


def attempt(number=1, start=T, end=None, **more):
    told = {"run_ms": start, "first_step_ms": None} | more
    return Attempt("queues/q/jobs/j", "u", number, "queues/q", "user/ann", "", start, end_ms=end, **told)


def holding(number=1, start=T, end=T + HOUR_MS, name="g0"):
    return Holding(name, "queues/q/jobs/j", "u", number, 1_000_000, start, end)


def job(attempts, holdings):
    return JobFacts("queues/q/jobs/j", tuple(attempts), tuple(holdings))


class TestSpans:
    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
    @given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from("abc"), st.sampled_from([None, 1, 2])), max_size=30))
    def test_of_a_key_no_two_values_hold_at_a_time_and_nothing_is_left_out(self, changes):
        spans, now, history = Spans(), 0, {}
        for later, key, value in changes:
            now += later
            spans.set(key, value, now)
            history.setdefault(key, []).append((now, value))
        end = now + 10
        found = spans.touching(0, end, end)
        for instant in range(end):
            for key in "abc":
                there = [span.value for span in found if span.key == key and span.start_ms <= instant < span.end_ms]
                was = [value for at, value in history.get(key, []) if at <= instant]
                assert there == ([was[-1]] if was and was[-1] is not None else [])

    def test_what_is_fresh_is_told_once(self):
        spans = Spans()
        spans.set("a", 1, 10)
        assert [(span.value, span.goes_on) for span in spans.fresh(20)] == [(1, True)]
        assert spans.fresh(30) == ()
        spans.set("a", 2, 40)
        assert sorted((span.value, span.start_ms, span.end_ms) for span in spans.fresh(50)) == [
            (1, 10, 40),
            (2, 40, 50),
        ]


class TestDevices:
    def test_a_node_is_there_since_it_joined_until_it_is_gone(self):
        found = Chronicle()
        found.node(N, [device()], PRICE, T + 5 * MINUTE, T)
        found.node(N, [], None, T + 30 * MINUTE, T)
        told = found.whole_hour(T, T + HOUR_MS)
        assert [(one.start_ms, one.end_ms) for one in told.presences] == [(T, T + 30 * MINUTE)]
        assert [(p.micros_per_hour, p.start_ms, p.end_ms, p.source) for p in told.prices] == [
            (2_000_000, T, T + 30 * MINUTE, NODE_SAYS)
        ]

    def test_what_goes_on_is_told_until_now_and_never_beyond(self):
        found = Chronicle()
        found.node(N, [device()], PRICE, T, T)
        (one,) = found.whole_hour(T, T + 7 * MINUTE).presences
        assert one.end_ms == T + 7 * MINUTE

    def test_out_of_service_and_back_are_three_stretches(self):
        found = Chronicle()
        for minute, available in ((0, True), (10, False), (20, True)):
            found.node(N, [device(available=available)], PRICE, T + minute * MINUTE, T)
        told = found.whole_hour(T, T + HOUR_MS).presences
        assert [((one.start_ms - T) // MINUTE, one.available) for one in told] == [(0, True), (10, False), (20, True)]

    def test_a_listing_that_is_complete_ends_the_others(self):
        found = Chronicle()
        found.node(N, [device()], PRICE, T, T)
        found.nodes_are([], T + MINUTE)
        assert found.devices() == ()

    def test_a_copy_stays_as_it_was_and_what_was_taken_to_be_told_is_told_once(self):
        found = Chronicle()
        found.node(N, [device()], PRICE, T, T)
        taken = found.taken(T + MINUTE)
        found.node(N, [device("g1")], PRICE, T + MINUTE, T + MINUTE)
        assert [one.device for one in taken.whole_hour(T, T + 2 * MINUTE).presences] == ["g0"]
        assert [one.device for one in taken.fresh(T + MINUTE)[T].presences] == ["g0"]
        assert {(one.device, one.goes_on) for one in found.fresh(T + 2 * MINUTE)[T].presences} == {
            ("g0", False),
            ("g1", True),
        }

    def test_after_a_restart_what_was_going_on_goes_on_without_a_gap(self):
        told = Facts(
            presences=(Presence("g0", "g0", N, "H100", 1_000_000, T, T + 10 * MINUTE, goes_on=True),),
            prices=(PriceSpan("g0", T, T + 10 * MINUTE, 2_000_000, PriceKind.OWNED, NODE_SAYS),),
        )
        found = Chronicle()
        found.resume(told)
        found.node(N, [device()], PRICE, T + 50 * MINUTE, T)
        (one,) = found.whole_hour(T, T + HOUR_MS).presences
        assert (one.start_ms, one.end_ms) == (T, T + HOUR_MS)
        assert found.devices()[0].memory_bytes == 80

    def test_after_a_restart_what_had_ended_has_ended(self):
        found = Chronicle()
        found.resume(Facts(presences=(Presence("g0", "g0", N, "H100", 1_000_000, T, T + 10 * MINUTE),)))
        assert found.devices() == ()

    def test_what_is_told_of_an_hour_is_forgotten_when_it_is_over(self):
        found = Chronicle()
        found.node(N, [device()], PRICE, T, T)
        found.node(N, [], None, T + MINUTE, T)
        found.job(job([attempt(end=T + MINUTE)], [holding(end=T + MINUTE)]))
        found.forget(T + HOUR_MS)
        assert found.whole_hour(T, T + 2 * HOUR_MS) == Facts()


class TestJobs:
    def test_what_runs_holds_until_now(self):
        found = Chronicle()
        found.job(job([attempt()], [holding(end=T + 1)]))
        told = found.fresh(T + 5 * MINUTE)[T]
        assert [one.end_ms for one in told.holdings] == [T + 5 * MINUTE]
        assert found.held() == {"g0": 1_000_000}

    def test_of_a_job_whose_record_is_gone_nothing_goes_on(self):
        found = Chronicle()
        found.job(job([attempt()], [holding()]))
        found.job_gone("queues/q/jobs/j", T + MINUTE)
        told = found.whole_hour(T, T + HOUR_MS)
        assert [one.end_ms for one in told.holdings] == [T + MINUTE]
        assert found.held() == {}

    def test_work_that_turns_out_to_be_lost_is_told_to_the_hours_that_it_was_done_in(self):
        found, now = Chronicle(), T + 5 * HOUR_MS
        found.job(job([attempt(last_step=100)], [holding(end=now)]))
        found.fresh(now)
        failed = attempt(last_step=100, end=now, failed=True, last_saved_step=10, last_saved_ms=T + HOUR_MS)
        found.job(job([failed, attempt(2, now, restored_step=10)], [holding(end=now), holding(2, now, now + 1)]))
        told = found.fresh(now + MINUTE)
        assert sorted(told) == [T + hour * HOUR_MS for hour in range(1, 6)]
        assert all(len(facts.attempts) == 2 for facts in told.values())

    def test_an_end_that_is_learned_late_is_told_to_every_hour_since(self):
        found, now = Chronicle(), T + 2 * HOUR_MS + 30 * MINUTE
        found.job(job([attempt()], [holding(end=now)]))
        found.fresh(now)
        found.job(job([attempt(end=T + 5 * MINUTE)], [holding(end=T + 5 * MINUTE)]))
        told = found.fresh(now + MINUTE)
        assert {hour: [one.end_ms for one in facts.holdings] for hour, facts in told.items()} == {
            T + hour * HOUR_MS: [T + 5 * MINUTE] for hour in range(3)
        }

    def test_after_a_restart_nothing_is_told_again_of_what_was_over(self):
        found, now = Chronicle(), T + 5 * HOUR_MS
        found.resume(Facts(presences=(Presence("g0", "g0", N, "H100", 1_000_000, T, now, goes_on=True),)))
        found.job(job([attempt(end=T + MINUTE)], [holding(end=T + MINUTE)]))
        assert found.fresh(now + MINUTE) == {}

    def test_what_an_attempt_served_stays_known_when_its_replica_is_gone_and_after_a_restart(self):
        served = replace(attempt(), model="models/m")
        found = Chronicle()
        found.resume(Facts(attempts=(served,)))
        found.job(job([attempt(end=T + MINUTE)], [holding(end=T + MINUTE)]))
        assert [one.model for one in found.whole_hour(T, T + HOUR_MS).attempts] == ["models/m"]

    def test_what_failed_while_nobody_looked_is_told_to_the_hours_that_it_was_done_in(self):
        found, now = Chronicle(), T + 5 * HOUR_MS
        found.resume(Facts(presences=(Presence("g0", "g0", N, "H100", 1_000_000, T, now - MINUTE, goes_on=True),)))
        failed = attempt(last_step=100, end=now, failed=True, last_saved_step=10, last_saved_ms=T + HOUR_MS)
        found.job(job([failed, attempt(2, now, restored_step=10)], [holding(end=now), holding(2, now, now + 1)]))
        assert sorted(found.fresh(now + MINUTE)) == [T + hour * HOUR_MS for hour in range(1, 6)]


class TestFragmentation:
    FREE = (device("g0"), device("g1"), device("g2", gpu_class="A100"))

    def test_nobody_waits(self):
        assert fragmented(self.FREE, {}, []) == frozenset()

    def test_what_a_gang_would_use_if_it_lay_together(self):
        gang = WaitingGang("j", 2, ("H100",))
        assert fragmented(self.FREE, {}, [gang]) == {"g0", "g1"}
        assert fragmented(self.FREE, {}, [replace(gang, gpus=1)]) == {"g0"}

    def test_a_gang_for_which_too_few_are_free_wherever_they_lie_makes_none_of_them_fragmented(self):
        gang = WaitingGang("j", 8, ("H100",))
        assert fragmented(self.FREE, {}, [gang]) == frozenset()
        assert fragmented(self.FREE, {}, [gang, replace(gang, job="k", gpus=1)]) == {"g0"}

    def test_what_is_held_broken_too_small_or_elsewhere_is_not_wanted(self):
        gang = WaitingGang("j", 1, ("H100",), min_memory_bytes=80, sites=("a",))
        away = device("g3", node="sites/b/nodes/n")
        odd = (device("g0", available=False), device("g1", memory=79), away, device("g4"), device("g5"))
        assert fragmented(odd, {"g4": 250_000}, [gang]) == {"g5"}

    @given(st.lists(st.integers(1, 9), max_size=6), st.integers(0, 12))
    def test_never_more_than_is_free_or_wanted_and_whole_gangs(self, sizes, free):
        devices = [device(f"g{i}") for i in range(free)]
        found = len(fragmented(devices, {}, [WaitingGang(f"j{i}", size) for i, size in enumerate(sizes)]))
        fitting = [sum(sorted(sizes)[:count]) for count in range(len(sizes) + 1)]
        assert found == max(one for one in fitting if one <= free)
