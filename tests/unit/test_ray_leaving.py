"""Idle workers go where others wait for their GPUs: longest idle first, no more than that, and by their own program."""

import json
from types import SimpleNamespace

import pytest

from whaleflux.ray_cluster import worker
from whaleflux_scheduler.core.ray_leaving import SOON_S, Idle, leaving

IDLE = [
    Idle("short/1", 1, "H200", SOON_S - 0.1),
    Idle("a/1", 1, "H200", 10.0),
    Idle("long/1", 2, "H200", 20.0),
    Idle("other/1", 8, "A100-80GB", 30.0),
    Idle("cpu/1", 0, "", 90.0),
]


@pytest.mark.parametrize(
    ("wanted", "who"),
    [
        ({}, []),
        ({"H200": 1}, ["long/1"]),
        ({"H200": 3}, ["long/1", "a/1"]),
        ({"": 1}, ["other/1"]),
        ({"": 9, "H200": 1}, ["other/1", "long/1", "a/1"]),
        ({"B200": 8}, []),
    ],
)
def test_longest_idle_first_of_the_types_that_are_wanted_and_no_more(wanted, who):
    assert leaving(IDLE, wanted) == who


class Gcs:
    """Answers as Ray's key-value store does."""

    def __init__(self, value):
        self.value = value

    def internal_kv_get(self, key, namespace, timeout):
        assert (key, namespace) == (worker.LEAVE_KEY, worker.KV_SPACE)
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.mark.parametrize(
    ("value", "is_wanted"),
    [
        (json.dumps(["me/1", "b/2"]).encode(), True),
        (b'["b/2"]', False),
        (None, False),
        (b"no json", False),
        (b'{"me/1": 1}', False),
        (RuntimeError("the GCS is gone"), False),
    ],
)
def test_a_worker_hears_that_its_gpus_are_wanted(value, is_wanted):
    assert worker.is_named(Gcs(value), "me/1") is is_wanted


@pytest.mark.parametrize(
    ("status", "idle_s", "is_wanted", "leaves"),
    [
        (worker.IDLE_STATUS, 61, False, True),
        (worker.IDLE_STATUS, 59, False, False),
        (worker.IDLE_STATUS, worker.WANTED_S, True, True),
        (worker.IDLE_STATUS, worker.WANTED_S / 2, True, False),
        (1, 61, True, False),
    ],
)
def test_it_leaves_after_its_time_or_soon_where_it_is_wanted_and_never_at_work(status, idle_s, is_wanted, leaves):
    one = worker.Worker(SimpleNamespace(idle_s=60.0))
    state = SimpleNamespace(status=status, idle_duration_ms=1000 * idle_s)
    assert one.may_leave(state, SimpleNamespace(is_wanted=lambda: is_wanted)) is leaves
