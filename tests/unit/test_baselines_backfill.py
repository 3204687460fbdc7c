"""The policies that promised starts are compared with follow their own rules on cases that are done by hand, and known results of queueing theory."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines_backfill import ALL, BASELINES, Fifo, Reservations, TraceJob, WorkConserving, run


def starts(policy, nodes, size, *jobs, told=None):
    """`jobs`: (submitted, run time, GPUs, what its user says; by default what is true)."""
    made = [TraceJob(float(j[0]), float(j[1]), j[2], float(j[3] if len(j) > 3 else j[1])) for j in jobs]
    return run(made, nodes, size, policy, told)


class TestByHand:
    # four GPUs: a runs on two until 10, b needs all of them, c and d need two and one
    A, B = (0, 10, 2), (1, 10, 4)

    def test_fifo_lets_nobody_pass(self):
        assert starts(Fifo(), 4, 1, self.A, self.B, (2, 8, 2)).start_s == [0, 10, 20]

    def test_easy_lets_pass_who_is_over_in_time(self):
        found = starts(Reservations(), 4, 1, self.A, self.B, (2, 8, 2))
        assert found.start_s == [0, 10, 2] and found.promised_s == {1: 10}

    def test_easy_keeps_out_who_is_not_and_would_use_what_the_first_needs(self):
        assert starts(Reservations(), 4, 1, self.A, self.B, (2, 9, 2)).start_s == [0, 10, 20]

    def test_easy_lets_pass_who_is_long_and_uses_what_the_first_does_not_need(self):
        long_ = (2, 100, 1)
        assert starts(Reservations(), 4, 1, self.A, (1, 10, 3), long_, long_).start_s == [0, 10, 2, 20], (
            "one of four is left over beside the first, not two"
        )

    def test_without_reservations_the_large_one_starves(self):
        small = [(2 + 4 * n, 9, 2) for n in range(5)]
        found = starts(WorkConserving(), 4, 1, self.A, self.B, *small)
        assert found.start_s[1] == max(s + 9 for s in found.start_s[2:]), "behind all that came later"
        assert starts(Reservations(), 4, 1, self.A, self.B, *small).start_s[1] == 10

    # EASY delays the second that waits (c) for d; conservative backfilling promises c its start too
    ABCD = (0, 10, 3), (1, 10, 3), (2, 10, 4), (3, 25, 1)

    def test_easy_delays_the_second_that_waits(self):
        found = starts(Reservations(), 4, 1, *self.ABCD)
        assert found.start_s == [0, 10, 28, 3], "d uses the one that b leaves, and c waits for it"

    def test_conservative_delays_nobody(self):
        found = starts(Reservations(ALL), 4, 1, *self.ABCD)
        assert found.start_s == [0, 10, 20, 30] and found.promised_s == {1: 10, 2: 20, 3: 30}

    def test_two_reservations_are_as_good_for_two(self):
        assert starts(Reservations(2), 4, 1, *self.ABCD).start_s[2] == 20

    def test_conservative_fills_a_hole_between_reservations(self):
        found = starts(Reservations(ALL), 4, 1, (0, 10, 3), (1, 10, 4), (2, 9, 1), (2, 8, 1))
        assert found.start_s == [0, 10, 20, 2], "eight are over at ten, nine are not"

    def test_who_ends_early_gives_way_early(self):
        found = starts(Reservations(), 4, 1, (0, 10, 2, 50), self.B, (2, 40, 2))
        assert found.promised_s[1] == 50 and found.start_s == [0, 42, 2], "the one that was let pass is in the way"

    def test_who_stays_longer_than_said_breaks_the_promise(self):
        found = starts(Reservations(), 4, 1, (0, 30, 2, 10), self.B, (11, 9, 2), (12, 7, 2))
        assert found.promised_s[1] == 10 and found.start_s[1] == 30
        assert found.start_s[2:] == [11, 20], "its end is expected at 20 then, and at 40 when that is over"

    def test_a_part_of_a_node_goes_where_it_leaves_least_and_a_gang_on_whole_nodes(self):
        found = starts(WorkConserving(), 2, 4, (0, 100, 3), (1, 10, 1), (2, 10, 4), (3, 10, 8))
        assert found.start_s == [0, 1, 2, 100], "the second lies beside the first"
        assert starts(WorkConserving(), 2, 4, (0, 100, 1), (1, 10, 6)).start_s == [0, 1], "a node and a half"
        assert starts(WorkConserving(), 2, 4, (0, 100, 3), (1, 10, 6)).start_s == [0, 100], "one GPU is no half"


class TestKnownResults:
    def test_fifo_of_single_jobs_waits_as_erlang_c_says(self):
        """M/M/c, c = 4, load 0.8: mean wait = C(4, 3.2) / (c mu - lambda); C = 0.5964 (Erlang, 1917)."""
        drawn = random.Random(7)
        at_s, jobs = 0.0, []
        for _ in range(8_000):
            at_s += drawn.expovariate(3.2)
            run_s = drawn.expovariate(1.0)
            jobs.append(TraceJob(at_s, run_s, 1, run_s))
        found = run(jobs, 1, 4, Fifo())
        waits = [start - job.at_s for start, job in zip(found.start_s, jobs, strict=True)]
        assert sum(waits) / len(waits) == pytest.approx(0.5964 / 0.8, rel=0.1)

    def test_fifo_of_gangs_carries_what_brill_and_green_found(self):
        """Two servers, a part p of jobs needs one, others both, for equally long: 2 / (2 - p^2) jobs end in a mean run time (1984)."""
        drawn, p = random.Random(3), 0.5
        jobs = [
            TraceJob(0.0, run_s, 1 if drawn.random() < p else 2, run_s)
            for run_s in (drawn.expovariate(1.0) for _ in range(4_000))
        ]
        found = run(jobs, 1, 2, Fifo())
        mean_s = sum(job.run_s for job in jobs) / len(jobs)
        assert len(jobs) * mean_s / max(found.start_s) == pytest.approx(2 / (2 - p * p), rel=0.03)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 60), st.sampled_from([1, 2, 3, 4, 6, 8]), st.floats(0.2, 4.0)),
        min_size=1,
        max_size=10,
    )
)
def test_promises_hold_while_estimates_do_and_no_gpu_is_given_twice(drawn):
    said = sorted((float(at), float(run_s), gpus, run_s * wrong) for at, run_s, gpus, wrong in drawn)
    for name, policy in BASELINES.items():
        found = run([TraceJob(*one[:3], one[1]) for one in said], 2, 4, policy())
        assert all(found.start_s[number] <= at_s for number, at_s in found.promised_s.items()), name
        jobs = [TraceJob(*one) for one in said]
        found = run(jobs, 2, 4, policy())
        for at_s in found.start_s:
            inside = zip(found.start_s, jobs, strict=True)
            assert sum(j.gpus for s, j in inside if s <= at_s < s + j.run_s) <= 8, name
