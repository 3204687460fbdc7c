"""A pull: resumed after any death, never a wrong byte, never more room than was reserved."""

import errno
import io
import os
import threading
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whaleflux.data import manifest as manifests
from whaleflux.data.sources import Found, Local, SourceChanged, SourceFailed, SourceReplaced
from whaleflux_agent import dataset_progress, dataset_pull
from whaleflux_agent.dataset_files import finish, unchanged
from whaleflux_agent.dataset_progress import Progress, Stopped
from whaleflux_agent.dataset_pull import Corrupt, Pull
from whaleflux_agent.dataset_wanted import Wanted, found_out

CHUNK_BYTES = 4096
BIG = os.urandom(10_000)  # three chunks
SMALL = {"a": b"", "sub/b": b"bee"}


@pytest.fixture
def original(tmp_path):
    folder = tmp_path / "original"
    for name, data in {"big": BIG, **SMALL}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Faulty(Local):
    """A source that is flipped, cut, killed or full, as its plan says; one line for each stretch that is opened."""

    ranged = True

    def __init__(self, root, plan=()):
        super().__init__(root)
        self.plan, self.opened, self.lock = list(plan), 0, threading.Lock()

    @contextmanager
    def open(self, found, offset, length):
        with self.lock:
            self.opened += 1
            fault = self.plan.pop(0) if self.plan else ""
        with super().open(found, offset, length) as stream:
            if fault == "refuse":
                raise SourceFailed("no answer")
            if fault == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if fault == "kill":
                raise KeyboardInterrupt  # nothing of ours sees it: as a kill, for the folder
            data = bytearray(stream.read(length))
            if fault == "flip" and data:
                data[len(data) // 2] ^= 1
            if fault == "cut":
                del data[len(data) // 2 :]
            yield io.BytesIO(data)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(dataset_pull, "PAUSE_S", 0.0)
    monkeypatch.setattr(dataset_pull, "RUN_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(manifests, "MIN_CHUNK_BYTES", CHUNK_BYTES)


def pulled(source, partial, manifest=None, progress=None):
    there = found_out(source)
    return Pull(Wanted(manifest, there.found) if manifest else there, source, partial, progress=progress).run()


def test_what_is_pulled_is_the_original_and_no_later_write_goes_unseen(original, tmp_path):
    made = pulled(Local(original), tmp_path / "partial")
    finish(tmp_path / "partial", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(original)
    assert unchanged(tmp_path / "copy", made)
    os.chmod(tmp_path / "copy" / "big", 0o644)
    with open(tmp_path / "copy" / "big", "r+b") as file:
        file.write(b"!")
    assert not unchanged(tmp_path / "copy", made)


def test_a_pull_that_was_stopped_goes_on_where_it_was(original, tmp_path):
    progress = Progress()

    class Stopping(Local):
        def open(self, found, offset, length):
            if progress.done_bytes >= CHUNK_BYTES:
                progress.stop.set()
            return super().open(found, offset, length)

    dataset_pull_lanes, dataset_pull.LANES = dataset_pull.LANES, 1
    try:
        with pytest.raises(Stopped):
            pulled(Stopping(original), tmp_path / "partial", progress=progress)
    finally:
        dataset_pull.LANES = dataset_pull_lanes
    again = Progress()
    pulled(Local(original), tmp_path / "partial", progress=again)
    assert again.here_bytes >= CHUNK_BYTES
    assert again.here_bytes + again.pulled_bytes == again.total_bytes == len(BIG) + 3


def test_what_was_torn_on_the_disk_is_pulled_again(original, tmp_path):
    made = pulled(Local(original), tmp_path / "partial")
    with open(tmp_path / "partial" / "files" / "big", "r+b") as file:
        file.seek(CHUNK_BYTES + 7)
        file.write(bytes(1000))
    with open(tmp_path / "partial" / "journal", "ab") as journal:
        journal.write(b"torn")
    again = Progress()
    assert pulled(Local(original), tmp_path / "partial", progress=again) == made
    assert again.pulled_bytes == CHUNK_BYTES
    finish(tmp_path / "partial", tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(original)


FAULTS = st.lists(st.sampled_from(["", "flip", "cut", "refuse", "full", "kill"]), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FAULTS, st.booleans())
def test_whatever_fails_on_the_way_no_wrong_byte_is_ever_given(original, tmp_path_factory, plan, torn):
    folder, source = tmp_path_factory.mktemp("pull"), Faulty(original, plan)
    manifest = pulled(Local(original), folder / "first")
    for _ in range(len(plan) + 2):
        try:
            assert pulled(source, folder / "partial", manifest) == manifest
            break
        except (SourceFailed, OSError, KeyboardInterrupt):
            journal = folder / "partial" / "journal"
            if torn and journal.exists() and journal.stat().st_size:
                with open(folder / "partial" / "files" / "big", "r+b") as file:
                    file.write(b"torn")
    finish(folder / "partial", folder / "copy")
    assert contents(folder / "copy") == contents(original)


def test_a_source_that_gives_other_bytes_than_the_manifest_is_not_believed(original, tmp_path):
    manifest = pulled(Local(original), tmp_path / "first")
    (original / "sub/b").write_bytes(b"bug")
    said = "sub/b: bytes 0 to 3 are not what its manifest says: it is not what it was when it was first read; declare"
    source = Faulty(original)
    with pytest.raises(SourceReplaced, match=said):
        pulled(source, tmp_path / "partial", manifest)
    assert source.opened <= manifest.chunk_count + 1, "the second reading says that it is no slip on the way"


def test_bytes_that_are_wrong_in_another_way_each_time_are_slips_on_the_way(original, tmp_path):
    class Slipping(Local):
        slips = 0

        @contextmanager
        def open(self, found, offset, length):
            with super().open(found, offset, length) as stream:
                data = bytearray(stream.read(length))
                if found.path == "sub/b":
                    self.slips += 1
                    data[0] ^= self.slips
                yield io.BytesIO(data)

    manifest = pulled(Local(original), tmp_path / "first")
    with pytest.raises(Corrupt, match=r"sub/b: bytes 0 to 3 are not what its manifest says$"):
        pulled(Slipping(original), tmp_path / "partial", manifest)


def test_a_source_that_is_written_while_it_is_read_makes_no_version(original, tmp_path):
    class Written(Local):
        def open(self, found, offset, length):
            (original / "sub/b").write_bytes(b"other")
            return super().open(found, offset, length)

    with pytest.raises(SourceChanged):
        pulled(Written(original), tmp_path / "partial")


def test_a_full_disk_is_known_before_a_byte_is_pulled(original, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source = Faulty(original)
    with pytest.raises(OSError, match="No space left"):
        pulled(source, tmp_path / "partial")
    assert not source.opened
    assert not (tmp_path / "partial").exists()


def test_the_pace_is_that_of_all_lanes_together(monkeypatch):
    now, waited = [100.0], []
    monkeypatch.setattr(dataset_progress.time, "monotonic", lambda: now[0])
    pace, stop = dataset_progress.Pace(1000), threading.Event()
    monkeypatch.setattr(stop, "wait", waited.append)
    for _ in range(3):
        pace.wait(500, stop)
    assert waited == [0.0, 0.5, 1.0]


def test_links_lead_where_who_reads_may_go_and_never_in_circles(original):
    (original / "link").symlink_to(original / "sub" / "b")
    assert Found("link", 3, "").path in {one.path for one in Local(original).scan()}
    (original / "sub" / "up").symlink_to(original)
    with pytest.raises(SourceFailed, match="linked into itself"):
        Local(original).scan()
