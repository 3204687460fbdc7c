"""What ends an attempt: exits, lost nodes, refusals, deadlines, drains. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime

from whaleflux import names
from whaleflux.manifests.shell_text import meaning_of, signal_name
from whaleflux.quantities import shown_ranks
from whaleflux_scheduler.core.model import Attempt, Job, JobState, Task, TaskPhase
from whaleflux_scheduler.core.observed import IN_ORDER, AttemptFailure, EndReason, NodeCondition, Observations, Timeouts


def find(job: Job, observed: Observations, now: datetime, timeouts: Timeouts) -> AttemptFailure | None:
    """The first reason for which the attempt of a STARTING or RUNNING job is over, strongest evidence first."""
    attempt = job.attempt
    assert attempt is not None
    over = [task for task in attempt.tasks if task.over]  # few, mostly, of the many that a gang may have
    return (
        _refused(over)
        or _exited(job, over)
        or _lost(attempt, observed)
        or _partitioned(job, attempt, observed, now, timeouts)
        or _late(job, attempt, observed.since or attempt.allocate_time, now, timeouts)
        or _drained(attempt, observed)
    )


def partition_wait_s(job: Job, timeouts: Timeouts) -> float:
    given = job.spec.partition_wait_s
    return timeouts.partition_wait_s if given is None else given


def _refused(over: Sequence[Task]) -> AttemptFailure | None:
    refused = [task for task in over if task.phase is TaskPhase.REFUSED]
    if not refused:
        return None
    task = refused[0]
    nodes = tuple(dict.fromkeys(t.node for t in refused))
    reason = EndReason.UNFIT if any(task.unfit for task in refused) else EndReason.REFUSED
    return AttemptFailure(
        reason, f"{task.node} refused: {task.message or 'no reason given'}", task.id, task.node, 0, nodes
    )


def _exited(job: Job, over: Sequence[Task]) -> AttemptFailure | None:
    for task in over:
        if task.failed or (task.phase is TaskPhase.EXITED and job.spec.is_service):
            return AttemptFailure(EndReason.EXIT, _how_it_ended(task), task.id, task.node, task.exit_code)
    for task in over:
        if task.phase in (TaskPhase.KILLED, TaskPhase.GONE):
            said = f": {task.message[:300]}" if task.message else ""
            return AttemptFailure(
                EndReason.VANISHED, f"{_where(task)} is gone{said}", task.id, task.node, task.exit_code
            )
    return None


def _how_it_ended(task: Task) -> str:
    """Where and how, then the last words of its program. A setup's own first line says that it was one."""
    lines = task.message.strip().splitlines() or [""]
    code = task.exit_code
    how = signal_name(-code) if code < 0 else f"exit code {code}{meaning_of(code)}"
    head = lines[0] if lines[0].startswith("setup on ") else f"{_where(task)} ended with {how}"
    said = "" if lines[-1] == head or _HEAD.fullmatch(lines[-1]) else lines[-1][:300]
    return f"{head}: {said}" if said else head


# What an agent says where the program itself said nothing.
_HEAD = re.compile(r"rank \d+ (?:ended with exit code \d+.*|was ended by SIG[A-Z0-9]+)")


def _lost(attempt: Attempt, observed: Observations) -> AttemptFailure | None:
    lost = [task for task in attempt.tasks if task.lost and not task.over]  # how the others ended is known
    if not lost:
        return None
    nodes = tuple(dict.fromkeys(task.node for task in lost))
    why = observed.nodes.get(nodes[0], IN_ORDER).unreachable
    return AttemptFailure(
        EndReason.LOST, f"{nodes[0]} is lost" + (f": {why}" if why else ""), lost[0].id, nodes[0], 0, nodes
    )


def _partitioned(
    job: Job, attempt: Attempt, observed: Observations, now: datetime, timeouts: Timeouts
) -> AttemptFailure | None:
    if job.spec.never_reroute or not any(node.partitioned_since for node in _strange(observed)):
        return None
    wait_s = partition_wait_s(job, timeouts)
    for task in attempt.tasks:
        since = observed.nodes.get(task.node, IN_ORDER).partitioned_since
        if since is not None and not task.over and (now - since).total_seconds() >= wait_s:
            site = names.top(task.node)
            text = f"site {site} has been silent for more than {wait_s:g} s (on_partition.wait)"
            cut_off = tuple(n for n in attempt.nodes if observed.nodes.get(n, IN_ORDER).partitioned_since)
            return AttemptFailure(EndReason.PARTITION, text, task.id, task.node, 0, cut_off)
    return None


def _late(job: Job, attempt: Attempt, since: datetime, now: datetime, timeouts: Timeouts) -> AttemptFailure | None:
    """`since`: by the clock that `now` is read from. An earlier leader's may have been another, and its start deadline began anew."""
    if job.state is not JobState.STARTING:
        return None
    waited_s = (now - since).total_seconds()
    if waited_s >= timeouts.accept_s and not attempt.started:
        silent = [task for task in attempt.tasks if not task.phase.reached(TaskPhase.ACCEPTED)]
        if silent:
            return _late_by(silent, f"did not accept within {timeouts.accept_s:g} s")
    if waited_s < min(timeouts.fetch_s, timeouts.start_s):
        return None
    slow = [task for task in attempt.tasks if not task.phase.reached(TaskPhase.RUNNING)]
    preparing = any(task.phase in (TaskPhase.PULLING, TaskPhase.FETCHING, TaskPhase.SETTING_UP) for task in slow)
    limit_s = timeouts.fetch_s if preparing else timeouts.start_s
    if waited_s >= limit_s and slow:
        return _late_by(slow, f"did not start within {limit_s:g} s")
    return None


def _late_by(tasks: list[Task], what: str) -> AttemptFailure:
    nodes = tuple(dict.fromkeys(task.node for task in tasks))
    more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return AttemptFailure(EndReason.LATE, f"{nodes[0]}{more} {what}", tasks[0].id, nodes[0], 0, nodes)


def _drained(attempt: Attempt, observed: Observations) -> AttemptFailure | None:
    if not any(node.draining for node in _strange(observed)):
        return None
    for task in attempt.tasks:
        why = observed.nodes.get(task.node, IN_ORDER).draining
        if why and not task.over:
            return AttemptFailure(
                EndReason.DRAIN, f"{task.node} is being drained ({why})", task.id, task.node, 0, (task.node,)
            )
    return None


def _strange(observed: Observations) -> Iterator[NodeCondition]:
    """Conditions of nodes that are not in order."""
    return (node for node in observed.nodes.values() if node is not IN_ORDER)


def _where(task: Task) -> str:
    return f"rank{'s' * (task.ranks > 1)} {shown_ranks(task.all_ranks)} on {task.node}"


def ended_by(attempt: Attempt) -> EndReason | None:
    """The first word of its end_reason."""
    word = attempt.end_reason.partition(":")[0]
    return EndReason(word) if word in set(EndReason) else None
