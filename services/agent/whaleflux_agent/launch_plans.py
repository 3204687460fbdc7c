"""From a task to what a runtime starts: commands, environments, folders. Blocks: it makes folders and looks for programs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from whaleflux.checkpoint_storage import job_folder
from whaleflux.manifests.shell_text import script_of
from whaleflux_agent import node_setup
from whaleflux_agent.core.environment import LaunchContext, node_environment, rank_command, rank_environment
from whaleflux_agent.core.inherited import passed_on
from whaleflux_agent.core.work import Work
from whaleflux_agent.exit_text import error_path
from whaleflux_agent.runtime.api import LaunchFailed, LaunchPlan, RankPlan
from whaleflux_agent.task_folders import make_own

if TYPE_CHECKING:
    from whaleflux_agent.task_runner import NodeContext, Task


def plan_of(
    context: NodeContext, task: Task, datasets: tuple[tuple[str, str, str], ...] = (), *, adopting: bool = False
) -> LaunchPlan:
    """What the runtime starts; makes the folders that it needs. Blocks. Raises LaunchFailed unless `adopting`."""
    work = task.work
    if not work.rendezvous:
        work = replace(work, rendezvous=task.meta.rendezvous)
    launch = LaunchContext(
        node=context.node,
        token=task.meta.token,
        agent_socket=str(context.socket_of(task)),
        gpu_uuids=() if context.simulated else work.gpu_uuids,
        traceparent=task.meta.traceparent,
        ports=task.meta.ports,
        datasets=datasets,
        secrets_dir=str(context.secrets.folder(work.task) / "files") if work.spec.secrets else "",
    )
    if not adopting and task.meta.uid:
        _check_folders(context, task, work)
    work = replace(work, checkpoint_location=checkpoint_folder(work, context.checkpoint_root))
    ranks = tuple(_rank(context, task, work, launch, index) for index in range(len(work.processes)))
    share = len(work.ranks) // len(work.processes)  # what one process may use is for so many ranks
    if not adopting and not work.spec.image:
        _needs_bash(work, dict(ranks[0].environment))
    directory = "/" if adopting else _working_directory(context, task)
    if not adopting:
        _give(context, task, work, directory)
    return LaunchPlan(
        task=work.task,
        token=task.meta.token,
        folder=task.folder,
        ranks=ranks,
        working_directory=directory,
        image=work.spec.image,
        cpu_millicores_per_rank=share * work.spec.cpu_millicores_per_rank,
        memory_bytes_per_rank=share * work.spec.memory_bytes_per_rank,
        gpu_uuids=launch.gpu_uuids,
        secrets=str(context.secrets.folder(work.task)) if work.spec.secrets else "",
        secret_variables=tuple(use.variable for use in work.spec.secrets if use.as_text),
        wall=_wall(context, task, work, launch, "" if adopting else directory),
        processes_per_rank=context.isolation.processes,
    )


def _give(context: NodeContext, task: Task, work: Work, directory: str) -> None:
    """Gives the task's user what it is to write. Raises OSError."""
    shared = [] if work.spec.code or work.spec.working_directory else [Path(directory)]
    context.isolation.folders.own(task.meta, task.folder, [error_path(task.folder, 0).parent], shared)
    context.isolation.folders.own_checkpoints(task.meta, work.checkpoint_location)
    if not work.spec.image:
        return
    if home := context.isolation.container_home(task.meta):
        home.parent.mkdir(mode=0o700, exist_ok=True)
        make_own(home, task.meta)
    elif task.meta.tmp:
        context.isolation.folders.let_anybody_write(task.meta.tmp)


def _wall(context: NodeContext, task: Task, work: Work, launch: LaunchContext, directory: str) -> dict[str, Any]:
    """What its processes or containers give up. `directory` "": they run already."""
    if work.spec.image:
        return context.isolation.container_wall(task.meta)
    return context.isolation.wall(task.meta, _shown(context, task, work, launch, directory) if directory else {})


def _shown(context: NodeContext, task: Task, work: Work, launch: LaunchContext, directory: str) -> dict[str, str]:
    """What of the node is the task's own, by path: "rw" or "ro"."""
    own = [directory, str(error_path(task.folder, 0).parent), str(context.isolation.folders.home(task.meta))]
    if os.path.isdir(work.checkpoint_location):
        own.append(work.checkpoint_location)
    given = [
        os.path.dirname(launch.agent_socket),
        *(path for _, *paths in launch.datasets for path in paths if os.path.isabs(path)),
    ]
    if os.path.isdir(launch.secrets_dir):
        given.append(launch.secrets_dir)
    return dict.fromkeys(own, "rw") | dict.fromkeys(given, "ro")


def _check_folders(context: NodeContext, task: Task, work: Work) -> None:
    """Raises LaunchFailed for folders that the job names and its ranks would not see."""
    for field, path in (("directory", work.spec.working_directory), ("checkpoint.location", work.checkpoint_location)):
        if path:
            context.isolation.folders.check(task.meta, field, path)


def setup_plan_of(
    context: NodeContext, task: Task, datasets: tuple[tuple[str, str, str], ...] = (), *, adopting: bool = False
) -> LaunchPlan | None:
    """What runs before the ranks; None where the job has nothing for that. Blocks, and raises as `plan_of` does."""
    if not node_setup.wanted(task.work):
        return None
    once = replace(task.work, spec=replace(task.work.spec, launch_once=True))
    ranks = plan_of(context, replace(task, work=once), datasets, adopting=adopting)
    return node_setup.plan_of(task.work, ranks, dict(ranks.ranks[0].environment))


def _rank(context: NodeContext, task: Task, work: Work, launch: LaunchContext, index: int) -> RankPlan:
    rank = work.ranks[index]
    error_file = error_path(task.folder, rank)
    error_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    home = context.isolation.container_home(task.meta) if work.spec.image else None
    inherited = {"HOME": str(home)} if home else {}  # a container brings its own
    if not work.spec.image:
        inherited = context.isolation.folders.environment(task.meta, passed_on(os.environ, context.pass_environment))
    if work.spec.launch_once:
        environment = node_environment(work, launch, inherited=inherited, error_file=str(error_file))
    else:
        environment = rank_environment(work, launch, index, inherited=inherited, error_file=str(error_file))
    return RankPlan(rank, rank_command(work, launch, index), tuple(environment.items()), task.log(rank))


def _working_directory(context: NodeContext, task: Task) -> str:
    work = task.work
    if work.spec.code:
        return str(task.code_folder)
    if work.spec.working_directory:
        if not work.spec.image and not os.path.isdir(work.spec.working_directory):
            missing = f"directory {work.spec.working_directory!r} is not a folder on this node"
            raise LaunchFailed(
                f"{missing}; put it on storage that all nodes mount, or leave `directory` out", unfit=True
            )
        return work.spec.working_directory
    folder = context.state.root / "work" / quote(work.job, safe="")
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _needs_bash(work: Work, environment: Mapping[str, str]) -> None:
    """Raises LaunchFailed where a script is to be run and there is no bash."""
    scripts = [
        name
        for name in ("run", "setup")
        if script_of(work.spec.command if name == "run" else work.spec.setup) is not None
    ]
    if scripts and shutil.which("bash", path=environment.get("PATH", os.defpath)) is None:
        text = f"{' and '.join(scripts)} is a bash script, and this node has no bash on its agent's PATH; write a list of words, or install bash"
        raise LaunchFailed(text, unfit=True)


def checkpoint_folder(work: Work, root: str) -> str:
    """Where the job's checkpoints go: below what the job file says, else below the node's own root."""
    return job_folder(work.checkpoint_location or root, work.job, work.job_uid)
