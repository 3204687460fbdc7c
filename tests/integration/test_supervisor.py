"""`whaleflux up` keeps its parts running, whatever the system refuses for a while."""

import os
import signal
import sys
from pathlib import Path

from tests.support.fake_control_plane import until
from whaleflux.embedded.supervisor import Child, Supervisor


async def _at_once():
    return None


async def test_who_reads_a_pid_file_while_its_child_is_started_again_finds_it(tmp_path, monkeypatch):
    there, replace = [], Path.replace

    def seen(part, file):
        there.append(file.exists())
        return replace(part, file)

    monkeypatch.setattr(Path, "replace", seen)
    child = Child("c", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "logs" / "c.log", _at_once)
    supervisor = Supervisor(tmp_path)
    await supervisor.start([child])
    try:
        first = supervisor.pid("c")
        os.kill(first, signal.SIGKILL)
        await until(lambda: (tmp_path / "c.pid").read_text() != str(first))
        assert (tmp_path / "c.pid").read_text() == str(supervisor.pid("c"))
        assert there == [False, True]
    finally:
        await supervisor.stop()
    assert not list(tmp_path.glob("*c.p*"))


async def test_a_child_that_the_system_refuses_to_start_is_started_later(tmp_path):
    """As on a full disk: neither its log can be opened, nor its pid file be written."""
    said = []
    child = Child("c", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "logs" / "c.log", _at_once)
    supervisor = Supervisor(tmp_path, said.append)
    await supervisor.start([child])
    try:
        first = supervisor.pid("c")
        assert (tmp_path / "c.pid").read_text() == str(first)
        (tmp_path / ".c.part").mkdir()
        child.log.unlink()
        child.log.mkdir()
        os.kill(first, signal.SIGKILL)
        await until(lambda: any("c cannot be started (Is a directory); tried again in" in line for line in said))
        assert not (tmp_path / "c.pid").exists(), "it may be down for long"
        child.log.rmdir()
        await until(lambda: supervisor.pid("c") not in (0, first))
        assert any(line.endswith(f"Is a directory; c runs as {supervisor.pid('c')}") for line in said)
        assert not (tmp_path / "c.pid").exists(), "no file rather than the number of another process"
    finally:
        await supervisor.stop()
