"""The main job, shortened: a training run survives the loss of its node, and its model is then served."""

import pytest

from tests.e2e.conftest import STEPS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]  # the first test of the folder waits for the run


def test_everything_that_the_demo_claims_was_seen(main_run):
    assert main_run.report["checks"]
    assert {claim for claim, seen in main_run.report["checks"].items() if not seen} == set()
    assert main_run.exit_code == 0


def test_the_lost_node_is_suspect_fenced_and_replaced_in_time(main_run):
    failure = main_run.report["failure"]
    assert 0 <= failure["suspect_s"] <= failure["fenced_s"]
    assert failure["suspect_s"] <= 2
    assert failure["fenced_s"] <= 6
    assert 0 < failure["running_s"] <= 15  # the end of its peers fences the attempt, perhaps before its node
    assert failure["processes_killed"] >= 3  # the agent and at least two ranks


def test_the_gang_goes_where_two_nodes_can_hold_it_without_the_lost_one(main_run):
    before, after = main_run.report["placement"], main_run.report["placement_after"]
    lost = main_run.report["failure"]["node"]
    assert lost in before
    assert lost not in after
    assert len(after) == len(before) == 2


def test_only_steps_since_the_last_committed_checkpoint_are_repeated(main_run):
    work = main_run.report["failure"]
    assert 0 < work["committed_step_at_kill"] <= work["resumed_step"] <= STEPS
    assert work["repeated_steps"] <= work["step_at_kill"] - work["committed_step_at_kill"]


def test_the_end_is_bitwise_that_of_a_run_without_a_failure(main_run):
    failed, unfailed = main_run.report["training"], main_run.report["unfailed"]
    assert failed["digest"] == unfailed["digest"]
    assert failed["loss"] == unfailed["loss"]


def test_no_request_fails_while_a_replica_is_killed(main_run):
    serving = main_run.report["serving"]
    assert serving["requests"] > 0
    assert serving["failed"] == 0
