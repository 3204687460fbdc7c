"""The checkpointer of one rank with an agent: what it asks, what it proves, and that it never starts over by itself."""

import math
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from tests.support.fake_agent import FakeAgent
from whaleflux.checkpoint_storage import storage_id
from whaleflux.sdk import Checkpointer, RestoreFailed, SaveFailed, agent_keeper
from whaleflux.sdk.resharding import Resharding, resharding, structure
from whaleflux.v1 import checkpoint_pb2

LOST = checkpoint_pb2.CHECKPOINT_STATE_LOST


@pytest.fixture
def agent(tmp_path, monkeypatch):
    with FakeAgent(tmp_path) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(agent_keeper, "PAUSE_S", 0.001)
        yield running


def checkpointer(**more):
    torch.manual_seed(1)
    model = nn.Linear(3, 3)
    return Checkpointer(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **{"every": 2, **more})


def trained(total=4, **more):
    with checkpointer(**more) as saved:
        for _ in saved.steps(lambda step: step, total=total):
            saved.report(1.0)
    return saved


def largest(checkpoint):
    piece = max(checkpoint.pieces, key=lambda piece: piece.size_bytes)
    return f"{checkpoint.location}/{piece.path}"


def flip(path):
    with open(path, "r+b") as file:
        file.seek(100)
        byte = file.read(1)[0]
        file.seek(100)
        file.write(bytes([byte ^ 1]))


def test_saves_and_restores_through_the_agent(agent):
    trained()
    assert [c.step for c in agent.committed()] == [2, 4]
    with checkpointer() as saved:
        assert (saved.step, saved.restored_from) == (4, agent.committed()[-1].name)


def test_the_interval_of_the_job_file_counts(agent):
    agent.every_steps = 3
    trained(total=6, every=None)
    assert [c.step for c in agent.committed()] == [3, 6]


def test_a_damaged_checkpoint_is_refused_with_the_proof(agent):
    trained()
    newest = agent.committed()[-1]
    flip(largest(newest))
    with checkpointer() as saved:
        assert saved.step == 2
    (refused,) = agent.named("get_restore")[-1].refused
    saved_piece = next(piece for piece in newest.pieces if piece.path == refused.read.path)
    assert refused.read.size_bytes == saved_piece.size_bytes
    assert refused.read.checksum != saved_piece.checksum
    assert newest.state == LOST


def test_a_mount_that_is_missing_takes_no_checkpoint_away_and_ends_the_attempt(agent):
    trained()
    agent.folder.rename(agent.folder.with_name("away"))
    with pytest.raises(RestoreFailed, match="Nothing was started over"):
        checkpointer().restore()
    assert [c.step for c in agent.committed()] == [2, 4], "none was marked lost"
    assert not agent.folder.exists(), "nothing was written at its place"
    agent.folder.with_name("away").rename(agent.folder)
    assert checkpointer().restore() == 4


@pytest.mark.parametrize("restored", [False, True])
def test_a_mount_that_goes_away_while_it_trains_gets_no_checkpoints_at_its_place(agent, restored):
    if restored:
        trained(total=2)
    away, errors = agent.folder.with_name("away"), []
    with checkpointer() as saved:
        for step, _ in saved.steps(lambda step: step, total=12):
            if step == 5:
                saved.wait()
                agent.folder.rename(away)
                agent.folder.mkdir()
            if step == 9:
                agent.folder.rmdir()  # empty: nothing was written there
                away.rename(agent.folder)
            errors.append(str(saved.last_error or ""))
    assert any("not mounted any more" in error for error in errors)
    assert [c.step for c in agent.committed()][-2:] == [10, 12]
    assert len({c.storage for c in agent.committed()}) == 1


def test_a_lost_checkpoint_is_read_again_when_nothing_else_is_left(agent):
    trained(total=2)
    only = agent.committed()[0]
    flip(largest(only))
    with pytest.raises(RestoreFailed):
        checkpointer().restore()
    assert only.state == LOST
    with pytest.raises(RestoreFailed):
        checkpointer().restore()
    flip(largest(only))  # it is whole again: what was read was not what is there
    assert checkpointer().restore() == 2
    assert only.state == checkpoint_pb2.CHECKPOINT_STATE_COMMITTED


def test_a_save_waits_for_an_agent_that_restarts_or_has_a_full_disk(agent):
    answers = [("UNAVAILABLE", "", "restarting"), ("DEADLINE_EXCEEDED", "", "the disk is full"), None]
    agent.refuse = lambda request: answers.pop(0) if answers and request.HasField("finish_save") else None
    with checkpointer() as saved:
        saved.save()
    assert len(agent.named("finish_save")) == 3
    assert agent.committed()


def test_a_save_that_is_refused_is_not_repeated_and_does_not_end_the_training(agent):
    agent.refuse = lambda request: (
        ("ABORTED", "EPOCH_FENCED", "epoch 1 is over") if request.HasField("start_save") else None
    )
    with checkpointer() as saved:
        with pytest.raises(SaveFailed, match="epoch 1 is over"):
            saved.save()
        assert len(agent.named("start_save")) == 1
        agent.refuse = lambda _: None
        saved.save()
    assert len(agent.committed()) == 1


def test_patience_ends(agent, monkeypatch):
    monkeypatch.setattr(agent_keeper, "PATIENCE_S", 0.05)
    agent.refuse = lambda request: ("UNAVAILABLE", "", "away") if request.HasField("start_save") else None
    with checkpointer() as saved, pytest.raises(SaveFailed, match="away"):
        saved.save()


def test_a_failed_save_is_told_of_and_its_files_are_gone(agent):
    """The report of the pieces is refused: somebody might have it all the same, so the files stay for the collector."""
    agent.refuse = lambda request: ("INVALID_ARGUMENT", "", "no") if request.HasField("finish_save") else None
    with checkpointer() as saved, pytest.raises(SaveFailed):
        saved.save()
    (told,) = agent.named("fail_save")
    assert agent.checkpoints[told.checkpoint].state == checkpoint_pb2.CHECKPOINT_STATE_ABANDONED
    assert agent.folder.joinpath(told.checkpoint.rpartition("/")[2]).exists()


def test_every_save_has_a_folder_that_was_not_there_before(agent):
    with checkpointer() as saved:
        for _ in range(3):
            saved.save()
    assert len({c.location for c in agent.committed()}) == 3


def test_every_number_arrives_as_a_loss(agent):
    heard = []
    with checkpointer() as saved:
        for loss in (2.5, math.nan, math.inf, None):
            saved.report(loss)
            while len(agent.named("report_progress")) == len(heard):
                threading.Event().wait(0.001)
            heard.append(agent.named("report_progress")[-1])
    assert [repr(h.loss) if h.HasField("loss") else None for h in heard] == ["2.5", "nan", "inf", None]


def test_a_loss_that_cannot_be_read_does_not_end_the_news_of_progress(agent):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    keeper = agent_keeper.AgentKeeper(str(agent.socket), "token")
    for step, loss in enumerate((lost, lambda: 0.5), 1):
        keeper.progress(0, step, loss)
        while len(agent.named("report_progress")) < step:
            threading.Event().wait(0.001)
    keeper.close()
    first, second = agent.named("report_progress")
    assert (first.step, first.HasField("loss"), second.step, second.loss) == (1, False, 2, 0.5)


def test_loaders_that_fork_work_beside_it(agent):
    class Source(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return index

    with checkpointer(every=1) as saved:
        seen = []
        for _, batch in saved.steps(DataLoader(Source(), batch_size=2, num_workers=2), total=6):
            saved.report(1.0)
            seen.extend(batch.tolist())
    assert seen == [*range(8), *range(4)]
    assert saved.last_error is None


def test_a_trainer_has_no_grpc_in_it(agent):
    """It forks its data loaders; gRPC's threads and forks do not go together."""
    code = (
        "import sys, torch; from torch import nn; from whaleflux.sdk import Checkpointer\n"
        "model = nn.Linear(1, 1); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "with Checkpointer(model=model, optimizer=optimizer) as saved:\n"
        "    for _ in saved.steps(lambda step: step, total=2): saved.report(1.0)\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'grpc'], 'gRPC is loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    assert len(agent.committed()) == 1


def test_nothing_is_asked_of_a_folder_that_hangs_before_the_agent_is_asked(agent):
    """The first call decides where the folder is: a program needs no setting for it."""
    shutil.rmtree(agent.folder, ignore_errors=True)
    with checkpointer() as saved:
        saved.save()
    assert agent.calls[0].WhichOneof("call") == "get_restore"
    assert agent.committed()[0].storage


def test_a_training_that_starts_over_as_asked_for_saves_where_it_is(agent):
    trained()
    folder = Path(agent.committed()[-1].location).parent
    folder.rename(folder.with_name("away"))
    saved = trained(if_unreadable="start_over")
    assert saved.last_error is None
    assert storage_id(folder) not in ("", storage_id(folder.with_name("away")))


# who can read what is saved


class Loader:
    """Keeps a position that is its own."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return iter(range(100))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class SharedLoader(Loader):
    def load_world_state(self, states, rank, world_size):
        self.at = max(state["at"] for state in states)


def said_with(loader, **more):
    with checkpointer(**more) as saved:
        for _ in saved.steps(loader, total=3):
            saved.report(1.0)


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (lambda: lambda step: step, {}, "ANY_SPLIT"),
        (lambda: DataLoader(range(10)), {}, "SAME_RANKS"),
        (lambda: DataLoader(range(10)), {"on_world_change": "restart_pass"}, "ANY_SPLIT"),
        (lambda: DataLoader(range(10), sampler=DistributedSampler(range(10), 1, 0)), {}, "ANY_SPLIT"),
    ],
)
def test_a_save_says_whether_other_ranks_can_go_on_in_the_data(agent, make, more, said):
    said_with(make(), **more)
    assert agent.committed()[0].resharding == checkpoint_pb2.Resharding.Value(f"RESHARDING_{said}")


@pytest.mark.parametrize(("kind", "said"), [(Loader, "SAME_RANKS"), (SharedLoader, "ANY_SPLIT")])
def test_a_loader_that_keeps_its_own_position_says_whether_others_can_share_it(agent, kind, said):
    loader = kind()
    said_with(loader, data=loader)
    assert agent.committed()[0].resharding == checkpoint_pb2.Resharding.Value(f"RESHARDING_{said}")


def test_ranks_with_different_modules_are_stages_of_a_pipeline():
    whole, stage = nn.Linear(3, 3).state_dict(), nn.Linear(3, 4).state_dict()
    assert structure(whole) == structure(nn.Linear(3, 3).state_dict())
    assert resharding([structure(whole)] * 4, positions_move=True) is Resharding.ANY_SPLIT
    assert resharding([structure(whole), structure(stage)], positions_move=True) is Resharding.SAME_SPLIT
    assert resharding([structure(whole), structure(stage)], positions_move=False) is Resharding.SAME_RANKS
