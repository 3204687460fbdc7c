"""Tasks as containers of a pretended engine: begun once, found again, ended, copied from."""

import asyncio
import threading

import pytest

from tests.support.agent_tasks import end, until
from whaleflux.manifests.shell_text import as_command
from whaleflux_agent.runtime.api import LaunchFailed, LaunchPlan, RankExit, RankPlan
from whaleflux_agent.runtime.docker import DockerRuntime

docker = pytest.importorskip("docker")

pytestmark = pytest.mark.integration


class Container:
    def __init__(self, engine, request):
        self._engine, self.labels, self.request, self.name = engine, request["labels"], request, request.get("name", "")
        self.status, self.attrs, self._ended = "created", {"State": {"ExitCode": 0}}, threading.Event()
        self.output = [b"2026-01-01T00:00:00.1Z from the engine\n"]

    def start(self):
        if self.request["image"] == "breaks":
            raise RuntimeError("no such runtime")
        if self.request["image"] == "no-bash":
            raise RuntimeError('exec: "bash": executable file not found in $PATH: unknown')
        self.status = "running"
        if self.request["image"] == "slow":
            raise TimeoutError("read timed out")

    def finish(self, code, *, out_of_memory=False):
        self.status, self.attrs = "exited", {"State": {"ExitCode": code, "OOMKilled": out_of_memory}}
        self._ended.set()

    def kill(self, signal):
        if self.status != "running":
            raise RuntimeError("is not running")
        if signal == 9 or not self.request["environment"].get("STUBBORN"):
            self.finish(128 + signal)

    def logs(self, stream, follow, timestamps):
        sent = 0
        while True:
            while sent < len(self.output):
                if self.output[sent] is None:  # here the engine was restarted
                    self.output.pop(sent)
                    raise ConnectionError("the stream broke")
                yield self.output[sent]
                sent += 1
            if self._ended.is_set():
                return
            self._ended.wait(0.01)

    def remove(self, force):
        self._ended.set()
        self._engine.made.remove(self)


class Engine:
    """Both the client and its collections."""

    def __init__(self):
        self.made, self.images_here, self.away = [], {"here"}, False
        self.containers = self.images = self

    def create(self, **request):
        self.made.append(Container(self, request))
        return self.made[-1]

    def list(self, all, filters):
        if self.away:
            raise ConnectionError("no engine")
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
    async with asyncio.timeout(30):
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
    assert await runtime.adopt(LaunchPlan("o", "other", tmp_path / "o", plan(tmp_path).ranks, "/", "here")) is None
    engine.made[1].finish(0)


async def test_half_a_start_is_lost_and_never_begun_again(engine, tmp_path):
    """The agent died when the first container was made and the second not."""
    runtime = DockerRuntime(engine)
    await runtime.start(plan(tmp_path))
    engine.made.pop().finish(0)
    engine.made[0].status = "created"
    adopted = await runtime.adopt(plan(tmp_path))
    assert adopted is not None
    assert {(ended.rank, ended.known) async for ended in adopted.exits()} == {(0, False), (1, False)}
    await end(adopted)
    assert engine.made == []
    with pytest.raises(LaunchFailed, match="never begun a second time"):
        await runtime.start(plan(tmp_path))


async def test_a_start_that_timed_out_but_was_done_is_no_failure(engine, tmp_path):
    running = await DockerRuntime(engine).start(plan(tmp_path, image="slow"))
    assert running.alive()
    assert [container.status for container in engine.made] == ["running", "running"]
    await end(running)


async def test_a_task_is_not_gone_while_the_engine_does_not_answer(engine, tmp_path):
    running = await DockerRuntime(engine).start(plan(tmp_path))
    for container in engine.made:
        container.finish(0)
    engine.away = True
    assert not await running.gone()
    assert "does not say" in (await running.remains())[0]
    engine.away = False
    assert await running.gone()


async def test_output_is_copied_on_after_a_restart_of_the_engine(engine, tmp_path):
    running = await DockerRuntime(engine).start(plan(tmp_path, ranks=1))
    engine.made[0].output += [b"2026-01-01T00:00:00.2Z before\n", None, b"2026-01-01T00:00:00.3Z after\n"]
    log = tmp_path / "rank-0.log"
    await until(lambda: log.exists() and b"after" in log.read_bytes())
    assert log.read_bytes() == b"from the engine\nbefore\nafter\n"
    await end(running)


async def test_the_sockets_folder_is_mounted_since_the_next_agent_binds_a_new_socket(engine, tmp_path):
    environment = (("WHALEFLUX_AGENT_SOCKET", "/state/ranks/rank.sock"),)
    running = await DockerRuntime(engine).start(plan(tmp_path, ranks=1, environment=environment))
    volumes = engine.made[0].request["volumes"]
    assert volumes["/state/ranks"] == {"bind": "/state/ranks", "mode": "ro"}  # to connect is not to write
    assert "/state/ranks/rank.sock" not in volumes
    await end(running)


async def test_what_the_engine_refuses_leaves_nothing_and_says_why(engine, tmp_path):
    with pytest.raises(LaunchFailed, match="no such runtime") as failed:
        await DockerRuntime(engine).start(plan(tmp_path, image="breaks"))
    await end(failed.value.left)
    await failed.value.left.release()
    assert engine.made == []
    script = LaunchPlan(
        "j-2-0", "t", tmp_path / "2", (RankPlan(0, tuple(as_command("x")), (), tmp_path / "log"),), "/", "no-bash"
    )
    script.folder.mkdir()
    with pytest.raises(LaunchFailed, match="image 'no-bash' has no bash") as failed:
        await DockerRuntime(engine).start(script)
    assert failed.value.unfit
    await end(failed.value.left)
    with pytest.raises(LaunchFailed, match="access denied"):
        await DockerRuntime(engine).prepare("secret")
    await DockerRuntime(engine).prepare("elsewhere")
    assert "elsewhere" in engine.images_here


async def test_a_container_that_somebody_removed_counts_as_ended_unseen(engine, tmp_path):
    running = await DockerRuntime(engine).start(plan(tmp_path, ranks=1))
    engine.made[0].remove(force=True)
    assert not (await anext(running.exits())).known
