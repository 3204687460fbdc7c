"""Uneven batches over gloo: the gradients of the global batch under DDP and FSDP2, ranks that agree, and restores on other numbers of ranks."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.support.forked_ranks import launch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
pytest.importorskip("torch")
PROGRAM = Path(__file__).parents[3] / "benchmarks" / "plan_lab" / "uneven_training.py"
SMALL = {"samples": 148, "global_batch": 24, "steps": 14, "width": 32}  # 6 steps and a rest of 4 in an epoch


def run(world, folder, **told):
    """What each rank noted."""
    folder.mkdir()
    leader = launch(world, PROGRAM, [json.dumps(SMALL | told), str(folder)], folder / "errors.log")
    try:
        leader.join(200)
        assert leader.exitcode == 0, (folder / "errors.log").read_text()[-3000:]
    finally:
        if leader.exitcode is None:
            os.killpg(leader.pid, signal.SIGKILL)
        leader.join()
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The whole global batch on one rank."""
    return run(1, tmp_path_factory.mktemp("alone") / "run")[0]


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"speeds": [5, 3, 2, 2]},
        {"speeds": [5, 3, 2, 2], "workers": 1},
        {"speeds": [5, 3, 2, 2], "micro_batch": 2},
        {"speeds": [5, 3, 2, 2], "wrap": "fsdp"},
        {"speeds": [5, 3, 2, 2], "wrap": "fsdp", "micro_batch": 2},
    ],
    ids=lambda told: " ".join(f"{key}" for key in told) or "even",
)
def test_a_step_of_uneven_batches_is_that_of_the_global_batch(alone, tmp_path, told):
    ranks = run(4, tmp_path / "run", **told)
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-4)
        np.testing.assert_allclose(rank["parameters"], alone["parameters"], rtol=1e-4, atol=1e-6)
    sizes = np.array([rank["samples"] for rank in ranks]).sum(0)
    assert sizes.tolist() == alone["samples"]
    assert not told or ranks[0]["samples"][0] > ranks[3]["samples"][0]


def test_torch_s_own_sampler_has_the_same_steps(alone, tmp_path):
    ranks = run(4, tmp_path / "run", split="even", samples=144, steps=6)
    mine = run(4, tmp_path / "mine", samples=144, steps=6, speeds=[5, 3, 2, 2])
    np.testing.assert_allclose(ranks[0]["losses"], mine[0]["losses"], rtol=1e-4)


def test_ranks_that_are_slower_get_fewer_samples_and_all_agree(tmp_path):
    # Waiting is most of what they do, so that a busy host does not change who is slow.
    told = {"samples": 1920, "global_batch": 48, "width": 128, "steps": 40, "every_steps": 4, "workers": 1}
    ranks = run(3, tmp_path / "run", core_shares=[0.1, 0.1, 0.025], **told)
    assert all(rank["shares"] == ranks[0]["shares"] for rank in ranks)
    first, last = ranks[0]["shares"][0], ranks[0]["shares"][-1]
    assert first == [16, 16, 16]
    assert last[2] <= 10 < min(last[:2])
    for step, shares in enumerate(ranks[0]["shares"]):
        assert [rank["samples"][step] for rank in ranks] == shares


@pytest.mark.parametrize("world", [3, 2])
def test_a_training_goes_on_from_its_checkpoint_on_any_number_of_ranks(alone, tmp_path, world):
    folder = str(tmp_path / "checkpoints")
    run(3, tmp_path / "first", speeds=[5, 3, 2], checkpoints=folder, steps=9)
    rest = run(world, tmp_path / "second", speeds=[2, 3, 2][:world], checkpoints=folder, steps=14)
    np.testing.assert_allclose(rest[0]["losses"], alone["losses"][9:], rtol=1e-4)
    assert np.array([rank["samples"] for rank in rest]).sum(0).tolist() == alone["samples"][9:]
