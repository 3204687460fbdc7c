"""The checkpointer of one rank over a plain folder: what comes back, what is told, what is never overwritten."""

import collections
import errno
import itertools
import json
import logging
import os
import random
import shutil
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from whaleflux.checkpoint_storage import found_storage, unshared
from whaleflux.sdk import (
    Checkpointer,
    CheckpointError,
    RestoreFailed,
    SaveFailed,
    WorldChanged,
    files,
    stabilise_buckets,
)
from whaleflux.sdk.folder_keeper import FolderKeeper
from whaleflux.sdk.passes import moved_to_world

Pair = collections.namedtuple("Pair", ["first", "second"])


class Training:
    """A small model with everything that has a state; `run` trains to `total`."""

    def __init__(self, folder: Path, *, loader=None, data=None, every=2, **more):
        torch.manual_seed(3)
        random.seed(4)
        np.random.seed(5)  # noqa: NPY002
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.loader, self.seen = batch_at if loader is None else loader, []
        self.saved = Checkpointer(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            data=data,
            every=every,
            location=folder,
            **more,
        )

    def run(self, total, stop_at=None):
        with self.saved as saved:
            for step, batch in saved.steps(self.loader, total=total):
                self.seen.append(batch[0].flatten().tolist() if isinstance(batch, list) else batch)
                self.learn(batch)
                saved.report(1.0)
                if step + 1 == stop_at:
                    break
        return self

    def learn(self, batch):
        rows = batch[0] if isinstance(batch, list) else batch_at(0)
        noise = random.random() + np.random.rand()  # noqa: NPY002
        loss = self.model(rows.float()).square().mean() * noise
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()

    def state(self):
        """Everything that decides how the training goes on, comparable by ==."""
        return {
            "model": {name: value.tolist() for name, value in self.model.state_dict().items()},
            "digest": self.saved.digest(),
            "lr": self.scheduler.get_last_lr(),
            "scale": self.scaler.state_dict(),
            "torch": torch.rand(2).tolist(),
            "python": random.random(),
            "numpy": np.random.rand(),  # noqa: NPY002
        }


def batch_at(step):
    return torch.arange(12.0).reshape(3, 4) + step


def loader_of(count, batch=2, **more):
    return DataLoader(TensorDataset(torch.arange(float(count)).reshape(-1, 1).expand(-1, 4)), batch_size=batch, **more)


def folders(root):
    return sorted(path for path in root.iterdir() if path.is_dir())


# what comes back


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path):
    """Parameters, optimizer, BatchNorm, dropout, learning rate, gradient scale and all generators."""
    whole = Training(tmp_path / "a").run(9).state()
    Training(tmp_path / "b").run(9, stop_at=5)
    resumed = Training(tmp_path / "b").run(9)
    assert resumed.saved.restored_from
    assert resumed.state() == whole


def test_nothing_of_the_saved_state_aliases_the_training(tmp_path):
    """What is being written does not change when the training goes on at once."""
    training = Training(tmp_path)
    with training.saved as saved:
        training.learn(0)
        before = saved.digest()
        saved.save_async()
        for _ in range(5):
            training.learn(0)
        saved.wait()
    restored = Training(tmp_path)
    restored.saved.restore()
    assert restored.saved.digest() == before


class Held(nn.Linear):
    """A layer with more in its state than tensors; a copy of that takes a while to be given back."""

    given_back: ClassVar[list[str]] = []

    def get_extra_state(self):
        return Extra()

    def set_extra_state(self, state):
        pass


class Extra:
    def __deepcopy__(self, memo):
        return SlowlyFreed()


class SlowlyFreed:
    def __del__(self):
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.2)
        Held.given_back.append(threading.current_thread().name)


def test_who_has_left_the_context_has_no_thread_of_it_any_more(tmp_path):
    """One that still frees tensors while the interpreter ends takes the process down with it."""
    Held.given_back.clear()
    model = Held(2, 2)
    with Checkpointer(model=model, optimizer=torch.optim.SGD(model.parameters()), location=tmp_path) as saved:
        saved.save_async()
    assert "whaleflux-save" in Held.given_back
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("whaleflux")]
    assert saved.last_error is None


class Odd:
    """A part with values that are easily lost on the way."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@pytest.mark.parametrize(
    "value",
    [
        Pair(1, [2, (3,)]),
        (1, (2, 3)),
        {"nested": [{"deep": Pair(None, b"x")}]},
        {1, 2},
        collections.OrderedDict(b=1, a=2),
        "text",
        None,
        [],
    ],
)
def test_values_of_other_parts_come_back_as_they_were(tmp_path, value):
    with Training(tmp_path, others={"odd": Odd(value)}).saved as saved:
        saved.save()
    odd = Odd("something else")
    Training(tmp_path, others={"odd": odd}).saved.restore()
    assert odd.value == value
    assert type(odd.value) is type(value)


def test_a_named_tuple_in_the_optimizer_does_not_stop_a_save(tmp_path):
    training = Training(tmp_path)
    training.learn(0)
    training.optimizer.state[next(iter(training.model.parameters()))]["pair"] = Pair(torch.ones(1), 2)
    with training.saved as saved:
        saved.save()
        assert saved.last_error is None


def test_throw_away_passes_leave_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    batch = torch.randn(6, 4)
    model(batch).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    generators = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002

    def loss():
        return model(batch).sum() * random.random() * np.random.rand()  # noqa: NPY002

    stabilise_buckets(model, loss)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (random.getstate(), repr(np.random.get_state()))  # noqa: NPY002


# loaders


@pytest.mark.parametrize(("interrupted_at", "workers"), [(1, 0), (4, 0), (5, 0), (8, 0), (6, 2)])
def test_a_shuffled_loader_goes_on_behind_the_last_batch_over_several_passes(tmp_path, interrupted_at, workers):
    whole = Training(tmp_path / "a", loader=loader_of(8, shuffle=True, num_workers=workers), every=1).run(9)
    expected = whole.state()
    first = Training(tmp_path / "b", loader=loader_of(8, shuffle=True, num_workers=workers), every=1)
    first.run(9, stop_at=interrupted_at)
    second = Training(tmp_path / "b", loader=loader_of(8, shuffle=True, num_workers=workers), every=1)
    second.run(9)
    kept = second.saved.step - len(second.seen)
    assert first.seen[:kept] + second.seen == whole.seen
    assert second.state() == expected
    passes = [sorted(itertools.chain(*whole.seen[start : start + 4])) for start in (0, 4)]
    assert passes[0] == passes[1], "each pass sees each sample once"


def test_a_list_is_read_again_pass_after_pass(tmp_path):
    assert Training(tmp_path, loader=["a", "b", "c"]).run(8).seen == ["a", "b", "c", "a", "b", "c", "a", "b"]


def test_the_sampler_is_told_which_pass_begins(tmp_path):
    loader = loader_of(4)
    told = []
    loader.sampler.set_epoch = told.append
    Training(tmp_path, loader=loader, every=1).run(5, stop_at=4)
    assert told == [0, 1]
    told.clear()
    Training(tmp_path, loader=loader, every=1).run(5)
    assert told == [1, 2]


class Positioned:
    """A loader that keeps its own position, and stays at its end."""

    def __init__(self, count):
        self.position, self.count = 0, count

    def __iter__(self):
        while self.position < self.count:
            self.position += 1
            yield self.position - 1

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_loader_that_keeps_its_position_is_put_back_where_it_was(tmp_path):
    loader = Positioned(5)
    assert Training(tmp_path, loader=loader, data=loader).run(12, stop_at=5).seen == [0, 1, 2, 3, 4]
    loader = Positioned(5)
    assert Training(tmp_path, loader=loader, data=loader).run(12).seen == [4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("loader", "word"),
    [
        ([], r"the loader \(list\) gives no batch at all"),
        (iter([1, 2]), "read only once"),
        (Positioned(0), "Positioned"),
    ],
)
def test_a_loader_without_batches_is_an_error_that_names_it(tmp_path, loader, word):
    with pytest.raises(CheckpointError, match=word):
        Training(tmp_path, loader=loader).run(4)


def test_a_finished_training_does_nothing_when_it_is_started_again(tmp_path):
    Training(tmp_path).run(4)
    before = folders(tmp_path)
    assert Training(tmp_path).run(4).seen == []
    assert folders(tmp_path) == before


def dealt_out(ranks):
    return loader_of(24, batch=1, sampler=torch.utils.data.DistributedSampler(range(24), ranks, 0))


@pytest.mark.parametrize(
    ("batches", "before", "after", "share"), [(4, 2, 4, 2), (4, 4, 2, 8), (3, 2, 1, 6), (5, 2, 3, 3), (0, 2, 5, 0)]
)
def test_what_all_ranks_have_used_is_divided_among_the_new_ones(batches, before, after, share, caplog):
    start = {"pass": 3, "batches": batches, "generators": None}
    assert moved_to_world(start, dealt_out(after), before, after) == {**start, "batches": share}
    assert ("will be seen again" in caplog.text) == bool(batches * before % after)


def test_a_loader_that_does_not_say_how_it_shares_out_is_refused_only_in_the_middle_of_a_pass():
    start = {"pass": 3, "batches": 0, "generators": None}
    assert moved_to_world(start, [1, 2], 2, 4) == start
    assert moved_to_world({**start, "batches": 5}, [1, 2], 2, 2)["batches"] == 5
    with pytest.raises(WorldChanged, match=r"2 ranks wrote this checkpoint .* 4 ranks read it"):
        moved_to_world({**start, "batches": 5}, [1, 2], 2, 4)


@pytest.mark.parametrize(
    ("ranks", "batch", "share"), [(2, 4, 6), (4, 2, 6), (3, 4, 4), (8, 3, 2)]
)  # 6 batches of 4 samples on 2 data-parallel ranks are 48
def test_a_new_split_goes_on_behind_the_samples_that_were_used(ranks, batch, share):
    """Ranks that share a model draw the same batch, and batches may be larger now: samples count, not ranks."""
    start = {"pass": 3, "batches": 6, "generators": None, "at_once": 8}
    loader = loader_of(96, batch=batch, sampler=torch.utils.data.DistributedSampler(range(96), ranks, 0))
    assert moved_to_world(start, loader, 4, 4) == {**start, "batches": share}


# what is never overwritten, and what is never mistaken


def test_a_second_save_at_one_step_has_a_folder_of_its_own(tmp_path):
    training = Training(tmp_path)
    with training.saved as saved:
        saved.save()
        (first,) = folders(tmp_path)
        bytes_before = {file.name: file.read_bytes() for file in first.iterdir()}
        training.learn(0)
        saved.save()
        newest = saved.digest()
    assert {file.name: file.read_bytes() for file in first.iterdir()} == bytes_before
    assert len(folders(tmp_path)) == 2
    restored = Training(tmp_path)
    restored.saved.restore()
    assert restored.saved.digest() == newest


def damaged(root, change):
    """Changes the largest file of the newest checkpoint."""
    newest = folders(root)[-1]
    victim = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    change(victim)
    return newest


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def tear(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("change", [flip, tear], ids=["flipped", "torn"])
def test_a_damaged_newest_one_falls_back_to_the_one_before_with_a_word(tmp_path, change, caplog):
    Training(tmp_path).run(4)
    damaged(tmp_path, change)
    again = Training(tmp_path)
    assert again.saved.restore() == 2
    assert "is corrupt" in caplog.text


def test_a_save_that_was_never_finished_is_left_out_with_a_word(tmp_path, caplog):
    Training(tmp_path).run(4)
    (folders(tmp_path)[-1] / "pieces-0.json").unlink()
    assert Training(tmp_path).saved.restore() == 2
    assert "never finished" in caplog.text


def test_when_no_checkpoint_can_be_read_the_training_does_not_start_over(tmp_path):
    Training(tmp_path).run(4)
    for folder in folders(tmp_path):
        for file in folder.glob("*.distcp"):
            file.unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RestoreFailed, match="Nothing was started over"):
        Training(tmp_path).saved.restore()
    assert sorted(tmp_path.rglob("*")) == before


def test_starting_over_can_be_asked_for_and_is_told(tmp_path, caplog):
    Training(tmp_path).run(4)
    for folder in folders(tmp_path):
        flip(max(folder.glob("*.distcp")))
    assert Training(tmp_path, if_unreadable="start_over").saved.restore() == 0
    assert "starts over at step 0" in caplog.text


# full disks and other failures


class FullDisk:
    """Refuses to write while `full`, at the border to the system."""

    def __init__(self, monkeypatch):
        self.full = False
        real = os.fsync

        def fsync(descriptor):
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_does_not_end_the_training_and_the_next_save_is_made(tmp_path, monkeypatch, caplog):
    disk = FullDisk(monkeypatch)
    training = Training(tmp_path)
    errors = []
    with training.saved as saved:
        for step, batch in saved.steps(training.loader, total=10):
            training.learn(batch)
            disk.full = 3 <= step < 7
            errors.append(str(saved.last_error or ""))
    assert any("No space left" in error for error in errors)
    assert saved.last_error is None
    assert "training goes on" in caplog.text
    restored = Training(tmp_path)
    assert restored.saved.restore() == 10


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    with Training(tmp_path).saved as saved:
        saved.save()
        before = folders(tmp_path)
        disk.full = True
        with pytest.raises(SaveFailed, match="No space left"):
            saved.save()
        disk.full = False
        assert folders(tmp_path) == before
        assert not list(tmp_path.rglob("*.part"))
        saved.save()


def test_a_final_state_that_was_not_saved_is_an_error_after_the_program_has_done_its_own(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    monkeypatch.setattr("whaleflux.sdk.checkpointer.LAST_SAVE_PAUSE_S", 0.0)
    training = Training(tmp_path, every=100)
    reached = []
    with pytest.raises(SaveFailed, match="No space left"), training.saved as saved:
        for _ in saved.steps(training.loader, total=3):
            disk.full = True
        reached.append("the code behind the loop")
    assert reached


def test_a_state_that_cannot_be_copied_fails_the_save_and_not_the_training(tmp_path):
    odd = Odd(1)
    odd.state_dict = lambda: 1 / 0
    training = Training(tmp_path, others={"odd": odd})
    with training.saved as saved:
        for _, batch in saved.steps(training.loader, total=6):
            training.learn(batch)
            if saved.step == 4:
                said = str(saved.last_error)
                odd.state_dict = dict
    assert "division by zero" in said
    assert Training(tmp_path).saved.restore() == 6


def test_old_checkpoints_are_deleted_and_the_newest_are_kept(tmp_path):
    Training(tmp_path, every=1).run(10)
    assert [int(folder.name[1:13]) for folder in folders(tmp_path)] in ([8, 9, 10], [7, 8, 9, 10])


# durability


def test_files_and_the_folders_that_name_them_are_durable_before_a_checkpoint_counts(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    root = tmp_path / "not" / "there" / "yet"
    with Training(root).saved as saved:
        saved.save()
    (folder,) = folders(root)
    commit = next(i for i, path in enumerate(synced) if path.name.startswith(".pieces-0.json"))
    before = synced[:commit]
    assert {folder / ".metadata", *folder.glob("*.distcp")} <= set(before)
    last_written = max(before.index(path) for path in before if path.parent == folder)
    assert folder in before[last_written:], "the names in the checkpoint's folder"
    for named in (root, root.parent, root.parent.parent, tmp_path):
        assert named in before, f"the names in {named}"
    assert folder in synced[commit:], "the name of the list that makes it a checkpoint"


def test_what_could_not_be_restored_crowds_out_nothing_that_is_saved_afterwards(tmp_path):
    Training(tmp_path).run(8)
    for folder in folders(tmp_path)[1:]:
        for piece in folder.glob("*.distcp"):
            piece.write_bytes(b"damaged")
    keeper = FolderKeeper(tmp_path, 1)
    training = Training(tmp_path, every=1, keeper=keeper)
    training.run(8, stop_at=4)
    keeper.start(4, 999, "replicated", b"")  # a save that is killed at its beginning
    assert Training(tmp_path).saved.restore() == 3


# a mount that is missing


def test_a_vanished_mount_is_not_damage_and_what_is_on_it_comes_back(tmp_path):
    """The path is there and empty, as below a mount point; nothing is concluded from what is missing."""
    root, away = tmp_path / "mnt", tmp_path / "away"
    Training(root).run(4)
    keeper = FolderKeeper(root, 1)
    newest = keeper.newest()
    root.rename(away)
    root.mkdir()

    class StillKnown(FolderKeeper):
        """A service knows the checkpoint, the node does not see it."""

        def newest(self, refused=()):
            if refused:
                self.refused = refused
                raise RestoreFailed(refused[0].fault.message)
            return newest

    keeper = StillKnown(root, 1)
    with pytest.raises(RestoreFailed, match="not mounted"):
        Training(root, keeper=keeper).saved.restore()
    assert keeper.refused[0].fault.kind is files.FaultKind.UNREACHABLE
    assert keeper.refused[0].fault.read is None
    shutil.rmtree(root)
    away.rename(root)
    assert Training(root).saved.restore() == 4


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN])
def test_what_cannot_be_read_is_unreachable_whatever_the_reason(tmp_path, monkeypatch, number):
    (tmp_path / "piece").write_bytes(b"abc")
    saved = files.describe(tmp_path, tmp_path / "piece")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    fault = files.find_fault(tmp_path, saved)
    assert fault.kind is files.FaultKind.UNREACHABLE
    assert os.strerror(number) in fault.message


def test_nodes_that_do_not_share_their_folder_are_told_of(tmp_path):
    shared, own = found_storage(tmp_path / "shared"), found_storage(tmp_path / "own")
    assert found_storage(tmp_path / "shared") == shared != own
    assert unshared({"a": shared}) == unshared({"a": shared, "b": shared}) == ""
    for storages in ({"a": shared, "b": own}, {"a": "", "b": ""}, {"a": shared, "b": ""}):
        assert "checkpoint.location" in unshared(storages)


# telling


def test_every_number_is_a_loss_and_no_loss_is_none(tmp_path):
    told = []

    class Listening(FolderKeeper):
        def progress(self, rank, step, loss):
            told.append(None if loss is None else repr(loss()))

    training = Training(tmp_path, keeper=Listening(tmp_path, 1))
    with training.saved as saved:
        for loss in (2.5, float("nan"), float("inf"), torch.tensor(1.5, requires_grad=True), torch.tensor([3]), None):
            saved.report(loss)
        saved.report()
    assert told == ["2.5", "nan", "inf", "1.5", "3.0", None, None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_loss_on_a_gpu_is_read_later_and_not_waited_for(tmp_path):
    told = []

    class Listening(FolderKeeper):
        def progress(self, rank, step, loss):
            told.append(loss)

    factor = torch.randn(8192, 8192, device="cuda")
    with Training(tmp_path, keeper=Listening(tmp_path, 1)).saved as saved:
        saved.report(factor.sum())  # the first one takes memory
        told[0]()
        for _ in range(50):
            product = factor @ factor
        loss, done = product.sum(), torch.cuda.Event()
        done.record()
        saved.report(loss)
        assert not done.query(), "the GPU is still at work on it"
    assert told[1]() == float(loss)


def test_a_first_start_says_that_there_was_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Training(tmp_path).saved.restore()
    assert "starts at step 0" in caplog.text


def test_the_list_of_a_checkpoint_names_size_and_checksum_of_each_file(tmp_path):
    with Training(tmp_path).saved as saved:
        saved.save()
    (folder,) = folders(tmp_path)
    listed = json.loads((folder / "pieces-0.json").read_text())["pieces"]
    assert {piece["path"] for piece in listed} == {".metadata", *(file.name for file in folder.glob("*.distcp"))}
    assert all(files.find_fault(folder, files.SavedPiece(**piece)) is None for piece in listed)
