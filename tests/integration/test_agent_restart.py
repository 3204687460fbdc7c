"""The agent as a process of its own: killed and stopped while tasks run, and joined from nothing."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.fake_control_plane import JOB, NODE, desired, flags, ranks_of, until
from whaleflux.clock import SystemClock
from whaleflux.errors import PermissionDenied
from whaleflux.rpc.pki import identity_of
from whaleflux.v1 import health_pb2, scheduler_pb2
from whaleflux_agent import identity

pytestmark = pytest.mark.integration


@contextlib.asynccontextmanager
async def agent_process(control, state):
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "whaleflux_agent", *flags(control, state))
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def kill(child) -> None:
    child.send_signal(signal.SIGKILL)
    await child.wait()


SLEEP_THEN_SEVEN = [
    sys.executable,
    "-c",
    "import os, sys, time\nwhile not os.path.exists('go'): time.sleep(0.02)\nsys.exit(7)",
]


def waits_for_go(folder):
    """Runs until the file `go` appears in its working directory, then fails with 7."""
    return lambda task: setattr(task.spec, "working_directory", str(folder))


async def test_a_killed_agent_is_followed_by_one_that_adopts_its_tasks(control, state, tmp_path):
    wanted = desired(SLEEP_THEN_SEVEN, gpus=(0, 1), edit=waits_for_go(tmp_path))
    async with agent_process(control, state) as child:
        control.tasks.want(wanted)
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        ranks = ranks_of(state)
        await kill(child)
    assert len(ranks) == 2
    assert all(rank.alive() for rank in ranks)
    async with agent_process(control, state):
        await until(lambda: len(control.tasks.hellos) == 2)
        assert control.tasks.hellos[1].tasks[0].phase == scheduler_pb2.TASK_PHASE_RUNNING
        assert ranks_of(state) == ranks
        (tmp_path / "go").touch()
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "EXITED")
    assert control.tasks.last("train-1-0").exit_code == 7
    running = [report for report in control.tasks.reports if report.phase == scheduler_pb2.TASK_PHASE_RUNNING]
    assert (
        len({report.sequence for report in running}) == 1
    )  # told again where the kill came before its acknowledgement


async def test_an_exit_while_no_agent_lives_is_reported_exactly_by_the_next(control, state, tmp_path):
    wanted = desired(SLEEP_THEN_SEVEN, edit=waits_for_go(tmp_path))
    async with agent_process(control, state) as child:
        control.tasks.want(wanted)
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await kill(child)
    (tmp_path / "go").touch()
    await until(lambda: not ranks_of(state))
    async with agent_process(control, state):
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "EXITED")
    assert control.tasks.last("train-1-0").exit_code == 7


async def test_what_is_no_longer_desired_at_the_return_is_ended(control, state, tmp_path):
    async with agent_process(control, state) as child:
        control.tasks.want(desired(SLEEP_THEN_SEVEN, edit=waits_for_go(tmp_path)))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await kill(child)
    control.tasks.desired.clear()
    async with agent_process(control, state):
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "KILLED")
    assert not ranks_of(state)


async def test_a_restart_without_control_plane_keeps_tasks_and_starts_nothing(control, state, tmp_path):
    async with agent_process(control, state) as child:
        control.tasks.want(desired(SLEEP_THEN_SEVEN, edit=waits_for_go(tmp_path)))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await kill(child)
    ranks = ranks_of(state)
    await control.stop()
    socket = state / "ranks" / "rank.sock"
    socket.unlink(missing_ok=True)
    async with agent_process(control, state):
        await until(socket.exists)  # made after the tasks were adopted
        assert ranks_of(state) == ranks
        await control.start()
        await until(lambda: len(control.tasks.hellos) == 2)
        assert ranks_of(state) == ranks


async def test_processes_that_are_not_its_own_are_left_alone_and_told(control, state):
    environment = {"WHALEFLUX_NODE": NODE, "WHALEFLUX_TASK_TOKEN": "of-nobody", "PATH": os.environ["PATH"]}
    stranger = await asyncio.create_subprocess_exec("sleep", "600", env=environment)
    try:
        async with agent_process(control, state):
            await until(lambda: control.health.observations)
            seen = control.health.observations[0]
            assert (seen.kind, seen.code) == ("UNKNOWN_PROCESS", stranger.pid)
            assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_pid_that_belongs_to_somebody_else_now_is_not_touched(control, state, tmp_path):
    async with agent_process(control, state) as child:
        control.tasks.want(desired(SLEEP_THEN_SEVEN, edit=waits_for_go(tmp_path)))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await kill(child)
    for process in ranks_of(state):
        process.signal(signal.SIGKILL)
    folder = state / "tasks" / "train-1-0"
    await until((folder / "exit-0.json").exists)
    started = json.loads((folder / "started.json").read_text())
    (folder / "exit-0.json").unlink()
    started["ranks"][0]["pid"] = started["shim"]["pid"] = os.getpid()  # as after the numbers have come round
    (folder / "started.json").write_text(json.dumps(started))
    async with agent_process(control, state):
        await until(lambda: control.tasks.phases("train-1-0")[-1] == "EXITED")
    assert "nobody saw" in control.tasks.last("train-1-0").message


async def test_sigterm_stops_the_agent_and_not_its_tasks(control, state, tmp_path):
    async with agent_process(control, state) as child:
        control.tasks.want(desired(SLEEP_THEN_SEVEN, edit=waits_for_go(tmp_path)))
        await until(lambda: control.tasks.phases("train-1-0")[-1:] == ["RUNNING"])
        await until(lambda: control.health.heartbeats)
        child.send_signal(signal.SIGTERM)
        assert await child.wait() == 0
    assert [goodbye.kind for goodbye in control.health.goodbyes] == [health_pb2.STOP_KIND_AGENT_RESTART]
    assert len(ranks_of(state)) == 1


async def test_a_step_report_reaches_the_scheduler_and_the_beats(control, state):
    code = (
        "import os, time\n"
        "from whaleflux.sdk.agent_keeper import AgentKeeper\n"
        "keeper = AgentKeeper(os.environ['WHALEFLUX_AGENT_SOCKET'], os.environ['WHALEFLUX_TASK_TOKEN'])\n"
        "keeper.progress(0, 12, lambda: 2.5)\n"
        "time.sleep(600)"
    )
    async with agent_process(control, state):
        control.tasks.want(desired([sys.executable, "-c", code]))
        await until(lambda: control.tasks.progress)
        progress = control.tasks.progress[0]
        assert (progress.job, progress.epoch, progress.step, progress.loss) == (JOB, 1, 12, 2.5)
        await until(lambda: any(task.step == 12 for task in control.health.heartbeats[-1].tasks))


async def test_joins_with_a_token_and_keeps_its_identity(control, tmp_path):
    state, tls = tmp_path / "fresh", identity.files(tmp_path / "fresh")
    ask = identity.JoinParameters(
        target=f"127.0.0.1:{control.join_port}",
        server=control.server_name,
        roots=control.ca.certificate_pem,
        token="good",
        node_id="n1",
    )
    assert await identity.join(tls, ask, SystemClock()) == NODE
    assert identity_of(tls.load().chain).node == NODE
    assert (state / "identity" / "agent.key").stat().st_mode & 0o777 == 0o600
    assert not (state / "identity" / "agent.pending").exists()
    assert identity.known_identity(tls, SystemClock().now()) == NODE
    async with agent_process(control, state):
        await until(lambda: control.inventory.registered)
    assert len(control.inventory.joined) == 1


async def test_a_wrong_token_is_not_tried_again(control, tmp_path):
    ask = identity.JoinParameters(
        f"127.0.0.1:{control.join_port}", control.server_name, control.ca.certificate_pem, "bad", "n1"
    )
    with pytest.raises(PermissionDenied):
        await identity.join(identity.files(tmp_path / "fresh"), ask, SystemClock())


async def test_a_lost_answer_is_asked_for_again_with_the_same_key(control, tmp_path):
    tls = identity.files(tmp_path / "fresh")
    await control.stop()
    ask = identity.JoinParameters(
        f"127.0.0.1:{control.join_port}", control.server_name, control.ca.certificate_pem, "good", "n1"
    )
    joining = asyncio.create_task(identity.join(tls, ask, SystemClock()))
    pending = tls.key.with_suffix(".pending")
    await until(pending.exists)
    kept = pending.read_bytes()
    joining.cancel()
    await asyncio.gather(joining, return_exceptions=True)
    await control.start()
    assert await identity.join(tls, ask, SystemClock()) == NODE
    assert tls.key.read_bytes().strip() == kept.partition(b"\n\n")[0].strip()


def test_settings_without_a_token_say_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "whaleflux_agent", "--server", "127.0.0.1:1", "--state-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "join_token" in done.stderr
