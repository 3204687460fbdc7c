"""Tasks as processes of this host: begun once, found whatever they do to hide, ended whole; limits of their memory."""

import asyncio
import json
import os
import shutil
import signal
import sys
from dataclasses import replace

import pytest

from tests.support.agent_tasks import end, until
from whaleflux_agent.runtime import cgroups, procfs
from whaleflux_agent.runtime.api import LaunchFailed, LaunchPlan, RankExit, RankPlan
from whaleflux_agent.runtime.memory_watch import used_bytes
from whaleflux_agent.runtime.process import SHIM, ProcessRuntime
from whaleflux_agent.runtime.procfs import Process

pytestmark = pytest.mark.integration


def test_limits_are_written_where_the_controllers_are(tmp_path):
    groups = cgroups.Cgroups(tmp_path, frozenset({"cpu", "memory", "pids"}))
    folders = groups.create("j-1-0", 2, cpu_millicores=1500, memory_bytes=1 << 30, processes=500)
    assert [(folder / "pids.max").read_text() for folder in folders] == ["500"] * 2
    assert [(folder / "cpu.max").read_text() for folder in folders] == ["150000 100000"] * 2
    assert [(folder / "memory.max").read_text() for folder in folders] == [str(1 << 30)] * 2
    (folders[1] / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert [cgroups.out_of_memory(folder) for folder in folders] == [False, True]
    bare = cgroups.Cgroups(tmp_path, frozenset()).create("o-1-0", 1, cpu_millicores=1500, memory_bytes=1, processes=1)
    assert list(bare[0].iterdir()) == []


def test_a_group_counts_as_populated_until_the_kernel_says_otherwise(tmp_path):
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert cgroups.populated([tmp_path])
    (tmp_path / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    assert not cgroups.populated([tmp_path])
    cgroups.kill([tmp_path])
    assert (tmp_path / "cgroup.kill").read_text() == "1"


async def test_a_tasks_group_holds_all_of_it_and_is_removed_in_the_end(tmp_path):
    groups = cgroups.Cgroups.find(f"whaleflux-test-{tmp_path.name}")
    if groups is None:
        pytest.skip("no cgroup v2 that we may write")
    assert not groups.root.exists()
    running = await ProcessRuntime(groups).start(process_plan(tmp_path, "import time; time.sleep(600)"))
    folder = groups.root / "j-1-0" / "r0"
    assert (folder / "cgroup.procs").read_text().split() == [str(rank.pid) for rank in started(tmp_path)["ranks"]]
    await end(running, grace_s=5.0)
    assert not cgroups.populated([folder])
    await running.release()
    assert not groups.root.exists()


def token_of(folder):
    return f"token-of-{folder}"  # the whole path: others may run the same test at the same time


def process_plan(folder, code, ranks=1):
    environment = (("WHALEFLUX_TASK_TOKEN", token_of(folder)), ("PATH", "/usr/bin:/bin"))
    plans = tuple(
        RankPlan(rank, (sys.executable, "-c", code), (*environment, ("RANK", str(rank))), folder / f"rank-{rank}.log")
        for rank in range(ranks)
    )
    return LaunchPlan("j-1-0", token_of(folder), folder, plans, str(folder))


async def test_children_that_hid_in_sessions_of_their_own_are_ended_too(tmp_path):
    code = (
        "import subprocess, time\n"
        "subprocess.Popen(['setsid', 'sleep', '600'], start_new_session=True)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(600)"
    )
    running = await ProcessRuntime().start(process_plan(tmp_path, code))
    async with asyncio.timeout(60):
        while not (tmp_path / "ready").exists():
            await asyncio.sleep(0.01)
    await end(running, grace_s=0.2)
    assert await running.gone()
    (ended,) = [ended async for ended in running.exits()]
    assert ended == RankExit(0, -signal.SIGTERM)


async def test_output_is_in_the_log_also_when_written_at_the_very_end(tmp_path):
    running = await ProcessRuntime().start(
        process_plan(tmp_path, "import sys; print('out'); print('err', file=sys.stderr)")
    )
    assert [ended.code async for ended in running.exits()] == [0]
    assert sorted((tmp_path / "rank-0.log").read_text().split()) == ["err", "out"]


async def test_a_shim_that_was_killed_leaves_ranks_that_are_still_found(tmp_path):
    running = await ProcessRuntime().start(process_plan(tmp_path, "import time; time.sleep(600)"))
    started(tmp_path)["shim"].signal(signal.SIGKILL)
    assert running.alive()
    adopted = await ProcessRuntime().adopt(process_plan(tmp_path, ""))
    assert adopted is not None
    assert adopted.alive()
    await end(adopted, grace_s=0.2)
    (ended,) = [ended async for ended in adopted.exits()]
    assert not ended.known
    assert await running.gone()


def started(folder):
    """The shim and the ranks that its record names."""
    record = json.loads((folder / "started.json").read_text())
    return {"shim": Process(**record["shim"]), "ranks": [Process(**rank) for rank in record["ranks"]]}


async def test_a_shim_ends_with_its_ranks_also_when_the_folder_of_the_task_is_gone(tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    running = await ProcessRuntime().start(process_plan(folder, "import time; time.sleep(600)"))
    family = started(folder)
    shutil.rmtree(folder)
    family["ranks"][0].signal(signal.SIGKILL)
    await until(lambda: not family["shim"].alive())
    assert await running.gone()


LEADER_ENDS_THREAD_WRITES = """
import ctypes, threading, time
def write():
    while True:
        open("beat", "a").write("x"); time.sleep(0.01)
threading.Thread(target=write).start()
while not __import__("os").path.exists("beat"): time.sleep(0.01)
ctypes.CDLL(None).syscall(60, 0)  # exit(2): of this thread alone
"""


async def test_a_task_lives_while_a_thread_of_it_does_though_its_leader_is_a_zombie(tmp_path):
    running = await ProcessRuntime().start(process_plan(tmp_path, LEADER_ENDS_THREAD_WRITES))
    (rank,) = started(tmp_path)["ranks"]
    await until(lambda: procfs.stat(rank.pid).state == "Z")
    assert running.alive()
    assert not await running.gone()
    adopted = await ProcessRuntime().adopt(process_plan(tmp_path, ""))
    assert adopted.alive()
    first = asyncio.ensure_future(anext(adopted.exits()))
    size = (tmp_path / "beat").stat().st_size
    await until(lambda: (tmp_path / "beat").stat().st_size > size + 5)
    assert not first.done()
    assert f"pid {rank.pid}" in (await adopted.remains())[0]
    await end(adopted)
    assert await first == RankExit(0, -signal.SIGTERM)
    assert rank.pid not in procfs.snapshot()


async def test_a_daemon_with_an_empty_environment_and_a_session_of_its_own_is_of_the_task(tmp_path):
    code = (
        "import subprocess\nsubprocess.Popen(['env', '-i', 'setsid', 'sh', '-c', 'echo $$ > daemon; exec sleep 600'])"
    )
    running = await ProcessRuntime().start(process_plan(tmp_path, code))
    assert [ended.code async for ended in running.exits()] == [0]
    await until(lambda: (tmp_path / "daemon").exists() and (tmp_path / "daemon").read_text().strip())
    pid = int((tmp_path / "daemon").read_text())
    assert not await running.gone()
    await end(running)
    assert pid not in procfs.snapshot()


async def test_what_a_dead_shim_leaves_is_found_by_its_session(tmp_path):
    """The rank has ended, a child without the task's token lives on in the rank's session, and the shim was killed."""
    code = "import subprocess\nsubprocess.Popen(['env', '-i', 'sh', '-c', 'echo $$ > child; exec sleep 600'])\nimport time; time.sleep(600)"
    running = await ProcessRuntime().start(process_plan(tmp_path, code))
    await until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text().strip())
    started(tmp_path)["shim"].signal(signal.SIGKILL)
    os.kill(started(tmp_path)["ranks"][0].pid, signal.SIGKILL)
    assert [ended.known async for ended in running.exits()] == [False]
    assert not await running.gone()
    await end(running)
    assert int((tmp_path / "child").read_text()) not in procfs.snapshot()


DEATHS = {
    "before its claim": "shim.claim = die",
    "before the first fork": "shim.fork_ranks = die",
    "between two forks": "fork, left = os.fork, [1]\nshim.os.fork = lambda: fork() if left and not left.pop(0) - 1 else die()",
    "after the last fork": "fork = shim.fork_ranks\nshim.fork_ranks = lambda *given: (fork(*given), die())",
    "before its record": "shim.write = die",
}


@pytest.mark.parametrize("death", DEATHS)
async def test_an_attempt_whose_parent_dies_in_the_middle_of_the_start_is_never_begun_again(tmp_path, death):
    """The shim is killed there, and with it the agent; then the next agent comes."""
    shim = tmp_path / "dying_shim.py"
    shim.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(SHIM.parent)!r})\nimport shim\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{DEATHS[death]}\nshim.main(sys.argv[1])\n"
    )
    code = "import os, time\nopen('runs', 'a').write(os.environ['RANK'])\ntime.sleep(600)"
    with pytest.raises(LaunchFailed):
        await ProcessRuntime(shim=shim).start(process_plan(tmp_path, code, ranks=2))
    adopted = await ProcessRuntime().adopt(process_plan(tmp_path, code, ranks=2))
    assert adopted is not None
    assert [ended.known async for ended in adopted.exits()] == [False, False]
    await end(adopted)
    assert procfs.find("WHALEFLUX_TASK_TOKEN", token_of(tmp_path)) == []
    with pytest.raises(LaunchFailed, match="never begun a second time"):
        await ProcessRuntime().start(process_plan(tmp_path, code, ranks=2))
    ran = (tmp_path / "runs").read_text() if (tmp_path / "runs").exists() else ""
    assert sorted(ran) == sorted(set(ran))


async def test_an_attempt_of_another_boot_has_ended_unseen(tmp_path):
    running = await ProcessRuntime().start(process_plan(tmp_path, "import time; time.sleep(600)"))
    attempt = json.loads((tmp_path / "attempt.json").read_text())
    (tmp_path / "attempt.json").write_text(json.dumps(attempt | {"boot_id": "another"}))
    adopted = await ProcessRuntime().adopt(process_plan(tmp_path, ""))
    assert [ended.known async for ended in adopted.exits()] == [False]
    await end(running)


async def test_a_shim_that_comes_too_late_starts_nothing(tmp_path):
    """The agent died between its fork and the shim's first instruction; the next one has given the attempt up."""
    sleepy = tmp_path / "sleepy_shim.py"
    sleepy.write_text("import time\ntime.sleep(600)")
    code = "open('runs', 'a').write('x')"
    starting = asyncio.create_task(ProcessRuntime(shim=sleepy).start(process_plan(tmp_path, code)))
    await until(lambda: procfs.find("WHALEFLUX_SHIM_TOKEN", token_of(tmp_path)))
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    procfs.signal_all(procfs.find("WHALEFLUX_SHIM_TOKEN", token_of(tmp_path)), signal.SIGKILL)
    assert await ProcessRuntime().adopt(process_plan(tmp_path, code)) is not None
    late = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", str(SHIM), str(tmp_path))
    assert await late.wait() == 0
    assert not (tmp_path / "runs").exists()


HOLDS_MEMORY = """
import os, time
taken = bytearray(os.urandom(1 << 20) * 120)
open("ready", "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize("limit_mb", [64, 1024])
async def test_a_rank_over_its_memory_is_ended_where_the_kernel_does_not_limit_it(tmp_path, limit_mb):
    plan = replace(process_plan(tmp_path, HOLDS_MEMORY), memory_bytes_per_rank=limit_mb << 20)
    runtime = ProcessRuntime(memory_every_s=0.02)
    assert runtime.memory_limits == "watched"
    running = await runtime.start(plan)
    first = asyncio.ensure_future(anext(running.exits()))
    if limit_mb == 64:
        ended = await first
        assert (ended.code, ended.out_of_memory) == (-signal.SIGKILL, True)
        assert "memory_per_rank is 0.07 GB" in ended.why
    else:
        await until((tmp_path / "ready").exists)
        looked = [await running.gone() for _ in range(20)]  # time for the watch to look, too
        assert not any(looked)
        assert not first.done()
    await end(running)
    await asyncio.gather(first)


async def test_pages_that_the_processes_of_a_rank_share_count_once(tmp_path):
    """Four children share the 120 MB of their parent: 600 MB by resident sets, 120 MB in truth."""
    code = (
        "import os, time\ntaken = os.urandom(1 << 20) * 120\nfor i in range(4):\n  if not os.fork():\n    break\n"
        "open(f'ready{os.getpid()}', 'w').close()\ntime.sleep(600)"
    )
    running = await ProcessRuntime().start(process_plan(tmp_path, code))
    await until(lambda: len(list(tmp_path.glob("ready*"))) == 5)
    (rank,) = started(tmp_path)["ranks"]
    assert 120e6 < used_bytes(rank, 300_000_000) < 250e6
    await end(running)
