"""What is simulated: jobs with the run time that nobody but the simulation knows, and how long things take around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core.model import Job, Queue
from whaleflux_scheduler.core.reservations import Reservation


@dataclass(frozen=True, slots=True)
class Submission:
    """One job: submitted at `at_s`, done when it has run for `run_s` seconds on the GPUs that its spec asks for.

    `speed` says how much faster it runs on other numbers of GPUs (elastic jobs): work per second, by GPUs, 1.0 for those of its spec;
    without it, work is in proportion to the GPUs. `speed_on` says it by GPU type, too. `restart_s`: what loading its checkpoint costs it, instead of the workload's delay.
    """

    name: str  # queues/{queue}/jobs/{job}
    spec: Spec
    at_s: float
    run_s: float
    submitter: str = ""
    speed: Callable[[int], float] | None = None
    restart_s: float | None = None
    speed_on: Callable[[int, str], float] | None = None
    is_ray_worker: bool = False

    def rate(self, gpus: int, model: str = "") -> float:
        """Work per second on that many GPUs of the type."""
        if self.speed_on is not None:
            return self.speed_on(gpus, model)
        asked = self.spec.gpus
        if gpus == asked or not asked:
            return 1.0
        return self.speed(gpus) if self.speed else gpus / asked


@dataclass(frozen=True, slots=True)
class Delays:
    """How long it takes what a real fleet does beside computing, seconds.

    `start_s`: from its place to its first step, each attempt. `save_s`: the checkpoint before it leaves its GPUs; one that takes longer than
    the job's grace is lost. `checkpoint_every_s`: what is lost at most with a node. `restart_s`: of an attempt's time, what loading the
    checkpoint costs. `recover_s`: from the loss of a node to the decision where to go on. `round_s`: the scheduler decides at these
    multiples; 0: whenever something happens.
    """

    start_s: float = 0.0
    save_s: float = 30.0
    checkpoint_every_s: float = 1800.0
    restart_s: float = 60.0
    recover_s: float = 5.0
    round_s: float = 0.0


NO_DELAYS = Delays()


@dataclass(frozen=True, slots=True)
class NodeEvent:
    """From `at_s` on the nodes take no work: they are lost with what runs there ("down") or are emptied first ("drain"); "up" ends it."""

    at_s: float
    what: str
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Jobs in the order of their submission. `jobs` may be a generator: it is read as time goes on, once."""

    jobs: Iterable[Submission]
    queues: dict[str, Queue] = field(default_factory=dict)  # by id; those that jobs name beside them exist, too
    delays: Delays = NO_DELAYS
    running: tuple[
        tuple[Job, Submission], ...
    ] = ()  # that run from the beginning, for as long as their submissions say
    reservations: tuple[Reservation, ...] = ()  # with the GPUs that they keep

    def in_order(self) -> Iterator[Submission]:
        """Each job. Raises ValueError for one that comes before its predecessor."""
        last_s = 0.0
        for job in self.jobs:
            if job.at_s < last_s:
                raise ValueError(
                    f"{job.name} is submitted at {job.at_s:g} s, after one of {last_s:g} s; sort jobs by at_s"
                )
            last_s = job.at_s
            yield job
