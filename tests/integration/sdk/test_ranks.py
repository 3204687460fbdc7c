"""The checkpointer with one to four ranks over gloo: bitwise restores, agreed failures, other world sizes.

Under torchrun once; the others are started as it does, by forks of a process that has imported torch.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.forked_ranks import launch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
pytest.importorskip("torch")
SCRIPT = Path(__file__).parents[2] / "support" / "small_training.py"
KILLS = int(os.environ.get("WHALEFLUX_TEST_KILLS", "0"))  # the full form; `make soak` sets it
WORLDS = [1, 2, 4] if KILLS else [1, 4]
CHANGES = [(2, 1), (2, 4), (4, 2), (1, 2)] if KILLS else [(2, 1), (2, 4)]


def torchrun(world, folder, told):
    """Exit code of a run under the launcher itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    with (folder / "errors.log").open("ab") as errors:
        return subprocess.run(
            [*command, str(SCRIPT), json.dumps(told), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
            stdout=subprocess.DEVNULL,
            stderr=errors,
            timeout=200,
            check=False,
        ).returncode


@contextlib.contextmanager
def forked(world, folder, told):
    """The process group's leader; its ranks end with it."""
    leader = launch(world, SCRIPT, [json.dumps(told), str(folder)], folder / "errors.log")
    try:
        yield leader
    finally:
        if leader.exitcode is None:
            os.killpg(leader.pid, signal.SIGKILL)
        leader.join()


def run(world, folder, *, by_torchrun=False, **told):
    """What each rank noted in this run."""
    folder.mkdir(exist_ok=True)
    before = [len(notes(folder, rank)) for rank in range(world)]
    if by_torchrun:
        code = torchrun(world, folder, told)
    else:
        with forked(world, folder, told) as leader:
            leader.join(200)
            code = leader.exitcode
    assert code == 0, (folder / "errors.log").read_text()[-3000:]
    return [notes(folder, rank)[skip:] for rank, skip in enumerate(before)]


def notes(folder, rank):
    file = folder / f"rank-{rank}.jsonl"
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def samples(run_):
    return [note["samples"] for note in run_ if "samples" in note]


def named(run_, key):
    return [note for note in run_ if key in note]


@pytest.mark.parametrize("world", WORLDS)
def test_an_interrupted_training_ends_with_the_bits_of_one_that_was_not(tmp_path, world):
    """Parameters, optimizer, each rank's BatchNorm statistics, learning rate, generators and data, over several passes."""
    count = 4 * world  # a pass of four steps
    whole = run(world, tmp_path / "a", by_torchrun=world == 1, total=10, samples=count)
    first = run(world, tmp_path / "b", total=10, stop_at=8, samples=count)
    second = run(world, tmp_path / "b", total=10, samples=count)
    for rank in range(world):
        assert second[rank][0]["step"] == 6
        assert second[rank][-1] == whole[rank][-1]
        assert samples(first[rank])[:6] + samples(second[rank]) == samples(whole[rank])
    one_pass = sorted(sample for ranks in whole for batch in samples(ranks)[:4] for sample in batch)
    assert one_pass == sorted(map(float, range(count)))


def test_one_ranks_full_disk_fails_the_save_on_all_and_no_rank_waits(tmp_path):
    began = time.monotonic()
    ranks = run(2, tmp_path, total=9, breaks=[1, 1], disk="full")
    assert time.monotonic() - began < 100
    for rank in ranks:
        said = [note["failed"] for note in named(rank, "failed")]
        assert said
        assert all("rank 1: OSError" in one and "No space left" in one for one in said)
        assert len(samples(rank)) == 9, "training went on"
        assert rank[-1]["error"] == "SaveFailed", "the final state is not saved, and that is said"
    assert list((tmp_path / "checkpoints").glob("s*")) == [], "the room is given back"


def test_ranks_that_do_not_share_a_folder_make_no_checkpoint_and_hear_why(tmp_path):
    """As on two nodes whose default folders are their own: what could not be restored must not count as saved."""
    for rank in run(2, tmp_path, total=4, without_mount=1):
        assert len(samples(rank)) == 4
        assert rank[-1]["error"] == "SaveFailed"
        assert "rank 1: " in rank[-1]["message"]
        assert "need one shared folder" in rank[-1]["message"]
    assert not list(tmp_path.glob("checkpoints/s*"))


def test_one_rank_without_the_mount_ends_the_restore_on_all_and_harms_nothing(tmp_path):
    run(2, tmp_path, total=4)
    before = sorted(tmp_path.glob("checkpoints/s*/*"))
    for rank in run(2, tmp_path, total=8, without_mount=1):
        (refused,) = rank
        assert refused["error"] == "RestoreFailed"
        assert "not mounted" in refused["message"]
        assert "Nothing was started over" in refused["message"]
    assert sorted(tmp_path.glob("checkpoints/s*/*")) == before
    assert [rank[0]["step"] for rank in run(2, tmp_path, total=8)] == [4, 4]


def test_a_rank_that_hangs_in_a_write_does_not_hold_the_others_for_ever(tmp_path):
    ranks = run(2, tmp_path, total=7, breaks=[1, 1], disk="stuck", save_timeout_s=2.0)
    assert len(samples(ranks[0])) == len(samples(ranks[1])) == 7
    assert any("said nothing within 2 s" in note["failed"] for note in named(ranks[0], "failed"))
    assert ranks[0][-1]["error"] in ("SaveFailed", "RankSilent")


# other world sizes


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_samples_are_shared_out_anew_without_repeating_or_leaving_one_out(tmp_path, before, after):
    first = run(before, tmp_path, total=100, samples=24, every=4, stop_at=5)
    used = sorted(sample for rank in first for batch in samples(rank)[:4] for sample in batch)
    left = 24 - len(used)
    second = run(after, tmp_path, total=4 + left // after, samples=24)
    again = sorted(sample for rank in second for batch in samples(rank) for sample in batch)
    assert sorted(used + again) == sorted(map(float, range(24)))
    assert [rank[0]["step"] for rank in second] == [4] * after


def test_positions_that_only_the_loaders_know_are_refused_and_nothing_is_changed(tmp_path):
    run(2, tmp_path, total=100, loader="positioned", every=4, stop_at=5)
    for rank in run(3, tmp_path, total=100, loader="positioned"):
        (refused,) = rank
        assert refused["error"] == "WorldChanged"
        assert "2 ranks wrote this checkpoint and 3 ranks read it" in refused["message"]
        assert "restart_pass" in refused["message"]
        assert "load_world_state" in refused["message"]


def test_what_is_lost_can_be_accepted(tmp_path):
    run(2, tmp_path, total=100, loader="positioned", every=4, stop_at=5)
    ranks = run(3, tmp_path, total=6, loader="positioned", on_world_change="restart_pass")
    assert [rank[0]["step"] for rank in ranks] == [4, 4, 4]
    assert [samples(rank) for rank in ranks] == [[[0.0], [3.0]], [[1.0], [4.0]], [[2.0], [5.0]]]


def test_a_loader_that_shares_its_positions_out_is_asked_to(tmp_path):
    run(2, tmp_path, total=100, loader="shared", every=6, stop_at=7)
    ranks = run(3, tmp_path, total=8, loader="shared")
    assert sorted(sample for rank in ranks for batch in samples(rank) for sample in batch) == [12, 13, 14, 15, 16, 17]


# kills


@pytest.mark.parametrize("seed", range(KILLS or 1))
def test_a_kill_at_any_instant_leaves_the_last_finished_save_bit_for_bit(tmp_path, seed):
    """SIGKILL to all ranks at a random time while they save after every step."""
    chance = random.Random(seed)
    told = {"total": 10_000, "every": 1, "digests": True}
    for _ in range(2):
        with forked(2, tmp_path, told) as leader:
            steps = len(notes(tmp_path, 0))
            while len(notes(tmp_path, 0)) < steps + 8:
                assert leader.exitcode is None, (tmp_path / "errors.log").read_text()[-3000:]
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.3))
            os.killpg(leader.pid, signal.SIGKILL)
        made = {note["after"]: note["digest"] for note in notes(tmp_path, 0) if "after" in note}
        before = max(made)
    first, *_ = run(2, tmp_path, total=0)
    (restored,) = named(first, "restored")
    assert restored["restored"]
    assert restored["digest"] == made[restored["step"]]
    assert before - restored["step"] <= 3, "no more is lost than the saves that were under way"
