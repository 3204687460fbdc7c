"""Inside of a running job, by the command line: commands, shells, ports and files, with a real agent and real processes."""

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import termios
import time
from pathlib import Path

import pytest

from tests.support.attach_world import attach_world
from tests.support.fake_control_plane import JOB, until
from whaleflux.errors import FailedPrecondition, InvalidArgument, StatusError
from whaleflux_agent.runtime import procfs
from whaleflux_scheduler.core.model import JobState

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]

SLEEP = [
    "/bin/sh",
    "-c",
    "mkdir -p out/deep; echo one > out/a; ln -sf a out/link; ln -sf /etc/passwd out/away; exec sleep 600",
]


@pytest.fixture
async def world(tmp_path):
    async with attach_world(tmp_path, SLEEP) as world:
        yield world


def marked(word: str) -> list[procfs.Process]:
    """Living processes that a session started with MARK=word."""
    return procfs.find("MARK", word)


async def test_a_command_runs_beside_its_rank_and_its_code_and_bytes_come_back(world):
    code, out, err = await world.cli("exec", "train", "--rank", "1", "--", "sh", "-c", "cat; echo $RANK $WHALEFLUX_JOB; pwd; echo no >&2; exit 3", input=b"in ")  # fmt: skip
    assert (code, out.decode().split(), err) == (3, ["in", "1", JOB, str(world.work)], "no\n")
    data = os.urandom(3_000_000)
    assert await world.exec("cat", input=data) == (0, data, "")
    assert await world.exec("head", "-c", "5", input=data) == (0, data[:5], "")  # it takes no more
    _, looked, _ = await world.exec(
        "sh", "-c", "tr '\\0' '\\n' < /proc/$WHALEFLUX_RANK_PID/environ | grep ^RANK=; echo $RANK"
    )
    assert looked.decode().split() == ["RANK=0", "0"]  # the process that a debugger is to look at
    code, _, err = await world.exec("no-such-program")
    assert (code, "No such file" in err) == (127, True)
    with pytest.raises(InvalidArgument, match="9 is no rank"):
        await world.exec("true", rank=9)
    # What it leaves running ends with its session.
    hidden = "MARK=left setsid sh -c 'trap \"\" HUP TERM; sleep 600' & echo done"
    assert await world.exec("sh", "-c", hidden) == (0, b"done\n", "")
    await until(lambda: not marked("left"))


async def test_signals_reach_the_command_and_a_killed_client_leaves_nothing(world):
    trap = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    process = await world.start("exec", "train", "--", "sh", "-c", trap)
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    out, _ = await asyncio.wait_for(process.communicate(), 45)
    assert (process.returncode, out) == (5, b"caught\n")
    stuck = await world.start("exec", "train", "--", "env", "MARK=stuck", "sh", "-c", "echo ready; sleep 600")
    assert await stuck.stdout.readline() == b"ready\n"
    stuck.stdin.write(bytes(4_000_000))  # more than it may send: the command reads nothing
    assert marked("stuck")
    stuck.kill()
    await stuck.wait()
    await until(lambda: not marked("stuck"))


async def test_sessions_end_with_the_leader_and_with_the_attempt(world):
    for end, word in (
        (world.broker.end, "the connection to the fleet changed"),
        (lambda: world.tasks.unwant("train-1-0"), "ended"),
    ):
        async with (
            world.client() as client,
            world.session(client, "env", "MARK=over", "sh", "-c", "echo ready; sleep 600") as session,
        ):
            responses = session.responses()
            assert (await anext(responses)).data == b"ready\n"
            end()
            async with asyncio.timeout(45):
                with pytest.raises(StatusError, match=word):
                    await anext(responses)
        await until(lambda: not marked("over"))
    await until(lambda: world.tasks.phases("train-1-0")[-1] == "KILLED")


async def in_terminal(world, *args):
    """The command line in a terminal of its own, 33 lines of 101 characters: the process and our end."""
    ours, theirs = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    process = await world.start(*args, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    return process, ours, theirs


async def shown(ours, pattern: bytes) -> bytes:
    """What the terminal shows, up to the pattern."""
    seen, until_s = b"", time.monotonic() + 45
    os.set_blocking(ours, False)
    while not re.search(pattern, seen):
        assert time.monotonic() < until_s, (pattern, seen)
        with contextlib.suppress(BlockingIOError):
            seen += os.read(ours, 4096)
        await asyncio.sleep(0.01)
    os.set_blocking(ours, True)
    return seen


async def test_a_shell_has_a_terminal_of_the_same_size_and_gives_ours_back(world):
    process, ours, theirs = await in_terminal(world, "shell", "train")
    before = termios.tcgetattr(theirs)
    await shown(ours, rb"leave with exit")
    os.write(ours, b"stty size; echo $TERM rank$RANK\n")
    await shown(ours, rb"33 101\r\nxterm rank0\r\n")
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process.send_signal(signal.SIGWINCH)
    os.write(ours, b"sleep 0.3; stty size\n")
    await shown(ours, rb"40 120\r\n")
    os.write(ours, b"sh -c 'echo go$((1 + 1)); exec sleep 60'; echo then$?\n")
    await shown(ours, rb"go2\r\n")
    os.write(ours, b"\x03")  # Ctrl-C is the shell's
    await shown(ours, rb"(then130|\^C)")
    os.write(ours, b"exit 6\n")
    assert await asyncio.wait_for(process.wait(), 10) == 6
    assert termios.tcgetattr(theirs) == before
    process, ours, theirs = await in_terminal(world, "shell", "train")
    await shown(ours, rb"leave with exit")
    os.write(ours, b"echo go$((1 + 1)); exec sleep 600\n")
    await shown(ours, rb"go2\r\n")
    os.write(ours, b"\r~.")
    assert await asyncio.wait_for(process.wait(), 10) == 1
    assert termios.tcgetattr(theirs) == before


SERVER = """
import os, socket, threading
listening = socket.create_server(("127.0.0.1", 0), backlog=64)
open("port.tmp", "w").write(str(listening.getsockname()[1])); os.replace("port.tmp", "port")
def serve(connection):
    got = b""
    while data := connection.recv(65536):  # until the caller's half is closed
        got += data
    connection.sendall(got[::-1])
    connection.close()
while True:
    threading.Thread(target=serve, args=(listening.accept()[0],)).start()
"""


async def test_ports_are_carried_many_connections_at_a_time_and_by_halves(tmp_path):
    async with attach_world(tmp_path, ["python3", "-c", SERVER], ranks=1) as world:
        await until((world.work / "port").exists)
        port = (world.work / "port").read_text()
        process = await world.start("port-forward", "train", f"0:{port}", ":1")
        lines = [await process.stdout.readline() for _ in range(2)]
        here, nobody = (int(re.match(rb"127\.0\.0\.1:(\d+) -> ", line)[1]) for line in lines)

        async def reversed_there(data: bytes) -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", here)
            writer.write(data)
            await writer.drain()
            writer.write_eof()
            got = await reader.read()
            writer.close()
            return got == data[::-1]

        assert all(await asyncio.gather(*(reversed_there(os.urandom(100_000 + n)) for n in range(20))))
        reader, _ = await asyncio.open_connection("127.0.0.1", nobody)
        assert await reader.read() == b""
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 45)
        assert (process.returncode, b"nothing answers on 127.0.0.1" in err) == (130, True)


async def test_files_come_out_whole_and_go_in_whole(world, tmp_path):
    big = os.urandom(3_000_000)
    (world.work / "out" / "big").write_bytes(big)
    code, _, err = await world.cli("cp", "train:out", str(tmp_path / "here"))
    assert (code, "copied 2 files, 3 MB" in err, "1 left out" in err) == (0, True, True), err
    here = tmp_path / "here"
    assert sorted(p.name for p in here.iterdir()) == ["a", "big", "deep", "link"]
    assert (os.readlink(here / "link"), (here / "big").read_bytes() == big) == ("a", True)
    await world.fetch("out/a", here / "a")  # a file replaces a file
    await world.fetch("out", tmp_path)  # a folder goes into a folder
    with pytest.raises(InvalidArgument, match=r"out exists already; .*--replace"):
        await world.fetch("out", tmp_path)
    await world.fetch("out", tmp_path, replace=True)
    await world.send(here, "back")
    assert (world.work / "back" / "big").read_bytes() == big
    await world.send(here, "")  # a folder goes into a folder
    with pytest.raises(FailedPrecondition, match="exists already"):
        await world.send(here, "")
    assert not [p for p in (*tmp_path.iterdir(), *world.work.iterdir()) if "whaleflux-cp" in p.name]
    for outside in ("/etc/passwd", "../../desired.pb", "out/away", ".."):
        with pytest.raises(FailedPrecondition, match="is outside of the folder"):
            await world.fetch(outside, tmp_path / "x")
    with pytest.raises(FailedPrecondition, match="'nothing' is not in the folder"):
        await world.fetch("nothing", tmp_path / "x")


async def test_files_of_an_ended_job_come_while_its_folder_is_there(world, tmp_path):
    work, wanted = world.work, dict(world.tasks.desired)
    world.tasks.unwant("train-1-0")
    await until(lambda: world.tasks.phases("train-1-0")[-1] == "KILLED")
    world.tasks.desired.update(wanted)  # the record stays
    world.scheduler.state = JobState.CANCELLED
    with pytest.raises(FailedPrecondition, match=r"has ended \(CANCELLED\)"):
        await world.exec("true")
    await world.fetch("out/a", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "one\n"
    os.rename(work, work.with_name("gone"))
    with pytest.raises(FailedPrecondition, match="was cleaned up"):
        await world.fetch("out/a", tmp_path / "b")


async def test_the_notebook_example_answers_through_a_forwarded_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    notebook = str(ROOT / "examples" / "notebook" / "notebook.py")
    async with attach_world(tmp_path, ["python3", "-S", notebook, "--port", str(port)], ranks=1) as world:
        process = await world.start("port-forward", "train", f"0:{port}")
        line = await process.stdout.readline()
        here = int(re.match(rb"127\.0\.0\.1:(\d+) -> ", line)[1])

        async def page() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", here)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            return await reader.read()

        async with asyncio.timeout(60):
            while not (answer := await page()):  # it has not begun to listen
                await asyncio.sleep(0.05)
        assert answer.startswith(b"HTTP/1.0 200 OK")
        process.kill()
        await process.wait()
