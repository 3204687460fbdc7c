"""Which data a job has on which nodes: of those where it runs, and of those that are kept for it, where it is pulled before the job starts.

A claim whose nodes change again and again does not have data pulled to each of them: after some moves it is pulled when the job is placed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from whaleflux import names
from whaleflux_scheduler.core.data_quota import DataLimit, over
from whaleflux_scheduler.core.model import ACTIVE, Claim, Job
from whaleflux_scheduler.core.placement.engine import Engine
from whaleflux_scheduler.core.placement.pin_book import Copy, part_of
from whaleflux_scheduler.core.queue_shares import QueueShares

MOST_MOVES = 3  # of the nodes that pull one job's data ahead


def datasets_of(job: Job) -> tuple[str, ...]:
    """datasets/{dataset}, each once."""
    return tuple(dict.fromkeys(names.dataset(name) for name in job.spec.datasets))


def copies_of(
    job: Job, nodes: Mapping[str, Collection[str]], claim: Claim | None, remote: Collection[str] | None
) -> list[Copy]:
    """What is to be on the nodes that it holds, and on those that it claims. `remote` None: as its attempt says.

    `nodes`: by name, what each of its ranks there has. Of data that its ranks divide a node has their part.
    """
    if not job.spec.datasets:
        return []
    if remote is None:
        remote = job.attempt.remote_datasets if job.attempt is not None else ()
    here = [name for name in datasets_of(job) if name not in remote]
    ahead = [(node, name) for node, _ in claim.nodes for name in claim.datasets] if claim is not None else []
    ranks = {node: len(places) for node, places in nodes.items()}
    return [copy for name in here for copy in _copies(job, name, ranks)] + ahead


def _copies(job: Job, dataset: str, ranks: Mapping[str, int]) -> list[Copy]:
    """What nodes with so many ranks of the job have of a dataset."""
    if dataset not in map(names.dataset, job.spec.datasets_by_rank):
        return [(node, dataset) for node in ranks]
    world_size = sum(ranks.values())
    return [(node, part_of(dataset, count, world_size, job.name)) for node, count in ranks.items() if count]


class DataAhead:
    """Remembers where the data of waiting jobs is pulled to, and how often that changed."""

    def __init__(self, engine: Engine, shares: QueueShares) -> None:
        self._engine, self._shares = engine, shares
        self._pulls: dict[str, tuple[frozenset[str], int]] = {}  # by job: nodes, and how often they were others

    def with_data(self, job: Job, claim: Claim) -> Claim:
        """The claim with what its nodes are to pull at once: all that fits on each of them."""
        if not job.spec.datasets:
            return claim
        nodes = frozenset(claim.gpus)
        before, moves = self._pulls.get(job.name, (nodes, 0))
        self._pulls[job.name] = nodes, moves + (before != nodes)
        return replace(claim, datasets=self._fitting(job, nodes) if self._pulls[job.name][1] <= MOST_MOVES else ())

    def _fitting(self, job: Job, nodes: Collection[str]) -> tuple[str, ...]:
        """What has room on each of the nodes, and within the quota of its queue beside what the job holds where it runs."""
        chosen, held = list[str](), self._held_while_it_runs(job)
        divided = set(map(names.dataset, job.spec.datasets_by_rank))  # comes when its ranks and their numbers are known
        for name in datasets_of(job):
            if name in divided:
                continue
            more = (*chosen, name)
            fits = not self._engine.for_tasks_only(name) and all(self._engine.could_keep(node, more) for node in nodes)
            if fits and self._over(job, [*held, *((node, of) for node in nodes for of in more)]) is None:
                chosen.append(name)
        return tuple(chosen)

    def _held_while_it_runs(self, job: Job) -> list[Copy]:
        """A mover, and who goes on with other GPUs, reads its copies until it is there."""
        if job.attempt is None or job.state not in ACTIVE:
            return []
        return [copy for copy in self._engine.book.held_by(job.name) if copy[0] in job.attempt.nodes]

    def beyond_quota(self, job: Job, ranks: Mapping[str, int]) -> tuple[tuple[str, ...], DataLimit | None]:
        """Which of its data its queue may not hold where it has so many ranks, and why; what does not fit there is not held anyway."""
        kept, beyond, why = list[Copy](), list[str](), None
        for name in datasets_of(job):
            more = [(node, of) for node, of in _copies(job, name, ranks) if self._engine.could_keep(node, (of,))]
            if (limit := self._over(job, [*kept, *more])) is None:
                kept += more
            else:
                beyond.append(name)
                why = why or limit
        return tuple(beyond), why

    def insists(self, job: Job, datasets: Collection[str]) -> bool:
        """Whether the job cannot read these where they are."""
        return bool(datasets) and (job.spec.require_local_data or any(map(self._engine.for_tasks_only, datasets)))

    def _over(self, job: Job, copies: Collection[Copy]) -> DataLimit | None:
        return over(self._shares.quota, self._engine.book, job.queue, job.name, copies)

    def forget(self, job: str) -> None:
        """It starts, or waits no more."""
        self._pulls.pop(job, None)
