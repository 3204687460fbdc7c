"""The first half of the demo: a training job, the loss of one of its nodes, and what came of it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whaleflux import names
from whaleflux.demo.fleet import DemoFleet
from whaleflux.errors import FailedPrecondition, Unavailable
from whaleflux.sdk.client import ENDED, AsyncClient
from whaleflux.v1 import checkpoint_pb2, health_pb2, scheduler_pb2

Say = Callable[[str], None]
_LOSS_LINE = re.compile(rb"^step (\d+) loss ([0-9.]+)", re.MULTILINE)
_START_LINE = re.compile(rb"^start at step (\d+)", re.MULTILINE)


@dataclass(slots=True)
class Failure:
    """What was killed and when, and when each consequence was seen; seconds after the kill."""

    node: str
    pids: int
    at: float
    step: int = -1
    committed_step: int = 0
    suspect_s: float = -1.0
    fenced_s: float = -1.0
    replaced_s: float = -1.0
    running_s: float = -1.0
    first_step_s: float = -1.0
    resumed_step: int = -1


@dataclass(slots=True)
class Watched:
    """What a user sees of a job while it runs."""

    job: scheduler_pb2.Job
    losses: list[tuple[int, float]] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


async def submit(client: AsyncClient, spec: scheduler_pb2.JobSpec, job_id: str, say: Say) -> scheduler_pb2.Job:
    """Plan, then apply: says where the job would go and why, and submits it."""
    request = scheduler_pb2.CreateJobRequest(
        parent=names.DEFAULT_QUEUE, job_id=job_id, job=scheduler_pb2.Job(spec=spec), validate_only=True
    )
    planned = await client.scheduler.CreateJob(request, timeout=20)
    say(f"PLAN  {planned.decision.summary}")
    for reason in planned.decision.reasons[:4]:
        say(f"      why here: {reason}")
    for other in planned.decision.alternatives[:2]:
        say(f"      next best: {other.summary}")
    request.validate_only = False
    job: scheduler_pb2.Job = await client.scheduler.CreateJob(request, timeout=20)
    return job


async def watch_logs(client: AsyncClient, watched: Watched, say: Say) -> None:
    """Follows rank 0's log for ever, over attempts and restarts of the control plane; each loss is said once."""
    request = scheduler_pb2.StreamLogsRequest(name=watched.job.name, rank=0, follow=True)
    while watched.job.state not in ENDED:
        buffer, epoch = b"", 0
        try:
            async with client.scheduler.StreamLogs(request) as stream:
                async for chunk in stream:
                    if chunk.epoch != epoch:
                        buffer, epoch = b"", chunk.epoch
                    buffer += chunk.data
                    whole, _, buffer = buffer.rpartition(b"\n")
                    _take(whole + b"\n", watched, say)
        except Unavailable:
            pass
        await asyncio.sleep(0.2)


def _take(text: bytes, watched: Watched, say: Say) -> None:
    for start in _START_LINE.finditer(text):
        if (step := int(start[1])) not in watched.starts:
            watched.starts.append(step)
            say(f"      training {'starts' if step == 0 else f'goes on at step {step}, from its checkpoint'}")
    for line in _LOSS_LINE.finditer(text):
        step, loss = int(line[1]), float(line[2])
        if (step, loss) in watched.losses:
            continue
        watched.losses.append((step, loss))
        if step % 50 == 0:
            say(f"      step {step:4d}  loss {loss:.3f}")


async def until(condition: Callable[[], Any], what: str, timeout_s: float, every_s: float = 0.05) -> None:
    """Waits for a condition; refuses after `timeout_s`, saying what never came."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(every_s)
    except TimeoutError:
        raise Unavailable(f"waited {timeout_s:g} s in vain for {what}; logs are under the state folder") from None


async def follow(client: AsyncClient, watched: Watched) -> None:
    """Keeps `watched.job` current."""
    async for job in client.follow_job(watched.job.name):
        watched.job = job


async def newest_committed(client: AsyncClient, job: str) -> int:
    """Steps that are safe; 0 when nothing was committed."""
    listed = await client.checkpoint.ListCheckpoints(checkpoint_pb2.ListCheckpointsRequest(parent=job), timeout=10)
    good = (checkpoint_pb2.CHECKPOINT_STATE_COMMITTED, checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED)
    return max((c.step for c in listed.checkpoints if c.state in good), default=0)


async def lose_a_node(client: AsyncClient, fleet: DemoFleet, watched: Watched, say: Say) -> Failure:
    """SIGKILLs the agent and all ranks of the job's second node, and times what follows."""
    victim = watched.job.attempt.tasks[-1].node
    live = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=watched.job.name), timeout=10)
    safe = await newest_committed(client, watched.job.name)
    epoch = watched.job.epoch
    killed_at = time.time()
    pids = fleet.kill_node(victim)
    failure = Failure(victim, len(pids), killed_at, step=live.step, committed_step=safe)
    say(f"KILL  {victim}: SIGKILL to its agent and its ranks ({len(pids)} processes) at step {live.step}")
    async with asyncio.TaskGroup() as group:
        group.create_task(_time_health(client, failure, say))
        group.create_task(_time_job(watched, failure, epoch, say))
    return failure


async def _time_health(client: AsyncClient, failure: Failure, say: Say) -> None:
    """When the node became SUSPECT and UNREACHABLE, as health_monitor dates it (the same machine's clock)."""
    seen: dict[int, float] = {}
    async with asyncio.timeout(60):
        while health_pb2.NODE_PHASE_UNREACHABLE not in seen:
            node = await client.health.GetNodeHealth(health_pb2.GetNodeHealthRequest(name=failure.node), timeout=5)
            if node.phase not in seen and node.phase != health_pb2.NODE_PHASE_READY:
                seen[node.phase] = max(0.0, _utc(node.transition_time) - failure.at)
                name = health_pb2.NodePhase.Name(node.phase).removeprefix("NODE_PHASE_")
                say(f"      +{seen[node.phase]:.2f} s  {failure.node} is {name}: {node.message or node.reason}")
            await asyncio.sleep(0.02)
    fenced = seen[health_pb2.NODE_PHASE_UNREACHABLE]
    failure.fenced_s, failure.suspect_s = fenced, seen.get(health_pb2.NODE_PHASE_SUSPECT, fenced)


def _utc(stamp: Any) -> float:
    return float(stamp.seconds + stamp.nanos / 1e9)


async def _time_job(watched: Watched, failure: Failure, epoch: int, say: Say) -> None:
    """When the next attempt had its GPUs, ran, and made its first step."""

    def since() -> float:
        return time.time() - failure.at

    await until(
        lambda: watched.job.epoch > epoch and watched.job.attempt.epoch > epoch and watched.job.attempt.tasks,
        "the next attempt",
        60,
    )
    failure.replaced_s = since()
    nodes = ", ".join(task.node for task in watched.job.attempt.tasks)
    say(f"      +{failure.replaced_s:.2f} s  placed again as attempt {watched.job.attempt.number}: {nodes}")
    for reason in watched.job.decision.reasons[:2]:
        say(f"               why here: {reason}")
    await until(lambda: watched.job.state == scheduler_pb2.JOB_STATE_RUNNING, "the job to run again", 60)
    failure.running_s = since()
    say(f"      +{failure.running_s:.2f} s  all ranks run")
    await until(lambda: _resumed(watched), "the first step after it", 60)
    failure.first_step_s, failure.resumed_step = since(), watched.starts[-1]
    say(f"      +{failure.first_step_s:.2f} s  first step after it")


def _resumed(watched: Watched) -> bool:
    return len(watched.starts) > 1 and watched.starts[-1] > 0 and watched.losses[-1][0] >= watched.starts[-1]


def result_of(folder: Path) -> dict[str, Any]:
    """What the training wrote at its end: steps, loss, digest of its parameters and moments."""
    file = folder / "result.json"
    if not file.exists():
        raise FailedPrecondition(f"{file} is missing: the training did not write its result; see the job's log")
    content: dict[str, Any] = json.loads(file.read_text())
    return content
