"""What a job's file says of its split, as far as that explains where time goes."""

import json

import pytest

from whaleflux_console.core.declared_plan import plan_of
from whaleflux_console.core.facts import Plan


def mesh(**more):
    return json.dumps({"mesh": {"pp": 4, "tp": 2}, "micro_batches": 16, "virtual_stages": 2} | more)


def test_a_job_that_says_nothing_of_stages_has_none():
    assert plan_of(0, "") == Plan()


def test_a_planned_job_says_all():
    assert plan_of(4, mesh(recompute="full", recomputed=1.0)) == Plan(4, 2, 16, 250_000)
    assert plan_of(0, mesh(recompute="full", recomputed=0.5)) == Plan(4, 2, 16, 142_857)
    assert plan_of(0, mesh(recompute="none", recomputed=1.0)) == Plan(4, 2, 16, 0)


def test_stages_without_micro_batches_are_not_known():
    assert plan_of(4, "") is None


@pytest.mark.parametrize(
    "text",
    ["mesh.json", "[1]", "{", '{"mesh": [4]}', "[" * 60_000, "x" * 200_000, mesh(micro_batches="16"), mesh(micro_batches=True), mesh(micro_batches=-1), mesh(micro_batches=10**9)],
)  # fmt: skip
def test_somebody_elses_variable_says_nothing(text):
    assert plan_of(2, text) is None


@pytest.mark.parametrize("share", [True, "1", -1, 2, None])
def test_a_share_that_cannot_be_says_nothing(share):
    assert plan_of(0, mesh(recompute="full", recomputed=share)).recompute_share_ppm == 0
