"""From what is desired and what is there to what to do next. Pure, and safe to ask at any time and again.

The rules, in order of weight: an epoch below the highest ever accepted for its job never starts; a task starts only
when no process of an older epoch of its job and no holder of its GPUs is left on the node; what is not desired stops.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from whaleflux_agent.core.work import ActualTask, Stage, Work


@dataclass(frozen=True, slots=True)
class Accept:
    """Take the task on: persist its epoch, choose a rendezvous where that is ours, report ACCEPTED."""

    task: str


@dataclass(frozen=True, slots=True)
class Start:
    """Start its processes."""

    task: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End its processes (or drop it, when none were started); `reason` is for people."""

    task: str
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody wants its result any more."""

    task: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Never start it; `reason` is reported."""

    task: str
    reason: str


Action = Accept | Start | Stop | Forget | Refuse


def reconcile(
    desired: Mapping[str, Work],
    actual: Mapping[str, ActualTask],
    epochs: Mapping[str, int],
    *,
    fresh: bool,
    left_alone: Collection[str] = (),
) -> list[Action]:
    """What to do now. `epochs` holds the highest accepted epoch of each job.

    Of the jobs in `left_alone` nobody knows what is wanted: what is there stays as it is.

    `fresh` is false until the control plane has spoken to this process: what it wanted of an earlier one is kept
    running, but nothing new is begun on its word and no result is forgotten.
    """
    highest = _highest(desired.values(), epochs)
    actions: list[Action] = []
    for have in actual.values():
        if have.job in left_alone and have.task not in desired:
            continue
        actions += _end_or_forget(have, desired.get(have.task), highest.get(have.job, 0), fresh=fresh)
    stopped = {action.task for action in actions}
    soon = dict(actual)
    for want in desired.values() if fresh else ():
        if want.task not in stopped:
            for action in _next_step(want, soon, highest[want.job]):
                actions.append(action)
                if isinstance(action, Start):  # what starts in this round holds its GPUs against the rest of it
                    soon[want.task] = replace(soon[want.task], stage=Stage.LAUNCHING)
    return actions


def _highest(desired: Iterable[Work], epochs: Mapping[str, int]) -> dict[str, int]:
    highest = dict(epochs)
    for want in desired:
        highest[want.job] = max(want.epoch, highest.get(want.job, 0))
    return highest


def _end_or_forget(have: ActualTask, want: Work | None, highest: int, *, fresh: bool) -> list[Action]:
    """What to do about a task that is there."""
    old = have.epoch < highest
    if want is not None and not old:
        return []
    if have.stage in (Stage.ENDED, Stage.REFUSED):
        return [Forget(have.task)] if want is None and fresh else []
    if have.stage is Stage.STOPPING:
        return []
    return [Stop(have.task, f"epoch {have.epoch} is over, the job is in {highest}" if old else "no longer desired")]


def _next_step(want: Work, actual: Mapping[str, ActualTask], highest: int) -> list[Action]:
    """What brings a desired task one step further."""
    have = actual.get(want.task)
    if have is None:
        if want.epoch < highest:
            return [Refuse(want.task, f"epoch {want.epoch} is over, the job is in {highest}")]
        return [Accept(want.task)]
    ready = want.start and (want.rendezvous or want.group_rank == 0)
    if have.stage is Stage.ACCEPTED and ready and not blockers(want, actual.values()):
        return [Start(want.task)]
    return []


def blockers(want: Work, actual: Iterable[ActualTask]) -> list[str]:
    """Tasks whose processes must be gone before `want` may start: other attempts of its job, holders of its GPUs."""
    return [
        have.task
        for have in actual
        if have.task != want.task and have.stage.holds and (have.job == want.job or _in_the_way(want, have))
    ]


def _in_the_way(want: Work, have: ActualTask) -> bool:
    """Whether both want a GPU that they may not share; that shares fit beside one another is the scheduler's to see to."""
    return not (want.share_bytes and have.share_bytes) and not set(want.gpu_uuids).isdisjoint(have.gpu_uuids)


def rejection_reason(want: Work, gpus: Iterable[str], runtimes: Iterable[str]) -> str:
    """Why this node can never run `want`, "" when it can. `gpus` are the UUIDs of healthy GPUs, `runtimes` what is offered."""
    known = set(gpus)
    missing = [uuid for uuid in want.gpu_uuids if uuid not in known]
    if missing:
        return f"GPU {missing[0]} is not there or not healthy; this node has {', '.join(sorted(known)) or 'none'}"
    if len(set(want.gpu_uuids)) != len(want.gpu_uuids) or not want.ranks:
        return f"gpu_uuids {list(want.gpu_uuids)} must name each GPU once, and at least one unless it has ranks without"
    offered = set(runtimes)
    if not offered:
        return "this node only senses: its agent was started with --no-run"
    if want.spec.image and "docker" not in offered:
        return f"image {want.spec.image!r} needs a container engine, and this node has none"
    if not want.spec.image and not want.spec.command:
        return "neither a command nor an image is given"
    if min(want.ranks) < 0 or max(want.ranks) >= want.world_size:
        return f"ranks {min(want.ranks)} to {max(want.ranks)} do not fit into a world of {want.world_size}"
    if want.global_ranks and (
        len(want.global_ranks) != len(want.gpu_uuids) or list(want.ranks) != sorted(set(want.ranks))
    ):
        return f"global_ranks {list(want.global_ranks)} must name a rank of each of {len(want.gpu_uuids)} GPUs, each once and rising"
    return ""
