"""The job with what was observed of its tasks and nodes, before anything is concluded. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from whaleflux_scheduler.core.model import Attempt, Job, Task, TaskPhase
from whaleflux_scheduler.core.observed import IN_ORDER, NodeCondition, Observations, Report

REPORTED_TASKS = 40  # of a larger attempt the messages of so many tasks are kept


def observe(job: Job, observed: Observations) -> Job:
    """The same object when nothing changes."""
    return _with_nodes(_with_reports(job, observed.reports), observed.nodes)


def _with_reports(job: Job, reports: Sequence[Report]) -> Job:
    """Phases only grow, and what is over stays as it ended; until nothing is left (GONE) it may turn out to be stuck.

    Only the agent of a task's own node speaks for it, whatever was known when the report came.
    """
    if not reports:
        return job
    by_task: dict[tuple[str, str], Report] = {}
    for report in reports:
        known = by_task.get((report.task, report.node))
        if known is None or report.phase.reached(known.phase):
            by_task[report.task, report.node] = report
    past = tuple(_reported(attempt, by_task) for attempt in job.past_attempts)
    current = job.attempt and _with_rendezvous(_reported(job.attempt, by_task), reports)
    if current is job.attempt and all(a is b for a, b in zip(past, job.past_attempts, strict=True)):
        return job
    return replace(job, attempt=current, past_attempts=past)


def _reported(attempt: Attempt, by_task: Mapping[tuple[str, str], Report]) -> Attempt:
    """Only tasks that were reported of are looked at: of a large gang some nodes report at a time."""
    changed = {at: after for at, after in _tasks_after(attempt.tasks, by_task) if after is not attempt.tasks[at]}
    if not changed:
        return attempt
    tasks = list(attempt.tasks)
    for at, after in changed.items():
        tasks[at] = after
    if len(tasks) > REPORTED_TASKS:
        tasks = list(_without_most_messages(tasks))
    return replace(attempt, tasks=tuple(tasks))


def _tasks_after(tasks: Sequence[Task], by_task: Mapping[tuple[str, str], Report]) -> Iterator[tuple[int, Task]]:
    """Each task that was reported of, with its position: after what its agent said, and then after what was concluded."""
    reported = {task for task, _ in by_task}
    for at in _positions(tasks, reported):
        task = tasks[at]
        said = _task_after(task, by_task.get((task.id, task.node)))
        yield at, _task_after(said, by_task.get((task.id, "")))


def _positions(tasks: Sequence[Task], ids: Collection[str]) -> Iterable[int]:
    """Where the tasks of these ids are. An id ends with its position; of a past attempt only some tasks may be kept."""
    guessed = {int(last) for id_ in ids if (last := id_.rpartition(".")[2]).isdecimal() and len(last) < 7}
    found = [at for at in guessed if at < len(tasks) and tasks[at].id in ids]
    if len(found) == len(ids):
        return found
    return (at for at, task in enumerate(tasks) if task.id in ids)


def _without_most_messages(tasks: Sequence[Task]) -> Iterator[Task]:
    """Of a large gang the words of some tasks are enough; those of all would not fit into one record."""
    reported = 0
    for task in tasks:
        reported += bool(task.message)
        yield replace(task, message="") if task.message and reported > REPORTED_TASKS else task


def _with_rendezvous(attempt: Attempt, reports: Sequence[Report]) -> Attempt:
    """The newest rendezvous that the agent of rank 0 chose; it may choose again until the gang was reported to start."""
    first = attempt.tasks[0]
    chosen = [report.rendezvous for report in reports if report.rendezvous and _concerns(report, first)]
    return attempt if attempt.started or not chosen else replace(attempt, rendezvous=chosen[-1])


def _concerns(report: Report, task: Task) -> bool:
    return report.task == task.id and report.node in ("", task.node)


def _task_after(task: Task, report: Report | None) -> Task:
    if report is None or not report.phase.reached(task.phase):
        return task
    if task.over and report.phase is task.phase:
        left = report.ending or bool(report.stuck)
        after = replace(task, stuck=report.stuck, ending=report.ending, lost=task.lost and left)
    elif task.over and report.phase is not TaskPhase.GONE:
        return task
    elif task.over:  # nothing of it is left; how it ended stays known
        after = replace(task, lost=False, stuck="", ending=False)
    else:
        message = ("out of memory; " if report.out_of_memory else "") + report.message
        after = replace(
            task,
            phase=report.phase,
            exit_code=report.exit_code,
            message=message[:2000],
            endpoint=report.endpoint or task.endpoint,
            isolation=report.isolation or task.isolation,
            lost=False if report.phase.reached(TaskPhase.EXITED) else task.lost,
            stuck=report.stuck,
            ending=report.ending,
            unfit=report.unfit,
        )
    return task if after == task else after


def _with_nodes(job: Job, nodes: Mapping[str, NodeCondition]) -> Job:
    """Marks tasks on unreachable nodes as lost, withdraws that when the node is back, and forgets those of retired nodes."""
    past = tuple(_with_conditions(attempt, nodes) for attempt in job.past_attempts)
    current = job.attempt and _with_conditions(job.attempt, nodes)
    if current is job.attempt and all(a is b for a, b in zip(past, job.past_attempts, strict=True)):
        return job
    return replace(job, attempt=current, past_attempts=past)


def _with_conditions(attempt: Attempt, nodes: Mapping[str, NodeCondition]) -> Attempt:
    in_order = not any(node.unreachable or node.retired for node in nodes.values() if node is not IN_ORDER)
    if in_order and not any(task.lost for task in attempt.tasks):
        return attempt  # as nearly always
    tasks = tuple(_task_on(task, nodes.get(task.node)) for task in attempt.tasks)
    return attempt if all(a is b for a, b in zip(tasks, attempt.tasks, strict=True)) else replace(attempt, tasks=tasks)


def _task_on(task: Task, node: NodeCondition | None) -> Task:
    if node is None or not task.holds:
        return task
    if node.retired:
        phase = task.phase if task.over else TaskPhase.GONE  # how it ended is known, and stays so when its node goes
        message = task.message or "its node was retired"
        return replace(task, phase=phase, message=message, lost=False, stuck="", ending=False)
    lost = bool(node.unreachable)  # also of what is over, while something of it is left there
    return task if lost == task.lost else replace(task, lost=lost)
