"""When attempts started, and since when they worked in vain."""

from dataclasses import replace

from whaleflux_console.core.facts import Attempt, Steps
from whaleflux_console.core.lost_work import Phases, newest, phases


def attempt(number=1, *, at=0, end=None, failed=False, **more):
    told = {"run_ms": at + 10, "first_step_ms": at + 100} | more
    return Attempt(
        "queues/q/jobs/j", "u", number, "queues/q", "r/x", told.pop("model", ""), at, end_ms=end, failed=failed, **told
    )


def report(number, first, last, start, end, rank=0):
    return Steps("u", number, rank, f"GPU-{rank}", start, end, first, last)


def of(*attempts, steps=()):
    """Phases by attempt number."""
    by_attempt = {("u", one.attempt): [s for s in steps if s.attempt == one.attempt] for one in attempts}
    return {key[1]: found for key, found in phases({("u", one.attempt): one for one in attempts}, by_attempt).items()}


def test_what_an_attempt_served_is_known_once_one_record_says_it():
    told = [attempt(model="models/m"), attempt(end=900, failed=True)]
    assert {newest(order)["u", 1].model for order in (told, told[::-1])} == {"models/m"}


class TestStart:
    def test_until_the_first_step_or_its_report_or_the_program_without_steps(self):
        assert of(attempt())[1] == Phases(100)
        assert of(attempt(), steps=[report(1, 1, 10, 80, 300)])[1] == Phases(80)
        assert of(attempt(first_step_ms=None))[1] == Phases(10)
        assert of(attempt(first_step_ms=None, run_ms=None))[1] == Phases(None)

    def test_a_later_report_says_nothing_of_the_start(self):
        assert of(attempt(first_step_ms=None), steps=[report(1, 41, 50, 8_000, 9_000)])[1] == Phases(10)

    def test_behind_a_failure_it_is_lost(self):
        found = of(attempt(end=1_000, failed=True, last_step=9), attempt(2, at=2_000))
        assert found[2].start_is_lost
        assert not of(attempt(end=1_000), attempt(2, at=2_000))[2].start_is_lost
        assert not of(attempt(2, at=2_000))[2].start_is_lost


class TestLostWork:
    FAILED = attempt(end=5_000, failed=True, last_step=30, last_saved_step=20, last_saved_ms=2_500)
    STEPS = (report(1, 1, 10, 100, 1_100), report(1, 11, 20, 1_100, 2_100), report(1, 21, 30, 2_100, 3_100))

    def lost(self, *later, steps=STEPS, failed=FAILED):
        found = of(failed, *later, steps=steps)[failed.attempt]
        return found.lost_from_ms, found.lost_is_modelled

    def test_since_the_step_that_the_next_attempt_begins_behind(self):
        assert self.lost(attempt(2, at=6_000, restored_step=20)) == (2_100, False)
        assert self.lost(attempt(2, at=6_000, restored_step=25)) == (2_600, False)

    def test_the_slowest_rank_has_done_a_step_last(self):
        late = report(1, 11, 20, 1_100, 2_400, rank=1)
        assert self.lost(attempt(2, at=6_000, restored_step=20), steps=(*self.STEPS, late)) == (2_400, False)

    def test_before_the_next_attempt_names_one_since_the_last_checkpoint(self):
        assert self.lost() == (2_100, False)

    def test_of_an_older_checkpoint_that_is_restored_more_is_lost(self):
        assert self.lost(attempt(2, at=6_000, restored_step=20), attempt(3, at=9_000, restored_step=10)) == (
            1_100,
            False,
        )

    def test_from_the_beginning_all_of_it(self):
        assert self.lost(attempt(2, at=6_000)) == (0, False)

    def test_an_attempt_that_begins_where_an_earlier_one_did_was_all_in_vain(self):
        between = attempt(2, at=6_000, end=8_000, failed=True, restored_step=20, last_step=24)
        assert of(self.FAILED, between, attempt(3, at=9_000, restored_step=20))[2].lost_from_ms == 6_000

    def test_without_step_times_since_the_commit_of_the_checkpoint(self):
        assert self.lost(steps=()) == (2_500, True)

    def test_reports_around_it_narrow_that(self):
        assert self.lost(steps=self.STEPS[2:]) == (2_100, True)
        assert self.lost(steps=self.STEPS[:1], failed=replace(self.FAILED, last_saved_ms=None)) == (1_100, True)

    def test_a_program_that_told_of_no_step_lost_all_as_far_as_is_known(self):
        silent = attempt(end=5_000, failed=True, first_step_ms=None)
        assert self.lost(failed=silent, steps=()) == (0, True)
        assert self.lost(attempt(2, at=6_000), failed=silent, steps=()) == (0, True)

    def test_success_and_a_save_that_was_asked_for_lose_nothing(self):
        ended = replace(self.FAILED, failed=False)
        assert self.lost(failed=ended) == (None, False)
        assert self.lost(attempt(2, at=6_000, restored_step=30), failed=ended) == (None, False)
        assert self.lost(attempt(2, at=6_000, restored_step=20), failed=ended) == (2_100, False)

    def test_what_a_model_served_is_served(self):
        assert self.lost(attempt(2, at=6_000), failed=replace(self.FAILED, model="models/m")) == (None, False)


class TestRecordsOfOneAttempt:
    def test_that_which_knows_most_counts_in_any_order(self):
        running, ended = attempt(last_step=90), attempt(end=5_000, last_step=80)
        assert newest([running, ended]) == newest([ended, running]) == {("u", 1): ended}
