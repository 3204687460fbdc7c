"""What ends an attempt: exits, lost nodes, refusals, deadlines, drains. Pure."""

from __future__ import annotations

from datetime import datetime

from whaleflux_scheduler.core.model import Attempt, Job, JobState, Task, TaskPhase
from whaleflux_scheduler.core.observed import IN_ORDER, Break, End, Limits, Seen


def find(job: Job, seen: Seen, now: datetime, limits: Limits) -> Break | None:
    """The first reason for which the attempt of a STARTING or RUNNING job is over, strongest evidence first."""
    attempt = job.attempt
    assert attempt is not None
    return (
        _refused(attempt)
        or _exited(job, attempt)
        or _lost(attempt, seen)
        or _partitioned(job, attempt, seen, now, limits)
        or _late(job, attempt, now, limits)
        or _drained(attempt, seen)
    )


def partition_wait_s(job: Job, limits: Limits) -> float:
    given = job.spec.partition_wait_s
    return limits.partition_wait_s if given is None else given


def _refused(attempt: Attempt) -> Break | None:
    refused = [task for task in attempt.tasks if task.phase is TaskPhase.REFUSED]
    if not refused:
        return None
    task = refused[0]
    nodes = tuple(dict.fromkeys(t.node for t in refused))
    return Break(End.REFUSED, f"{task.node} refused: {task.message or 'no reason given'}", task.id, task.node, 0, nodes)


def _exited(job: Job, attempt: Attempt) -> Break | None:
    for task in attempt.tasks:
        if task.failed or (task.phase is TaskPhase.EXITED and job.spec.is_service):
            how = f"signal {-task.exit_code}" if task.exit_code < 0 else f"exit code {task.exit_code}"
            said = f": {task.message.strip().splitlines()[-1][:300]}" if task.message.strip() else ""
            return Break(End.EXIT, f"{_where(task)} ended with {how}{said}", task.id, task.node, task.exit_code)
    for task in attempt.tasks:
        if task.phase in (TaskPhase.KILLED, TaskPhase.GONE):
            said = f": {task.message[:300]}" if task.message else ""
            return Break(End.VANISHED, f"{_where(task)} is gone{said}", task.id, task.node, task.exit_code)
    return None


def _lost(attempt: Attempt, seen: Seen) -> Break | None:
    lost = [task for task in attempt.tasks if task.lost]
    if not lost:
        return None
    nodes = tuple(dict.fromkeys(task.node for task in lost))
    why = seen.nodes.get(nodes[0], IN_ORDER).unreachable
    return Break(End.LOST, f"{nodes[0]} is lost" + (f": {why}" if why else ""), lost[0].id, nodes[0], 0, nodes)


def _partitioned(job: Job, attempt: Attempt, seen: Seen, now: datetime, limits: Limits) -> Break | None:
    if job.spec.never_reroute:
        return None
    wait_s = partition_wait_s(job, limits)
    for task in attempt.tasks:
        since = seen.nodes.get(task.node, IN_ORDER).partitioned_since
        if since is not None and not task.over and (now - since).total_seconds() >= wait_s:
            site = task.node.split("/")[1]
            text = f"site {site} has been silent for more than {wait_s:g} s (on_partition.wait)"
            cut_off = tuple(n for n in attempt.nodes if seen.nodes.get(n, IN_ORDER).partitioned_since)
            return Break(End.PARTITION, text, task.id, task.node, 0, cut_off)
    return None


def _late(job: Job, attempt: Attempt, now: datetime, limits: Limits) -> Break | None:
    if job.state is not JobState.STARTING:
        return None
    waited_s = (now - attempt.allocate_time).total_seconds()
    silent = [task for task in attempt.tasks if task.phase < TaskPhase.ACCEPTED]
    if waited_s >= limits.accept_s and not attempt.started and silent:
        return _late_by(silent, f"did not accept within {limits.accept_s:g} s")
    slow = [task for task in attempt.tasks if task.phase < TaskPhase.RUNNING]
    fetching = any(task.phase in (TaskPhase.PULLING, TaskPhase.FETCHING) for task in slow)
    limit_s = limits.fetch_s if fetching else limits.start_s
    if waited_s >= limit_s and slow:
        return _late_by(slow, f"did not start within {limit_s:g} s")
    return None


def _late_by(tasks: list[Task], what: str) -> Break:
    nodes = tuple(dict.fromkeys(task.node for task in tasks))
    more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return Break(End.LATE, f"{nodes[0]}{more} {what}", tasks[0].id, nodes[0], 0, nodes)


def _drained(attempt: Attempt, seen: Seen) -> Break | None:
    for task in attempt.tasks:
        why = seen.nodes.get(task.node, IN_ORDER).draining
        if why and not task.over:
            return Break(End.DRAIN, f"drain: {task.node} is being drained ({why})", task.id, task.node, 0, (task.node,))
    return None


def _where(task: Task) -> str:
    last = task.first_rank + len(task.gpus) - 1
    ranks = f"rank {task.first_rank}" if last == task.first_rank else f"ranks {task.first_rank}-{last}"
    return f"{ranks} on {task.node}"
