"""What a job puts in the way of its agent: links to files of the node, pipes that nobody fills, files without end."""

import contextlib
import json
import os

import pytest

from whaleflux_agent.exit_text import error_path, error_text
from whaleflux_agent.node_setup import announce
from whaleflux_agent.runtime import log_times, logs
from whaleflux_agent.runtime.api import LaunchPlan, RankPlan
from whaleflux_agent.state import write


@pytest.fixture
def secret(tmp_path):
    """A file that is none of the job's business."""
    (tmp_path / "secret").write_text("private key\n")
    return tmp_path / "secret"


def put(path, kind, secret):
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(secret)
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["link", "pipe"])
async def test_a_log_that_is_none_is_not_read(tmp_path, secret, kind):
    log = tmp_path / "rank-0.log"
    put(log, kind, secret)
    assert logs.last_text(log) == ""
    with pytest.raises(OSError):
        logs.tail_start(log, 10)
    assert [piece async for piece in logs.follow(log, after=0, more=lambda: False)] == []
    with contextlib.suppress(OSError):
        logs.bound(log, 0)
    assert secret.read_text() == "private key\n"


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_what_lies_in_the_way(tmp_path, secret, kind):
    log = tmp_path / "rank-0.log"
    log.write_text("text\n")
    put(log_times.times_path(log), kind, secret)
    with pytest.raises(OSError):
        log_times.mark(log)
    put(log, kind, secret)
    with pytest.raises(OSError):
        announce(LaunchPlan("t", "t", tmp_path / "setup", (RankPlan(0, (), (), log),), "/"), "sites/s/nodes/n")
    put(tmp_path / ".meta.json.tmp", kind, secret)
    write(tmp_path / "meta.json", b"{}")
    assert (secret.read_text(), (tmp_path / "meta.json").read_text()) == ("private key\n", "{}")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_an_error_file_that_is_none_leaves_the_last_words(tmp_path, secret, kind):
    secret.write_text(json.dumps({"message": "private"}))
    error_path(tmp_path, 0).parent.mkdir()
    put(error_path(tmp_path, 0), kind, secret)
    (tmp_path / "rank-0.log").write_text("last words\n")
    assert error_text(tmp_path, tmp_path / "rank-0.log", 0) == "last words"


def test_an_error_file_without_end_leaves_the_last_words(tmp_path):
    error_path(tmp_path, 0).parent.mkdir()
    error_path(tmp_path, 0).write_text(" " * (2 << 20) + json.dumps({"message": "late"}))
    (tmp_path / "rank-0.log").write_text("last words\n")
    assert error_text(tmp_path, tmp_path / "rank-0.log", 0) == "last words"
