"""Tasks as containers: one per rank, found again by a label with the task's token.

The engine keeps containers and exit codes while the agent is away; their output is copied into the same log files
that process tasks write themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from whaleflux_agent.runtime.api import UNKNOWN_EXIT, LaunchFailed, LaunchPlan, RankExit, RankPlan, Running

TOKEN_LABEL, TASK_LABEL, RANK_LABEL = "dev.whaleflux.token", "dev.whaleflux.task", "dev.whaleflux.rank"
_POLL_S = 0.25
_ENGINE_TIMEOUT_S = 10
_LOG_FILE = {"max-size": "64m", "max-file": "1"}
_ENDED = frozenset({"exited", "dead", "removing"})


def container_request(plan: LaunchPlan, rank: RankPlan) -> dict[str, Any]:
    """What the engine is asked for: the keyword arguments of `containers.create`. Pure."""
    environment = dict(rank.environment)
    request: dict[str, Any] = {
        "image": plan.image,
        "command": list(rank.command) or None,  # None: the image's own
        "name": f"whaleflux-{plan.task}-{rank.rank}",
        "environment": environment,
        "labels": {TOKEN_LABEL: plan.token, TASK_LABEL: plan.task, RANK_LABEL: str(rank.rank)},
        "network_mode": "host",  # ranks meet under the host's address
        "ipc_mode": "host",  # NCCL between the ranks of a node uses shared memory
        "volumes": _volumes(plan, environment),
        "working_dir": plan.working_directory,
        "init": True,  # reaps what ranks leave behind
        "detach": True,
        "log_config": {"Type": "json-file", "Config": _LOG_FILE},
        "oom_score_adj": 500,
    }
    if plan.cpu_millicores_per_rank:
        request["nano_cpus"] = plan.cpu_millicores_per_rank * 1_000_000
    if plan.memory_bytes_per_rank:
        request["mem_limit"] = request["memswap_limit"] = plan.memory_bytes_per_rank
    if plan.gpu_uuids:
        request["device_requests"] = [
            {"driver": "nvidia", "device_ids": list(plan.gpu_uuids), "capabilities": [["gpu"]]}
        ]
    return request


def _volumes(plan: LaunchPlan, environment: dict[str, str]) -> dict[str, dict[str, str]]:
    """Folders under the same path inside: the agent's socket, checkpoints, data, the working folder, error files."""
    writable = [plan.working_directory, str(plan.folder)]
    if socket := environment.get("WHALEFLUX_AGENT_SOCKET"):
        writable.append(socket)
    if (checkpoints := environment.get("WHALEFLUX_CHECKPOINT_LOCATION", "")) and os.path.isabs(checkpoints):
        writable.append(checkpoints)
    data = [path for name, path in environment.items() if name.startswith("WHALEFLUX_DATASET_")]
    mounts = {path: {"bind": path, "mode": "rw"} for path in writable}
    return mounts | {path: {"bind": path, "mode": "ro"} for path in data}


def exit_code(status: int) -> int:
    """The engine says 128 + n for signal n; we say -n."""
    return 128 - status if 128 < status <= 128 + signal.NSIG else status


class DockerRuntime:
    """Starts and adopts containers. `client` is a docker.DockerClient; its calls block and run in threads."""

    name = "docker"

    def __init__(self, client: Any) -> None:
        self._client = client

    async def prepare(self, plan: LaunchPlan) -> None:
        """Pulls the image when the engine does not have it."""
        try:
            await asyncio.to_thread(self._pull, plan.image)
        except Exception as error:  # the SDK's errors have no common base that says so
            raise LaunchFailed(f"image {plan.image!r} cannot be had: {error}") from None

    def _pull(self, image: str) -> None:
        import docker

        try:
            self._client.images.get(image)
        except docker.errors.ImageNotFound:
            self._client.images.pull(image)

    async def start(self, plan: LaunchPlan) -> Running:
        containers: list[Any] = []
        try:
            for rank in plan.ranks:
                request = container_request(plan, rank)
                containers.append(await asyncio.to_thread(self._client.containers.create, **request))
            for container in containers:
                await asyncio.to_thread(container.start)
        except Exception as error:
            await asyncio.to_thread(_remove, containers)
            raise LaunchFailed(f"the container engine refused: {error}") from None
        return DockerRunning(self._client, plan, containers)

    async def adopt(self, plan: LaunchPlan) -> Running | None:
        containers = await asyncio.to_thread(self._find, plan.token)
        if len(containers) < len(plan.ranks) or any(c.status == "created" for c in containers):
            await asyncio.to_thread(_remove, containers)  # an agent died in the middle of a start
            return None
        return DockerRunning(self._client, plan, containers)

    def _find(self, token: str) -> list[Any]:
        found = self._client.containers.list(all=True, filters={"label": f"{TOKEN_LABEL}={token}"})
        return sorted(found, key=lambda container: int(container.labels[RANK_LABEL]))


class DockerRunning:
    """The containers of one task, in rank order."""

    def __init__(self, client: Any, plan: LaunchPlan, containers: list[Any]) -> None:
        self._client, self._plan, self._containers = client, plan, containers
        self._alive = True
        for rank, container in zip(plan.ranks, containers, strict=True):
            threading.Thread(target=_copy_output, args=(container, rank.log), daemon=True).start()

    def alive(self) -> bool:
        return self._alive

    async def exits(self) -> AsyncGenerator[RankExit, None]:
        waiting = dict(zip(self._plan.ranks, self._containers, strict=True))
        while waiting:
            for rank, container in list(waiting.items()):
                ended = await asyncio.to_thread(_ended, rank.rank, container)
                if ended is not None:
                    self._alive = False
                    del waiting[rank]
                    yield ended
            if waiting:
                await asyncio.sleep(_POLL_S)

    async def signal(self, number: int) -> None:
        for container in self._containers:
            with contextlib.suppress(Exception):  # it has ended
                await asyncio.to_thread(container.kill, signal=number)

    async def gone(self) -> bool:
        for container in self._containers:
            if await asyncio.to_thread(_ended, 0, container) is None:
                return False
        return True

    async def release(self) -> None:
        await asyncio.to_thread(_remove, self._containers)


def _ended(rank: int, container: Any) -> RankExit | None:
    """How a container ended; None while it runs, or while the engine does not answer."""
    import docker

    try:
        container.reload()
    except docker.errors.NotFound:
        return RankExit(rank, UNKNOWN_EXIT, known=False)
    except Exception:
        return None
    if container.status not in _ENDED:
        return None
    state = container.attrs["State"]
    return RankExit(rank, exit_code(int(state["ExitCode"])), out_of_memory=bool(state.get("OOMKilled")))


def _copy_output(container: Any, log: Path) -> None:
    """From the first line that the engine has, so that nothing is missed after a restart of the agent."""
    with contextlib.suppress(Exception), open(log, "wb", buffering=0) as file:
        for chunk in container.logs(stream=True, follow=True):
            file.write(chunk)


def _remove(containers: list[Any]) -> None:
    for container in containers:
        with contextlib.suppress(Exception):
            container.remove(force=True)


def open_docker() -> DockerRuntime | None:
    """The engine of this machine; None where there is none, or nobody may use it."""
    try:
        import docker

        client = docker.from_env(timeout=_ENGINE_TIMEOUT_S)
        client.ping()
    except Exception:
        return None
    return DockerRuntime(client)
