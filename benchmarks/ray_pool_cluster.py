"""A Ray cluster as the pool's simulation has it: tasks that come, Ray's own choice of a node for each, and when nodes fall idle.

Ray is modelled here (its hybrid policy: nodes below half of their use first, in the order in which they joined, else the least used); what it asks for
is told as its GCS tells it, and who decides is the production code.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from whaleflux_scheduler.core.ray_demand import Demand, Shape, shape_of
from whaleflux_scheduler.core.ray_nodes import RayNode

HALF = 0.5  # of a node in use, from which on Ray takes the least used one


@dataclass(slots=True, eq=False)
class Task:
    """One task or actor: it comes at `at_s` and runs for `run_s`."""

    at_s: float
    run_s: float
    gpus: int
    start_s: float = -1.0
    lost: int = 0  # times that its node went while it ran

    @property
    def delay_s(self) -> float:
        return self.start_s - self.at_s

    @property
    def resources(self) -> dict[str, float]:
        return {"GPU": float(self.gpus), "CPU": float(self.gpus)}

    @property
    def shape(self) -> Shape:
        return shape_of(self.resources)


@dataclass(slots=True, eq=False)
class Node:
    """A worker that has joined."""

    job: str
    total: dict[str, float]
    idle_s: float  # since when nothing runs on it
    running: dict[Task, float] = field(default_factory=dict)  # with when each ends

    @property
    def gpus(self) -> int:
        return int(self.total["GPU"])

    @property
    def free(self) -> int:
        return self.gpus - sum(task.gpus for task in self.running)

    @property
    def use(self) -> float:
        """As Ray's policy scores it; smaller is better."""
        used = 1 - self.free / self.gpus if self.gpus else 1.0
        return 0.0 if used < HALF else used


class Cluster:
    """Tasks in the order in which they come."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._to_come, self.waiting, self.nodes = deque(tasks), list[Task](), dict[str, Node]()
        self.done: list[Task] = []

    def run_until(self, now_s: float) -> None:
        """What comes and ends until then, each at its own second."""
        while True:
            comes_s = self._to_come[0].at_s if self._to_come else float("inf")
            ends = min(((end_s, node, task) for node in self.nodes.values() for task, end_s in node.running.items()),
                       key=lambda one: one[0], default=None)  # fmt: skip
            at_s = min(comes_s, ends[0] if ends else float("inf"))
            if at_s > now_s:
                return
            if ends and ends[0] <= comes_s:
                self._ended(*ends)
            else:
                self.waiting.append(self._to_come.popleft())
            self.lay(at_s)

    def _ended(self, at_s: float, node: Node, task: Task) -> None:
        del node.running[task]
        self.done.append(task)
        if not node.running:
            node.idle_s = at_s

    def lay(self, at_s: float) -> None:
        """Starts what finds room now, in the order in which it came."""
        left = list[Task]()
        for task in self.waiting:
            fits = [node for node in self.nodes.values() if node.free >= task.gpus]
            if not fits:
                left.append(task)
                continue
            task.start_s = at_s
            min(fits, key=lambda node: node.use).running[task] = at_s + task.run_s
        self.waiting = left

    def join(self, job: str, total: dict[str, float], at_s: float) -> None:
        self.nodes[job] = Node(job, total, at_s)
        self.lay(at_s)

    def lose(self, job: str) -> None:
        """The worker is gone: what ran on it begins anew."""
        node = self.nodes.pop(job)
        for task in node.running:
            task.lost += 1
            self.waiting.append(task)

    def demand(self, before_s: float) -> Demand:
        """What waits and came before then, by shape, as Ray tells it."""
        counts = Counter(task.gpus for task in self.waiting if task.at_s <= before_s)
        return Demand(tuple((Task(0, 0, gpus).shape, n) for gpus, n in sorted(counts.items())))

    def states(self) -> tuple[RayNode, ...]:
        """Its nodes, as Ray tells them."""
        return tuple(_state(node) for node in self.nodes.values())

    @property
    def busy_gpus(self) -> int:
        return sum(node.gpus - node.free for node in self.nodes.values())

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes.values())


def _state(node: Node) -> RayNode:
    per_gpu = node.total.get("gpu_memory", 0.0) / max(1, node.gpus)
    busy = node.gpus - node.free
    free = dict(node.total) | {
        "GPU": float(node.free),
        "CPU": node.total["CPU"] - busy,
        "gpu_memory": node.free * per_gpu,
    }
    return RayNode(node.job, node.total, free, {}, "RUNNING" if node.running else "IDLE")


def delays(tasks: Iterable[Task]) -> list[float]:
    """Sorted, of those that have started."""
    return sorted(task.delay_s for task in tasks if task.start_s >= 0)
