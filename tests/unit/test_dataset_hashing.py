"""What a source consists of, found out by who reads all of it: the same as an agent's pull finds."""

import os
import threading

import pytest

from whaleflux.cli import dataset_commands
from whaleflux.cli.__main__ import app
from whaleflux.data import hashing
from whaleflux.data import manifest as manifests
from whaleflux.data.sources import Local, SourceChanged, SourceFailed
from whaleflux.errors import InvalidArgument
from whaleflux_agent.dataset_pull import Pull
from whaleflux_agent.dataset_wanted import found_out

CHUNK_BYTES = 4096


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "MIN_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr(hashing, "RUN_BYTES", 2 * CHUNK_BYTES)
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "a").write_bytes(os.urandom(5 * CHUNK_BYTES + 1))
    (tmp_path / "source" / "empty").touch()
    (tmp_path / "source" / "sub" / "b").write_bytes(b"bee")
    return tmp_path / "source"


@pytest.mark.parametrize("ranged", [True, False])
def test_it_is_what_a_pull_finds_and_every_byte_is_told(folder, tmp_path, ranged):
    source, read, lock = Local(folder), [], threading.Lock()
    source.ranged = ranged

    def told(count):
        with lock:
            read.append(count)

    found = hashing.hashed(source, told)
    assert found == Pull(found_out(source), source, tmp_path / "partial").run()
    assert sum(read) == found.size_bytes


def test_what_is_written_meanwhile_is_no_version(folder):
    class Written(Local):
        def open(self, found, offset, length):
            (folder / "sub" / "b").write_bytes(b"wasp")
            return super().open(found, offset, length)

    with pytest.raises((SourceChanged, SourceFailed)):
        hashing.hashed(Written(folder))


def test_what_ends_early_is_said_with_its_file(folder):
    class Short(Local):
        def scan(self):
            return [type(one)(one.path, one.size_bytes + CHUNK_BYTES, one.version) for one in super().scan()]

    with pytest.raises(SourceFailed, match="ended before its end"):
        hashing.hashed(Short(folder))


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("c4", "https://u:hidden@h/x", "has a user or password in it"),
        ("c4", "ftp://h/x", "nothing that agents can read"),
        ("Bad Name", "", "NAME: 'Bad Name' is not an id"),
    ],
)
def test_what_cannot_be_declared_is_refused_before_anything_is_read(folder, monkeypatch, name, source, said):
    monkeypatch.setattr("whaleflux.data.sources.open_source", lambda *_: pytest.fail("it is looked at"))
    with pytest.raises(InvalidArgument) as refused:
        dataset_commands.add(name, source or str(folder), hash_=True)
    assert "hidden" not in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("option", ["--scan", "--hash"])
def test_a_name_that_is_no_utf8_is_said_with_what_to_do(folder, option):
    (folder / "sub" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"au lait")
    with pytest.raises(InvalidArgument, match=r"'sub/caf\\udce9.txt' is no UTF-8.*rename it") as refused:
        app(["datasets", "add", "x", "--source", str(folder), option], standalone_mode=False)
    assert refused.value.violations[0].field == "--source"
