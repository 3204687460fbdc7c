"""The bound of `idle_gpus` is right on cases that are done by hand."""

import pytest

from benchmarks.idle_bound import BoundJob, fewest_gpus

A, B, C = BoundJob(0, 100, 4, "a", 10), BoundJob(50, 100, 2, "b", 10), BoundJob(50, 100, 1, "b", 10)


@pytest.mark.parametrize(
    ("jobs", "excused", "until_s", "gpus"),
    [
        ([A], {}, 1_000, 4),
        ([A, B, C], {}, 1_000, 7),
        ([A, B, C], {"b": 1}, 1_000, 5),
        ([A, B, C], {"a": 1, "b": 2}, 1_000, 0),
        ([A, B, C], {}, 55, 4),
        ([A, BoundJob(95, 50, 4, "b", 10)], {}, 1_000, 4),
        ([A, BoundJob(0, 10, 8, "b", 10)], {}, 1_000, 4),
    ],
    ids=[
        "one",
        "at once",
        "the larger one is excused",
        "all are",
        "they came later",
        "after one another",
        "it may wait for as long as it runs",
    ],
)
def test_what_has_to_run_at_one_instant_is_counted(jobs, excused, until_s, gpus):
    assert fewest_gpus(jobs, excused, until_s) == gpus
