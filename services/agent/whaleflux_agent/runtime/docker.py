"""Tasks as containers: one per rank, found again by a label with the task's token.

The engine keeps containers and exit codes while the agent is away; their output is copied into the same log files
that process tasks write themselves. An attempt is begun once, as with processes: `attempt.json` is durable before the
first container is asked for, and a call that was not answered says nothing about whether it was done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from whaleflux.manifests import shell_text
from whaleflux_agent.core.environment import visible_devices
from whaleflux_agent.runtime.api import UNKNOWN_EXIT, LaunchFailed, LaunchPlan, RankExit, RankPlan, Running
from whaleflux_agent.runtime.job_files import opener
from whaleflux_agent.state import write

TOKEN_LABEL, TASK_LABEL, RANK_LABEL = "dev.whaleflux.token", "dev.whaleflux.task", "dev.whaleflux.rank"
_POLL_S = 0.25
_SOCKET = Path("/var/run/docker.sock")
_ENGINE_TIMEOUT_S = 10
_PULL_TIMEOUT_S = 600  # between two words of the engine about a pull
_RESUME_PAUSE_S = 0.5
_LOG_FILE = {"max-size": "64m", "max-file": "1"}
_ENDED = frozenset({"exited", "dead", "removing"})
_CREATED = "created"
# Variables: where data is, and the rest of it, or a list of all of it.
_DATA = ("WHALEFLUX_DATASET_", "WHALEFLUX_DATASOURCE_", "WHALEFLUX_DATAFILES_")


# What a container is configured with, everybody sees who may ask its engine, and the engine writes it to its disk. So variables that are
# secrets are read inside, from the folder that is mounted there: each file's name is that of a variable.
_EXPORT = 'for WF_F in "$0"/*; do WF_V=$(cat "$WF_F"; printf x); export "${WF_F##*/}=${WF_V%x}"; done; unset WF_F WF_V; exec "$@"'


def container_request(plan: LaunchPlan, rank: RankPlan, image: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the engine is asked for: the keyword arguments of `containers.create`. Pure.

    `image` is the configuration of the image, which is needed where variables are secrets.
    """
    environment = dict(rank.environment)
    request: dict[str, Any] = {
        "image": plan.image,
        "command": list(rank.command) or None,  # None: the image's own
        "name": f"whaleflux-{plan.task}-{rank.rank}",
        "environment": environment,
        "labels": {TOKEN_LABEL: plan.token, TASK_LABEL: plan.task, RANK_LABEL: str(rank.rank)},
        "network_mode": "host",  # ranks meet under the host's address, at ports that they choose
        "ipc_mode": "private" if len(plan.ranks) == 1 else "host",  # CUDA hands memory over between ranks of a node
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],  # beside the engine's own seccomp profile
        "ulimits": [{"name": "core", **_both(plan.wall.get("core_bytes") or 1)}, {"name": "memlock", **_both(-1)}],
        "volumes": _volumes(plan, environment),
        "working_dir": plan.working_directory,
        "init": True,  # reaps what ranks leave behind
        "detach": True,
        "log_config": {"Type": "json-file", "Config": _LOG_FILE},
        "oom_score_adj": 500,
    }
    if shell_text.script_of(rank.command) is not None:  # the image's entry point would be given bash's words
        request["entrypoint"], request["command"] = shell_text.under_init(rank.command), None
    if plan.secret_variables:
        own = image or {}
        begin = request.get("entrypoint") or own.get("Entrypoint") or []
        rest = [] if "entrypoint" in request else request["command"] or own.get("Cmd") or []
        request["entrypoint"] = ["/bin/sh", "-c", _EXPORT, f"{plan.secrets}/env", *begin, *rest]
        request["command"] = None
    if "uid" in plan.wall:
        request["user"], request["group_add"] = f"{plan.wall['uid']}:{plan.wall['gid']}", plan.wall["groups"]
    if plan.processes_per_rank:
        request["pids_limit"] = plan.processes_per_rank
    if plan.cpu_millicores_per_rank:
        request["nano_cpus"] = plan.cpu_millicores_per_rank * 1_000_000
    if plan.memory_bytes_per_rank:
        request["mem_limit"] = request["memswap_limit"] = plan.memory_bytes_per_rank
    if plan.gpu_uuids:
        visible = list(visible_devices(plan.gpu_uuids, plan.ranks.index(rank)))
        request["device_requests"] = [
            {
                "driver": "nvidia",
                "device_ids": visible,
                "capabilities": [["gpu"]],
            }
        ]
    return request


def _volumes(plan: LaunchPlan, environment: dict[str, str]) -> dict[str, dict[str, str]]:
    """Folders under the same path inside: the agent's socket, checkpoints, data, the working folder, error files.

    The socket's folder, not the socket: the next agent binds a new socket of the same name. Of the task's folder that of error
    files alone: its records say to the next agent what the task is, where its files are, and whether it has ended.
    """
    writable = [plan.working_directory]
    if errors := environment.get("TORCHELASTIC_ERROR_FILE"):
        writable.append(os.path.dirname(errors))
    if home := plan.wall.get("home"):
        writable.append(home)
    if (checkpoints := environment.get("WHALEFLUX_CHECKPOINT_LOCATION", "")) and os.path.isabs(checkpoints):
        writable.append(checkpoints)
    datasets = (path for name, path in environment.items() if name.startswith(_DATA))
    data = [path for path in datasets if os.path.isabs(path)]  # else a URL, where there was no room
    data += [plan.secrets] if plan.secrets else []
    if socket := environment.get("WHALEFLUX_AGENT_SOCKET"):  # to connect is not to write
        data.append(os.path.dirname(socket))
    mounts = {path: {"bind": path, "mode": "rw"} for path in writable}
    if shm := plan.wall.get("shm"):
        mounts[shm] = {"bind": "/dev/shm", "mode": "rw"}  # of this task alone, the same for its ranks
    return mounts | {path: {"bind": path, "mode": "ro"} for path in data}


def _both(limit: int) -> dict[str, int]:
    return {"soft": limit, "hard": limit}


def exit_code(status: int) -> int:
    """The engine says 128 + n for signal n; we say -n."""
    return 128 - status if 128 < status <= 128 + signal.NSIG else status


class DockerRuntime:
    """Starts and adopts containers. `client` is a docker.DockerClient; its calls block and run in threads.

    `puller` is another one, with more patience.
    """

    name = "docker"
    memory_limits = "kernel"
    limited_by = frozenset({"cpu", "memory", "pids"})

    def __init__(self, client: Any, puller: Any = None) -> None:
        self._client, self._puller = client, puller or client

    async def prepare(self, image: str) -> None:
        """Pulls the image when the engine does not have it."""
        try:
            await asyncio.to_thread(self._pull, image)
        except Exception as error:  # the SDK's errors have no common base that says so
            raise LaunchFailed(f"image {image!r} cannot be had: {error}") from None

    def _pull(self, image: str) -> None:
        import docker

        try:
            self._client.images.get(image)
        except docker.errors.ImageNotFound:
            self._puller.images.pull(image)

    async def start(self, plan: LaunchPlan) -> Running:
        if _attempt(plan).exists():
            raise LaunchFailed("this attempt was begun before; it is never begun a second time")
        await asyncio.to_thread(write, _attempt(plan), plan.token.encode())
        try:
            for rank in plan.ranks:
                await asyncio.to_thread(self._create_and_start, plan, rank)
        except Exception as error:
            started = DockerRunning(self._client, plan)
            if not await asyncio.to_thread(started.complete):
                raise LaunchFailed(_refusal(plan, error), left=started, unfit=_without_bash(plan, error)) from None
        return DockerRunning(self._client, plan, copying=True)

    def _create_and_start(self, plan: LaunchPlan, rank: RankPlan) -> None:
        """A call that times out may have been done all the same: the engine is asked before it counts as failed."""
        try:
            image = self._client.images.get(plan.image).attrs["Config"] if plan.secret_variables else None
            self._client.containers.create(**container_request(plan, rank, image)).start()
        except Exception:
            container = DockerRunning(self._client, plan).find().get(rank.rank)
            if container is None or container.status == _CREATED:
                raise

    async def adopt(self, plan: LaunchPlan) -> Running | None:
        return DockerRunning(self._client, plan, copying=True) if _attempt(plan).exists() else None


def _refusal(plan: LaunchPlan, error: Exception) -> str:
    if _without_bash(plan, error):
        return f"run is a bash script, and image {plan.image!r} has no bash: write run as a list of words, or use another image"
    if plan.secret_variables and '"/bin/sh"' in str(error):
        return f"image {plan.image!r} has no /bin/sh, which puts secrets into variables: take them as files, {{name: NAME, file: FILE}}"
    return f"the container engine refused: {error}"


def _without_bash(plan: LaunchPlan, error: Exception) -> bool:
    script = any(shell_text.script_of(rank.command) is not None for rank in plan.ranks)
    return script and '"bash": executable file not found' in str(error)


def _attempt(plan: LaunchPlan) -> Path:
    return plan.folder / "attempt.json"


class DockerRunning:
    """The containers of one task, found by its token at each look: what the engine has is what counts."""

    def __init__(self, client: Any, plan: LaunchPlan, *, copying: bool = False) -> None:
        self._client, self._plan = client, plan
        self._alive, self._ended_for = True, dict[int, str]()  # by rank: why the agent killed it
        for rank in plan.ranks if copying else ():
            threading.Thread(target=self._copy, args=(rank,), daemon=True).start()

    def find(self) -> dict[int, Any]:
        """The containers by rank. Raises what the SDK raises when the engine does not answer."""
        found = self._client.containers.list(all=True, filters={"label": f"{TOKEN_LABEL}={self._plan.token}"})
        return {int(container.labels[RANK_LABEL]): container for container in found}

    def complete(self) -> bool:
        """True when every rank's container was started; false when not, or while the engine does not answer."""
        try:
            found = self.find()
        except Exception:
            return False
        return all(rank.rank in found and found[rank.rank].status != _CREATED for rank in self._plan.ranks)

    def alive(self) -> bool:
        return self._alive

    async def exits(self) -> AsyncGenerator[RankExit, None]:
        waiting = {rank.rank for rank in self._plan.ranks}
        while waiting:
            for ended in await asyncio.to_thread(self._ends):
                if ended.rank in waiting:
                    self._alive = False
                    waiting.remove(ended.rank)
                    yield ended
            if waiting:
                await asyncio.sleep(_POLL_S)

    def _ends(self) -> list[RankExit]:
        """How containers ended, as far as the engine says; one that is not there, or was never started, ended unseen."""
        try:
            found = self.find()
        except Exception:
            return []
        ends = [_end(rank.rank, found.get(rank.rank)) for rank in self._plan.ranks]
        return [replace(end, why=self._ended_for.get(end.rank, "")) for end in ends if end is not None]

    async def end(self, rank: int, why: str) -> None:
        process = self._plan.ranks[self._plan.process_of(rank)].rank
        self._ended_for[process] = why
        await asyncio.to_thread(self._kill, process)

    def _kill(self, rank: int) -> None:
        with contextlib.suppress(Exception):  # it has ended, or the engine does not answer: the next look tries again
            self.find()[rank].kill(signal=signal.SIGKILL)

    async def signal(self, number: int) -> None:
        await asyncio.to_thread(self._signal, number)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(Exception):  # the engine does not answer: the next look tries again
            for container in self.find().values():
                if container.status == _CREATED and number == signal.SIGKILL:
                    _remove([container])  # a start that is still on its way finds nothing to start
                elif container.status not in _ENDED:
                    with contextlib.suppress(Exception):  # it has ended meanwhile
                        container.kill(signal=number)

    async def gone(self) -> bool:
        return not await self.remains()

    async def remains(self) -> tuple[str, ...]:
        return await asyncio.to_thread(self._remains)

    def _remains(self) -> tuple[str, ...]:
        try:
            found = self.find()
        except Exception as silence:
            return (f"the container engine does not say whether it runs: {silence}",)
        return tuple(f"container {c.name} is {c.status}" for c in found.values() if c.status not in _ENDED)

    async def release(self) -> None:
        await asyncio.to_thread(self._release)

    def _release(self) -> None:
        with contextlib.suppress(Exception):
            _remove(list(self.find().values()))

    def _copy(self, rank: RankPlan) -> None:
        """Copies the output of a rank until its container has ended; goes on after a restart of the engine."""
        newest = b""
        with open(rank.log, "wb", buffering=0, opener=opener) as log:
            while True:
                with contextlib.suppress(
                    Exception
                ):  # the engine was restarted, or does not answer, or the disk is full
                    container = self.find().get(rank.rank)
                    over = container is None or container.status in _ENDED
                    for stamp, text in _output(container, newest) if container else ():
                        log.write(text)
                        newest = stamp
                    if over:
                        return
                time.sleep(_RESUME_PAUSE_S)


def _end(rank: int, container: Any) -> RankExit | None:
    """How a container ended; None while it runs."""
    if container is None or container.status == _CREATED:
        return RankExit(rank, UNKNOWN_EXIT, known=False)
    if container.status not in _ENDED:
        return None
    state = container.attrs["State"]
    return RankExit(rank, exit_code(int(state["ExitCode"])), out_of_memory=bool(state.get("OOMKilled")))


def _output(container: Any, newest: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Pieces of output with their times, from the first that the engine has and that is newer than `newest`."""
    for piece in container.logs(stream=True, follow=True, timestamps=True):
        stamp, _, text = piece.partition(b" ")
        if stamp > newest:
            yield stamp, text


def _remove(containers: list[Any]) -> None:
    for container in containers:
        with contextlib.suppress(Exception):
            container.remove(force=True)


def open_docker() -> DockerRuntime | None:
    """The engine of this machine; None where there is none, or nobody may use it."""
    if not (os.environ.get("DOCKER_HOST") or _SOCKET.exists()):  # its client is 6 MB, which most agents do not need
        return None
    try:
        import docker

        client = docker.from_env(timeout=_ENGINE_TIMEOUT_S)
        client.ping()
        return DockerRuntime(client, docker.from_env(timeout=_PULL_TIMEOUT_S))
    except Exception:
        return None
