"""Which tasks of a job are on a node, without a look at all of them: each node of a large gang asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from whaleflux_scheduler.core.model import ACTIVE, Attempt, Job, Task

_FEW = 8  # tasks that are looked through faster than looked up
_Layout = tuple[int, int]  # epoch and number of tasks: which task is where in an attempt changes only with these


class TaskIndex:
    """Lives as long as its leadership."""

    def __init__(self) -> None:
        self._positions: dict[str, dict[_Layout, dict[str, tuple[int, ...]]]] = {}

    def keep(self, name: str, job: Job | None) -> None:
        """What is known of attempts that a job has no more is forgotten."""
        if (known := self._positions.get(name)) is None:
            return
        layouts = {(attempt.epoch, len(attempt.tasks)) for attempt in job.attempts()} if job is not None else set()
        left = {layout: positions for layout, positions in known.items() if layout in layouts}
        if left:
            self._positions[name] = left
        else:
            del self._positions[name]

    def tasks_on(self, name: str, attempt: Attempt, node: str) -> Iterator[Task]:
        """The attempt's tasks on the node, in rank order."""
        if len(attempt.tasks) <= _FEW:
            return (task for task in attempt.tasks if task.node == node)
        known = self._positions.setdefault(name, {})
        layout = attempt.epoch, len(attempt.tasks)
        if (positions := known.get(layout)) is None:
            positions = known[layout] = _by_node(attempt.tasks)
        return (attempt.tasks[at] for at in positions.get(node, ()))

    def desired_on(self, job: Job, node: str) -> Iterator[Task]:
        """The tasks of a job that should be on the node; those of one that cannot be read go on."""
        if job.attempt is not None and (job.state in ACTIVE or (not job.readable and job.attempt.end_time is None)):
            yield from (task for task in self.tasks_on(job.name, job.attempt, node) if not task.over)

    def holding_on(self, job: Job, node: str) -> Iterator[tuple[Attempt, Task]]:
        """Tasks of any attempt that hold GPUs on the node."""
        for attempt in job.attempts():
            for task in self.tasks_on(job.name, attempt, node):
                if task.holds:
                    yield attempt, task


def _by_node(tasks: Iterable[Task]) -> dict[str, tuple[int, ...]]:
    positions: dict[str, tuple[int, ...]] = {}
    for at, task in enumerate(tasks):
        positions[task.node] = (*positions.get(task.node, ()), at)
    return positions


def nodes_to_tell(old: Job | None, new: Job | None, all_nodes: frozenset[str]) -> Iterable[str]:
    """Nodes for which what they should run may differ after a change of a job; `all_nodes`: all that it concerns.

    A report of one node of a gang says nothing new to the agents of all others.
    """
    if old is None or new is None or _said_to_all(old) != _said_to_all(new):
        return all_nodes
    tasks = zip(_all_tasks(old), _all_tasks(new), strict=True)
    return {after.node for before, after in tasks if before is not after and _said(before) != _said(after)}


def _said_to_all(job: Job) -> object:
    """What every agent of the job is told, and which tasks there are."""
    attempt = job.attempt
    told = (attempt.started, attempt.rendezvous, attempt.traceparent, attempt.restore_checkpoint) if attempt else ()
    layouts = tuple((one.epoch, len(one.tasks)) for one in job.attempts())
    return job.uid, job.readable, job.state in ACTIVE, job.restarts, told, layouts


def _all_tasks(job: Job) -> Iterator[Task]:
    return (task for attempt in job.attempts() for task in attempt.tasks)


def _said(task: Task) -> object:
    return task.id, task.over, task.holds, task.phase
