"""What an agent does to checkpoints' files: deletes only on proof, and tells out of reach from gone."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from whaleflux.checkpoint_storage import STORAGE_FILE
from whaleflux.clock import VirtualClock
from whaleflux.errors import Unavailable
from whaleflux.manifests.job_fields import JobKind, Spec
from whaleflux.v1 import checkpoint_pb2
from whaleflux_agent import checkpoint_access
from whaleflux_agent.checkpoint_access import CheckpointAccess
from whaleflux_agent.checkpoint_collector import CheckpointCollector, delete_checkpoint
from whaleflux_agent.core.work import Work
from whaleflux_agent.launch_plans import checkpoint_folder
from whaleflux_agent.runtime.api import LaunchFailed

JOB = "queues/q/jobs/j"
ID = "s000000000001-e1-n000000"
COMMITTED = checkpoint_pb2.CHECKPOINT_STATE_COMMITTED


def saved(root, id_=ID, storage="s1", **more):
    """A checkpoint and its files."""
    folder = root / "job" / id_
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x")
    if storage:
        (root / "job" / STORAGE_FILE).write_text(storage)
    return checkpoint_pb2.Checkpoint(
        name=f"{JOB}/checkpoints/{id_}", location=str(folder), storage=storage, state=COMMITTED, job_uid="u1", **more
    )


class Service:
    """The checkpoint service as the agent's stub."""

    def __init__(self, *checkpoints):
        self.known = {c.name: c for c in checkpoints}
        self.asked = 0
        self.error = None

    async def ListDeletable(self, request, timeout):
        self.asked += 1
        if self.error:
            raise self.error
        return checkpoint_pb2.ListDeletableResponse(checkpoints=self.known.values())

    async def ListCheckpoints(self, request, timeout):
        if self.error:
            raise self.error
        return checkpoint_pb2.ListCheckpointsResponse(checkpoints=self.known.values())

    async def ConfirmDeleted(self, request, timeout):
        for name in request.names:
            self.known.pop(name)


async def collected(collector, clock, done, rounds=5):
    """Lets the collector work until `done`, or for some minutes of its clock."""
    running = asyncio.create_task(collector.run())
    try:
        async with asyncio.timeout(10):
            for _ in range(rounds):
                for _ in range(200):  # the files are real
                    if done():
                        return
                    await asyncio.sleep(0.001)
                await clock.advance(80)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_what_may_go_is_deleted_and_confirmed_by_an_agent_that_was_told_nothing(tmp_path):
    checkpoint, clock = saved(tmp_path), VirtualClock()
    service = Service(checkpoint)
    await collected(CheckpointCollector(service, [], clock), clock, lambda: not service.known)
    assert not service.known
    assert not os.path.exists(checkpoint.location)


async def test_what_is_learnt_meanwhile_goes_at_once(tmp_path):
    checkpoint, clock = saved(tmp_path), VirtualClock()
    service = Service()
    collector = CheckpointCollector(service, [], clock)
    service.known[checkpoint.name] = checkpoint
    service.error = Unavailable("away")
    collector.learn([checkpoint])
    await collected(collector, clock, lambda: not service.known, rounds=1)
    assert not service.known


async def test_the_service_is_asked_now_and_then_and_not_all_the_time():
    service, clock = Service(), VirtualClock()
    await collected(CheckpointCollector(service, [], clock), clock, lambda: False, rounds=4)
    assert 2 <= service.asked <= 7


async def test_a_mount_that_is_missing_is_not_a_deletion(tmp_path):
    """The record stays until somebody sees the storage without the folder."""
    checkpoint, clock = saved(tmp_path / "mnt"), VirtualClock()
    service = Service(checkpoint)
    (tmp_path / "mnt").rename(tmp_path / "away")
    (tmp_path / "mnt").mkdir()
    await collected(CheckpointCollector(service, [tmp_path / "mnt"], clock), clock, lambda: not service.known, 2)
    assert service.known
    (tmp_path / "mnt").rmdir()
    (tmp_path / "away").rename(tmp_path / "mnt")
    await collected(CheckpointCollector(service, [], clock), clock, lambda: not service.known)
    assert not service.known


def test_a_folder_that_is_gone_on_the_right_storage_counts_as_deleted(tmp_path):
    checkpoint = saved(tmp_path)
    assert delete_checkpoint(checkpoint, [])
    assert delete_checkpoint(checkpoint, [])


def test_another_storage_at_the_same_path_is_left_alone(tmp_path):
    checkpoint = saved(tmp_path)
    (tmp_path / "job" / STORAGE_FILE).write_text("another")
    assert not delete_checkpoint(checkpoint, [tmp_path])
    assert os.path.exists(checkpoint.location)


@pytest.mark.parametrize("id_", ["s1-e1", "train", ".", f"{ID}x", "s000000000001-e1"])
def test_only_what_is_named_like_a_checkpoint_is_deleted(tmp_path, id_):
    checkpoint = saved(tmp_path)
    (tmp_path / "job" / "train").mkdir()
    checkpoint.location = str(tmp_path / "job" / id_)
    assert not delete_checkpoint(checkpoint, [tmp_path])
    assert (tmp_path / "job" / "train").exists()
    assert (tmp_path / "job" / ID).exists()


def test_without_a_named_storage_only_what_lies_below_the_roots_is_deleted(tmp_path):
    inside, outside = saved(tmp_path / "root", storage=""), saved(tmp_path / "elsewhere", storage="")
    roots = [tmp_path / "root"]
    assert not delete_checkpoint(outside, roots)
    link = tmp_path / "root" / "job" / ID.replace("1-e", "2-e")
    link.symlink_to(outside.location)
    assert not delete_checkpoint(checkpoint_pb2.Checkpoint(location=str(link)), roots)
    assert os.path.exists(outside.location)
    assert delete_checkpoint(inside, roots)


def test_a_link_that_a_job_has_made_does_not_lead_the_agent_to_another_jobs_checkpoint(tmp_path):
    root = tmp_path / "root"
    others = saved(root, storage="")
    (root / "hostile").mkdir()
    (root / "hostile" / ID).symlink_to(others.location)
    (root / "away").symlink_to(root / "job")
    for location in (root / "hostile" / ID, root / "away" / ID):
        assert not delete_checkpoint(checkpoint_pb2.Checkpoint(location=str(location)), [root])
    assert os.listdir(others.location)


# before a start


def work(**more):
    return Work("t", **{"job": JOB, "epoch": 2, "gpu_uuids": ("GPU-0",), "job_uid": "u1", **more})


async def test_a_node_that_reaches_no_checkpoint_refuses_the_task(tmp_path):
    service = Service(saved(tmp_path / "mnt"))
    await CheckpointAccess(service).check(work())
    (tmp_path / "mnt").rename(tmp_path / "away")
    with pytest.raises(LaunchFailed, match="CHECKPOINT_UNREACHABLE: 1 checkpoints were committed"):
        await CheckpointAccess(service).check(work())
    (tmp_path / "mnt" / "job").mkdir(parents=True)
    with pytest.raises(LaunchFailed, match="not the storage that it was saved on"):
        await CheckpointAccess(service).check(work())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
async def test_a_file_system_that_refuses_is_out_of_reach(tmp_path, monkeypatch, number):
    service = Service(saved(tmp_path))

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(LaunchFailed, match=os.strerror(number)):
        await CheckpointAccess(service).check(work())


async def test_a_mount_that_never_answers_holds_up_no_start_and_one_thread(tmp_path, monkeypatch):
    service, answer, looks = Service(saved(tmp_path)), threading.Event(), []

    def hang(*_, **__):
        looks.append(1)
        answer.wait(10)
        return "s1"

    monkeypatch.setattr(Path, "read_text", hang)
    monkeypatch.setattr(checkpoint_access, "LOOK_S", 0.02)
    access = CheckpointAccess(service)
    for _ in range(3):
        with pytest.raises(LaunchFailed, match="does not answer within"):
            await access.check(work())
    assert len(looks) == 1
    answer.set()


async def test_one_checkpoint_within_reach_is_enough(tmp_path):
    reached = saved(tmp_path / "a")
    gone = saved(tmp_path / "b", ID.replace("1-e", "2-e"))
    (tmp_path / "b").rename(tmp_path / "away")
    await CheckpointAccess(Service(reached, gone)).check(work())


@pytest.mark.parametrize("more", [{"epoch": 1}, {"spec": Spec(kind=JobKind.SERVICE)}, {"job_uid": "another"}])
async def test_an_attempt_that_has_nothing_to_restore_is_started(tmp_path, more):
    service = Service(saved(tmp_path / "mnt"))
    (tmp_path / "mnt").rename(tmp_path / "away")
    await CheckpointAccess(service).check(work(**more))


async def test_a_service_that_is_away_refuses_nothing(tmp_path):
    service = Service(saved(tmp_path / "mnt"))
    (tmp_path / "mnt").rename(tmp_path / "away")
    service.error = Unavailable("away")
    await CheckpointAccess(service).check(work())


def test_each_job_has_a_folder_of_its_own_also_where_the_job_file_names_one():
    folders = {
        checkpoint_folder(work(job_uid=uid, job=job, checkpoint_location=location), "/root")
        for uid in ("u1", "u2")
        for job in (JOB, f"{JOB}2")
        for location in ("", "/mnt/shared")
    }
    assert len(folders) == 8
    assert {os.path.dirname(folder) for folder in folders} == {"/root", "/mnt/shared"}
