"""Commands beside ranks: what a start or an end may leave behind when it is interrupted."""

import asyncio
import errno
import os
import subprocess
import sys
import threading

import pytest

from whaleflux_agent.runtime import beside, procfs
from whaleflux_agent.runtime.beside import Command, Place
from whaleflux_agent.runtime.beside_shim import is_ours
from whaleflux_agent.runtime.members import next_to_kill
from whaleflux_agent.runtime.procfs import BESIDE_TOKEN, TASK_TOKEN, Process


def command(size=None):
    return Command(Place("token", {}, "/"), ["true"], size, {})


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [None, (24, 80)])
async def test_a_start_that_is_cancelled_keeps_its_descriptors_until_it_is_over(monkeypatch, size):
    begun, may, given = threading.Event(), threading.Event(), []

    class Slow:
        def __init__(self, argv, *, stdin, stdout, stderr, pass_fds, **_):
            begun.set()
            may.wait(5)
            given.extend(os.fstat(descriptor) for descriptor in (stdin, stdout, stderr, *pass_fds))

        def poll(self):
            return 0

    monkeypatch.setattr(beside.subprocess, "Popen", Slow)
    before, started = descriptors(), command(size)
    starting = asyncio.create_task(started.start())
    while not begun.is_set():
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    ending = asyncio.create_task(started.end())
    for _ in range(5):
        await asyncio.sleep(0)
    may.set()
    await ending
    assert (len(given), descriptors()) == (4, before)


async def test_a_start_for_which_there_is_no_descriptor_says_so_and_leaves_none(monkeypatch):
    made, pipe = [], os.pipe

    def full():
        if len(made) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        made.append(1)
        return pipe()

    before, started = descriptors(), command()
    monkeypatch.setattr(beside.os, "pipe", full)
    with pytest.raises(OSError, match="Too many open files"):
        await started.start()
    await started.end()
    assert descriptors() == before


async def test_a_start_that_fails_says_why_and_leaves_nothing(monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(beside.subprocess, "Popen", refuse)
    before, started = descriptors(), command()
    with pytest.raises(OSError, match="temporarily unavailable"):
        await started.start()
    await started.end()
    assert descriptors() == before


def test_who_was_reaped_is_sent_no_signal_any_more():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert is_ours(child.pid)
    child.communicate(b"\n")
    assert not is_ours(child.pid)


def test_parents_of_commands_are_killed_last_so_that_what_is_orphaned_stays_theirs(monkeypatch):
    environments = {1: f"{BESIDE_TOKEN}=t", 2: f"{TASK_TOKEN}=t", 3: "", 4: f"{BESIDE_TOKEN}=of another task"}
    monkeypatch.setattr(procfs, "environment", lambda pid: [environments[pid].encode()])
    found = [Process(pid, 0) for pid in environments]
    assert [process.pid for process in next_to_kill(found, "t")] == [2, 3, 4]
    assert [process.pid for process in next_to_kill(found[:1], "t")] == [1]
