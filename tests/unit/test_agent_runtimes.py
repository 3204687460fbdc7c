"""Runtimes without their engines: containers of a pretended Docker, control groups in a plain folder."""

import asyncio
import signal
import sys
import threading
from datetime import timedelta

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import Invalid, Unavailable
from whaleflux.rpc.pki import CertificateAuthority, identity_of
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.identity import Renewal, files, known_identity, require_node
from whaleflux_agent.runtime import cgroups
from whaleflux_agent.runtime.api import LaunchFailed, LaunchPlan, RankExit, RankPlan, end
from whaleflux_agent.runtime.docker import DockerRuntime
from whaleflux_agent.runtime.process import ProcessRuntime
from whaleflux_agent.state import exclusive

docker = pytest.importorskip("docker")


class Container:
    def __init__(self, engine, request):
        self._engine, self.labels, self.request = engine, request["labels"], request
        self.status, self.attrs, self._ended = "created", {"State": {"ExitCode": 0}}, threading.Event()

    def start(self):
        if self.request["image"] == "breaks":
            raise RuntimeError("no such runtime")
        self.status = "running"

    def reload(self):
        if self not in self._engine.made:
            raise docker.errors.NotFound("gone")

    def finish(self, code, *, out_of_memory=False):
        self.status, self.attrs = "exited", {"State": {"ExitCode": code, "OOMKilled": out_of_memory}}
        self._ended.set()

    def kill(self, signal):
        if self.status != "running":
            raise RuntimeError("is not running")
        if signal == 9 or not self.request["environment"].get("STUBBORN"):
            self.finish(128 + signal)

    def logs(self, stream, follow):
        yield b"from the engine\n"
        self._ended.wait(10)

    def remove(self, force):
        self._ended.set()
        self._engine.made.remove(self)


class Engine:
    """Both the client and its collections."""

    def __init__(self):
        self.made, self.images_here = [], {"here"}
        self.containers = self.images = self

    def create(self, **request):
        self.made.append(Container(self, request))
        return self.made[-1]

    def list(self, all, filters):
        name, _, value = filters["label"].partition("=")
        return [c for c in reversed(self.made) if c.labels.get(name) == value]

    def get(self, image):
        if image not in self.images_here:
            raise docker.errors.ImageNotFound("no")

    def pull(self, image):
        if image == "secret":
            raise RuntimeError("pull access denied")
        self.images_here.add(image)


def plan(folder, ranks=2, image="here", environment=()):
    return LaunchPlan(
        "j-1-0",
        "token",
        folder,
        tuple(RankPlan(i, ("x",), environment, folder / f"rank-{i}.log") for i in range(ranks)),
        "/",
        image,
    )


@pytest.fixture
def engine():
    return Engine()


async def test_containers_start_end_and_leave_nothing(engine, tmp_path):
    running = await DockerRuntime(engine).start(plan(tmp_path))
    assert running.alive()
    engine.made[1].finish(3)
    exits = running.exits()
    assert await anext(exits) == RankExit(1, 3)
    assert not await running.gone()
    engine.made[0].finish(137, out_of_memory=True)
    assert await anext(exits) == RankExit(0, -9, out_of_memory=True)
    assert await running.gone()
    await running.release()
    assert engine.made == []


async def test_output_of_containers_reaches_the_log_files(engine, tmp_path):
    await DockerRuntime(engine).start(plan(tmp_path))
    async with asyncio.timeout(5):
        while not (tmp_path / "rank-1.log").exists() or not (tmp_path / "rank-1.log").read_bytes():
            await asyncio.sleep(0.001)
    assert (tmp_path / "rank-1.log").read_bytes() == b"from the engine\n"
    for container in engine.made:
        container.finish(0)


async def test_a_stubborn_container_is_killed_after_the_grace(engine, tmp_path):
    running = await DockerRuntime(engine).start(plan(tmp_path, environment=(("STUBBORN", "1"),)))
    await end(running, grace_s=0.1)
    assert [container.attrs["State"]["ExitCode"] for container in engine.made] == [137, 137]


async def test_a_new_agent_finds_the_containers_by_their_label(engine, tmp_path):
    runtime = DockerRuntime(engine)
    await runtime.start(plan(tmp_path))
    adopted = await runtime.adopt(plan(tmp_path))
    assert adopted is not None
    engine.made[0].finish(0)
    assert (await anext(adopted.exits())).rank == 0
    assert await runtime.adopt(LaunchPlan("o", "other", tmp_path, plan(tmp_path).ranks, "/", "here")) is None
    engine.made[1].finish(0)


async def test_half_a_start_is_removed_and_begun_again(engine, tmp_path):
    engine.create(image="here", labels={"dev.whaleflux.token": "token", "dev.whaleflux.rank": "0"}, environment={})
    assert await DockerRuntime(engine).adopt(plan(tmp_path)) is None
    assert engine.made == []


async def test_what_the_engine_refuses_leaves_nothing_and_says_why(engine, tmp_path):
    with pytest.raises(LaunchFailed, match="no such runtime"):
        await DockerRuntime(engine).start(plan(tmp_path, image="breaks"))
    assert engine.made == []
    with pytest.raises(LaunchFailed, match="access denied"):
        await DockerRuntime(engine).prepare(plan(tmp_path, image="secret"))
    await DockerRuntime(engine).prepare(plan(tmp_path, image="elsewhere"))
    assert "elsewhere" in engine.images_here


async def test_a_container_that_somebody_removed_counts_as_ended_unseen(engine, tmp_path):
    running = await DockerRuntime(engine).start(plan(tmp_path, ranks=1))
    engine.made[0].remove(force=True)
    assert not (await anext(running.exits())).known


def test_limits_are_written_where_the_controllers_are(tmp_path):
    groups = cgroups.Cgroups(tmp_path, frozenset({"cpu", "memory"}))
    folders = groups.create("j-1-0", 2, cpu_millicores=1500, memory_bytes=1 << 30)
    assert [(folder / "cpu.max").read_text() for folder in folders] == ["150000 100000"] * 2
    assert [(folder / "memory.max").read_text() for folder in folders] == [str(1 << 30)] * 2
    (folders[1] / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert [cgroups.out_of_memory(folder) for folder in folders] == [False, True]
    bare = cgroups.Cgroups(tmp_path, frozenset()).create("o-1-0", 1, cpu_millicores=1500, memory_bytes=1)
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
    assert (folder / "cgroup.procs").read_text().split() == [str(rank.pid) for rank in running._ranks]
    await end(running, grace_s=5.0)
    assert not cgroups.populated([folder])
    await running.release()
    assert not groups.root.exists()


def process_plan(folder, code):
    environment = (("WHALEFLUX_TASK_TOKEN", f"token-of-{folder.name}"), ("PATH", "/usr/bin:/bin"))
    ranks = (RankPlan(0, (sys.executable, "-c", code), environment, folder / "rank-0.log"),)
    return LaunchPlan("j-1-0", f"token-of-{folder.name}", folder, ranks, str(folder))


async def test_children_that_hid_in_sessions_of_their_own_are_ended_too(tmp_path):
    code = (
        "import subprocess, time\n"
        "subprocess.Popen(['setsid', 'sleep', '600'], start_new_session=True)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(600)"
    )
    running = await ProcessRuntime().start(process_plan(tmp_path, code))
    async with asyncio.timeout(20):
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
    running._shim.signal(signal.SIGKILL)
    assert running.alive()
    adopted = await ProcessRuntime().adopt(process_plan(tmp_path, ""))
    assert adopted is not None
    assert adopted.alive()
    await end(adopted, grace_s=0.2)
    (ended,) = [ended async for ended in adopted.exits()]
    assert not ended.known
    assert await running.gone()


class Inventory:
    def __init__(self, authority, clock):
        self.authority, self.clock, self.failures, self.renewed = authority, clock, 1, False

    async def RenewCertificate(self, request, timeout):
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        self.renewed = True
        pem = self.authority.sign(request.certificate_request_pem.encode(), "agent", "s/n", self.clock.now())
        return inventory_pb2.RenewCertificateResponse(
            certificate_pem=pem.decode(), authority_pem=self.authority.certificate_pem.decode()
        )


async def test_a_certificate_is_renewed_in_its_last_third_and_tried_until_it_works(tmp_path):
    clock = VirtualClock()
    authority = CertificateAuthority.create(clock.now())
    tls = files(tmp_path)
    tls.save(authority.issue("agent", "s/n", clock.now(), lifetime=timedelta(hours=3)))
    first = tls.load()
    inventory = Inventory(authority, clock)
    running = asyncio.create_task(Renewal(tls, inventory, clock).run())
    await clock.advance(3600)
    assert tls.load() == first
    while inventory.failures or not inventory.renewed:
        await clock.advance(600)
        assert clock.monotonic() < 3 * 3600
    async with asyncio.timeout(10):
        while tls.chain.read_bytes() == first.chain:  # replaced last, by a thread
            await asyncio.sleep(0.001)
    assert tls.load().key != first.key
    assert identity_of(tls.load().chain).node == "sites/s/nodes/n"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_an_ended_certificate_is_no_identity(tmp_path):
    clock = VirtualClock()
    tls = files(tmp_path)
    authority = CertificateAuthority.create(clock.now())
    assert known_identity(tls, clock.now()) == ""
    tls.save(authority.issue("agent", "s/n", clock.now(), lifetime=timedelta(hours=1)))
    assert known_identity(tls, clock.now()) == "sites/s/nodes/n"
    assert known_identity(tls, clock.now() + timedelta(hours=2)) == ""


def test_a_state_directory_of_another_node_is_refused():
    require_node("sites/s/nodes/n", "", "")
    require_node("sites/s/nodes/n", "s", "n")
    with pytest.raises(Invalid, match="belongs to"):
        require_node("sites/s/nodes/n", "s", "m")


def test_two_agents_never_share_a_state_directory(tmp_path):
    with exclusive(tmp_path / "state"):
        with pytest.raises(Invalid, match="in use"), exclusive(tmp_path / "state", wait_s=0.0):
            pass
    with exclusive(tmp_path / "state", wait_s=0.0):
        pass
