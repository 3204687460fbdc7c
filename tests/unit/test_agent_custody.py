"""A task's GPUs stay taken until nothing of it is left: what cannot be ended is reported, kept, and tried again."""

import asyncio
import subprocess
import sys
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest

from tests.support.agent_tasks import until
from tests.support.fake_control_plane import NODE, desired
from tests.support.virtual_time import LoopClock
from whaleflux.v1 import agent_pb2
from whaleflux.v1.scheduler_pb2 import TaskPhase
from whaleflux_agent.core.task_users import IsolationSettings
from whaleflux_agent.devices.profile import played_uuid
from whaleflux_agent.devices.source import DevicesUnreadable
from whaleflux_agent.isolation import Isolation
from whaleflux_agent.reports import ReportLog
from whaleflux_agent.runtime.api import LaunchFailed, RankExit
from whaleflux_agent.secret_access import SecretAccess
from whaleflux_agent.secret_files import SecretFiles
from whaleflux_agent.state import StateDir
from whaleflux_agent.strangers import find_strangers
from whaleflux_agent.supervisor import NodeLimits, Supervisor
from whaleflux_agent.task_runner import NodeContext

TASK = "train-1-0"


class Machine:
    """The processes of a task as a runtime and a driver see them; `immortal` ones outlive SIGKILL."""

    name = "process"
    limited_by = frozenset()

    def __init__(self):
        self.lives = self.immortal = self.fails = False
        self.ended = asyncio.Event()
        self.pids, self.silent, self.begun, self.looks, self.kills = frozenset(), False, 0, 0, 0

    async def prepare(self, plan):
        pass

    async def start(self, plan):
        self.lives, self.begun = True, self.begun + 1
        if self.fails:
            raise LaunchFailed("the ranks did not start", left=self)
        return self

    async def adopt(self, plan):
        return self if self.begun else None

    async def exits(self):
        await self.ended.wait()
        yield RankExit(0, 7)

    async def signal(self, number):
        self.kills += number == 9
        if not self.immortal:
            self.lives = False
            self.ended.set()

    def alive(self):
        return self.lives

    async def gone(self):
        return not self.lives

    async def remains(self):
        self.looks += 1
        return (f"pid 12 (train): thread 13 D in nvidia_ioctl, look {self.looks}",) if self.lives else ()

    async def release(self):
        pass

    async def memory_used(self, gpu_uuids):
        return {}

    async def computing(self, gpu_uuids):
        if self.silent:
            raise DevicesUnreadable("NVML did not answer within 10 s")
        return self.pids


class NoSockets:
    async def open(self, task):
        pass

    async def close(self, task):
        pass


class SlowDisk(StateDir):
    """Does each thing that `behind` names only when another was asked for, too; "stopping": to note that a task is to end."""

    def __init__(self, folder):
        super().__init__(folder)
        self.behind, self._asked = {}, defaultdict(threading.Event)

    async def run(self, function, *args, **kwargs):
        name = "stopping" if any(getattr(arg, "stopping", "") for arg in args) else function.__name__
        self._asked[name].set()

        def late():
            if (other := self.behind.get(name)) is not None:
                assert self._asked[other].wait(30), f"{other} was never asked for"
            return function(*args, **kwargs)

        return await super().run(late)


class Node:
    """A supervisor on this machine; `reports` are what the scheduler would get."""

    def __init__(self, machine, folder):
        self.machine, self.state, self.observed = machine, SlowDisk(folder), []
        self.log, self.restores = ReportLog(self.state), Restores()

    async def start(self):
        await self.log.open()
        self.context = context = NodeContext(
            node=NODE,
            host_address="127.0.0.1",
            agent_socket=self.state.root / "rank.sock",
            checkpoint_root="/checkpoints",
            pass_environment=(),
            state=self.state,
            reports=self.log,
            runtimes={"process": self.machine},
            datasets=SimpleNamespace(fetch=None),
            code=None,
            secrets=SecretAccess(SecretFiles(None), None, LoopClock()),
            restore_access=self.restores,
            clock=LoopClock(),
            simulated=False,
            computing=self.machine.computing,
            memory_used=self.machine.memory_used,
            observe=lambda kind, task, code, detail: self.observed.append((kind, detail)),
            isolation=Isolation(IsolationSettings(wanted="none"), self.state.root, self.state.root / "checkpoints"),
            sockets=NoSockets(),
        )
        self.supervisor = Supervisor(
            context, lambda: frozenset(played_uuid(NODE, index) for index in range(4)), NodeLimits(stuck_after_s=0.0)
        )
        await self.supervisor.restore()
        self._running = asyncio.create_task(self.supervisor.run())
        return self

    async def stop(self):
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await asyncio.to_thread(self.state.close)

    def reports(self, task=TASK):
        return [report for report in self.log.after(0) if report.task == task]

    def phases(self, task=TASK):
        return [TaskPhase.Name(report.phase).removeprefix("TASK_PHASE_") for report in self.reports(task)]

    async def want(self, *tasks):
        await self.supervisor.desire(agent_pb2.DesiredTasks(tasks=tasks))

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                assert not self._running.done(), self._running.exception()
                await asyncio.sleep(0.002)


class Restores:
    """Whether the node reaches what an attempt has to restore; that it does not is known once `looked` is set."""

    def __init__(self):
        self.reached, self.looking, self.looked = True, asyncio.Event(), asyncio.Event()

    async def check(self, work):
        if not self.reached:
            self.looking.set()
            await self.looked.wait()
            raise LaunchFailed("CHECKPOINT_UNREACHABLE")


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
async def node(machine, tmp_path):
    made = await Node(machine, tmp_path).start()
    yield made
    await made.stop()


async def test_a_task_that_cannot_be_ended_is_stuck_and_not_killed(node, machine):
    machine.immortal = True
    await node.want(desired(["train"], grace_s=0.0))
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])
    await node.want()
    await node.until(lambda: node.reports()[-1].stuck)
    assert "thread 13 D in nvidia_ioctl" in node.reports()[-1].stuck
    assert node.phases()[-1] == "RUNNING"
    assert "TASK_STUCK" in [kind for kind, _ in node.observed]
    machine.immortal = False
    await node.until(lambda: node.phases()[-1] == "KILLED")
    assert node.reports()[-1].stuck == ""


async def test_what_is_withdrawn_before_it_was_looked_at_is_told_to_be_gone(node, machine):
    wanted = desired(["train"])
    await node.want()
    await asyncio.gather(node.supervisor.change(wanted), node.supervisor.remove(TASK))
    await node.until(lambda: node.phases()[-1:] == ["GONE"])
    assert not machine.begun
    await node.want(desired(["train"], epoch=2))
    await node.until(lambda: node.phases("train-2-0")[-1:] == ["RUNNING"])


async def test_a_failed_start_is_not_refused_while_something_of_it_lives(node, machine):
    machine.fails = machine.immortal = True
    await node.want(desired(["train"]))
    await node.until(lambda: node.reports() and node.reports()[-1].stuck)
    assert "REFUSED" not in node.phases()
    machine.immortal = False
    await node.until(lambda: node.phases()[-1] == "REFUSED")
    assert node.reports()[-1].stuck == ""
    assert "did not start" in node.reports()[-1].message


async def test_a_start_that_fails_while_its_end_is_being_noted_holds_nothing_afterwards(node):
    node.restores.reached = False
    await node.want(desired(["train"]))
    await node.restores.looking.wait()
    # It fails, is to stop when that is known, and is refused while its stop is being noted.
    node.state.behind = {"save_desired": "forget", "forget": "stopping"}
    node.restores.looked.set()
    await node.want()
    await node.until(lambda: node.phases()[-1] == "REFUSED")
    node.restores.reached = True
    await node.want(desired(["train"], epoch=2))
    await node.until(lambda: node.phases("train-2-0")[-1:] == ["RUNNING"])


async def test_a_failure_is_reported_at_once_and_what_it_leaves_afterwards(node, machine):
    machine.immortal = True
    await node.want(desired(["train"], grace_s=0.0))
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])
    machine.ended.set()
    await node.until(lambda: node.reports()[-1].stuck)
    assert [report.ending for report in node.reports()[-2:]] == [True, True], (
        "its GPUs are taken from the first word on"
    )
    machine.immortal = False
    await node.until(lambda: not node.reports()[-1].ending)
    assert [(report.phase, report.exit_code) for report in node.reports()[-3:]] == [
        (TaskPhase.TASK_PHASE_EXITED, 7)
    ] * 3
    assert node.reports()[-1].stuck == ""


async def test_what_ends_without_a_trace_frees_its_gpus_with_the_report_of_its_end(node, machine):
    await node.want(desired(["train"]))
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])
    machine.lives = False
    machine.ended.set()
    await node.until(lambda: node.phases()[-1] == "EXITED")
    assert not node.reports()[-1].ending


@pytest.mark.parametrize("kept", ["computing", "unknown"])
async def test_gpus_are_free_only_when_the_driver_says_that_nobody_computes_there(node, machine, kept):
    machine.pids = frozenset({5})  # somebody else's, from before
    await node.want(desired(["train"], grace_s=0.0))
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])
    machine.pids, machine.silent = frozenset({5, 99}), kept == "unknown"
    await node.want()
    await node.until(lambda: node.reports()[-1].stuck)
    said = {"computing": "pid 99 computes on its GPUs", "unknown": "not known: NVML did not answer"}[kept]
    assert said in node.reports()[-1].stuck
    assert "pid 5 " not in node.reports()[-1].stuck
    machine.pids, machine.silent = frozenset({5}), False
    await node.until(lambda: node.phases()[-1] == "KILLED")


async def test_the_next_agent_still_knows_that_the_task_is_stuck(node, machine, tmp_path):
    machine.immortal = True
    await node.want(desired(["train"], grace_s=0.0))
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])
    await node.want()
    await node.until(lambda: node.reports()[-1].stuck)
    await node.stop()
    later = await Node(machine, tmp_path).start()
    assert later.supervisor.reports()[0].stuck
    machine.immortal = False
    await later.until(lambda: later.phases()[-1] == "KILLED")
    await later.stop()


async def test_a_task_behind_one_that_is_stuck_is_refused_and_so_tried_elsewhere(node, machine):
    machine.immortal = True
    first = desired(["train"], grace_s=0.0)
    await node.want(first)
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])
    waiting = desired(["other"], job="queues/default/jobs/other")
    await node.want(waiting)
    await node.until(lambda: node.phases("other-1-0")[-1:] == ["REFUSED"])
    assert f"{TASK} cannot be ended here" in node.reports("other-1-0")[-1].message
    assert machine.begun == 1


async def test_a_gang_over_hosts_is_refused_at_once_by_a_node_that_only_its_own_host_can_dial(node, machine):
    gang = desired(["train"], world_size=2)
    gang.group_world_size, gang.elsewhere = 2, "sites/s/nodes/far"
    await node.want(gang)
    await node.until(lambda: node.phases()[-1:] == ["REFUSED"])
    message = node.reports()[-1].message
    assert "ranks on sites/s/nodes/far cannot reach 127.0.0.1" in message
    assert "--host-address" in message
    assert machine.begun == 0


async def test_a_gang_of_one_host_may_meet_on_loopback(node, machine):
    gang = desired(["train"], world_size=2)
    gang.group_world_size = 2
    await node.want(gang)
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])


async def test_evidence_that_changes_all_the_time_is_not_reported_all_the_time(node, machine):
    machine.immortal = True
    await node.want(desired(["train"], grace_s=0.0))
    await node.until(lambda: node.phases()[-1:] == ["RUNNING"])
    await node.want()
    await node.until(lambda: machine.kills >= 6)
    assert len([report for report in node.reports() if report.stuck]) == 1
    machine.immortal = False
    await node.until(lambda: node.phases()[-1] == "KILLED")


async def left_by_an_agent_whose_file_broke(node, machine, folder, file):
    await node.want(desired(["train"], epoch=5, task="train-5-0"))
    await node.until(lambda: node.phases("train-5-0")[-1:] == ["RUNNING"])
    await node.stop()
    (folder / file).write_bytes(b"\xff broken")
    return await Node(machine, folder).start()


async def test_a_desired_set_that_cannot_be_read_ends_no_task(node, machine, tmp_path):
    later = await left_by_an_agent_whose_file_broke(node, machine, tmp_path, "desired.pb")
    await later.supervisor.change(desired(["other"], job="queues/default/jobs/other"))  # not the whole set yet
    await later.until(later.supervisor.running)
    assert machine.kills == 0
    await later.want(desired(["train"], epoch=5, task="train-5-0"))
    assert machine.lives
    assert machine.begun == 1
    await later.stop()


async def test_epochs_that_cannot_be_read_let_no_old_attempt_in(node, machine, tmp_path):
    later = await left_by_an_agent_whose_file_broke(node, machine, tmp_path, "epochs.json")
    await later.want(desired(["train"], epoch=4, task="train-4-0"))
    await later.until(lambda: later.phases("train-4-0")[-1:] == ["REFUSED"])
    assert "epoch 4 is over" in later.reports("train-4-0")[-1].message
    assert machine.begun == 1
    await later.stop()


class Gang(Machine):
    """Rank 0 fails; rank 1 waits for it for ever."""

    async def exits(self):
        yield RankExit(0, 7)
        await self.ended.wait()
        yield RankExit(1, -15)


async def test_ranks_that_an_agent_left_after_it_had_told_of_a_failure_are_ended_by_the_next_one(tmp_path):
    machine = Gang()
    machine.immortal = True
    node = await Node(machine, tmp_path).start()
    await node.want(desired(["train"]))
    await node.until(lambda: node.phases()[-1:] == ["EXITED"])
    await node.stop()
    machine.immortal = False
    later = await Node(machine, tmp_path).start()
    await later.want()
    await later.until(lambda: not machine.lives)
    assert node.reports()[-1].ending
    await later.until(lambda: not later.reports()[-1].ending)
    await later.stop()


@pytest.fixture
def stranger(tmp_path):
    """A process of a task that no agent here knows, bound to the node's first GPU."""
    variables = {
        "WHALEFLUX_NODE": NODE,
        "WHALEFLUX_TASK_TOKEN": f"lost-{tmp_path.name}",
        "CUDA_VISIBLE_DEVICES": played_uuid(NODE, 0),
    }
    with subprocess.Popen([sys.executable, "-c", "input()"], env=variables, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_a_process_whose_task_is_not_known_any_more_keeps_the_gpus_that_it_was_given(stranger, tmp_path):
    await until(lambda: find_strangers(NODE, ()))  # it has become its program
    node = await Node(Machine(), tmp_path).start()
    await node.want(desired(["train"]), desired(["other"], job="queues/default/jobs/other", gpus=(3,)))
    await node.until(lambda: node.phases()[-1:] == ["REFUSED"])
    assert f"process {stranger.pid} holds its GPUs" in node.reports()[-1].message
    await node.until(lambda: "RUNNING" in node.phases("other-1-0"))
    await asyncio.to_thread(stranger.communicate, b"\n")
    await node.want(desired(["train"], epoch=2, task="train-2-0"))
    await node.until(lambda: "RUNNING" in node.phases("train-2-0"))
    await node.stop()


async def test_data_of_a_task_is_in_use_from_its_order_on(node):
    waiting = desired(["train"])
    waiting.spec.datasets.append("datasets/c4")
    waiting.start = False
    await node.want(waiting)
    assert node.supervisor.datasets_in_use() == {"datasets/c4"}, "nothing but its order is known"
    await node.until(lambda: node.phases() == ["ACCEPTED"])
    assert node.supervisor.datasets_in_use() == {"datasets/c4"}
    await node.want()
    await node.until(lambda: node.phases()[-1] == "GONE")
    assert not node.supervisor.datasets_in_use()


async def test_a_dataset_that_does_not_come_ends_the_wait_for_the_others(machine, tmp_path):
    node, waiting = await Node(machine, tmp_path).start(), []

    async def fetch(dataset, work, tell):
        if dataset == "datasets/broken":
            await until(lambda: waiting)
            raise LaunchFailed("datasets/broken: cannot fetch it")
        waiting.append(dataset)
        try:
            await asyncio.Event().wait()
        finally:
            waiting.remove(dataset)

    node.context.datasets.fetch = fetch
    task = desired(["train"])
    task.spec.datasets.extend(["datasets/c4", "datasets/broken"])
    await node.want(task)
    await node.until(lambda: node.phases()[-1:] == ["REFUSED"])
    assert not waiting, "else it would say for hours what the task waits for, which is over"
    await node.stop()
