"""Random histories against an independent ledger; `python -m benchmarks.placement_invariants` runs a million operations of them."""

import pytest

from benchmarks.placement_invariants import run


@pytest.mark.parametrize("seed", range(101, 104))
def test_no_promise_is_broken_in_a_random_history(seed):
    done = run(2000, seed)
    assert done["placed"] > 300
    assert all(done[name] for name in ("roll_back", "partial", "preempt", "hardware", "restart")), "nothing was tested"
