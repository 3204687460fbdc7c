"""Tenants of a public trace that share one fleet, or live in clusters of their own: what `fairness` and `idle_gpus` simulate.

A tenant is a virtual cluster of the trace. The fleet has nodes of eight GPUs; each tenant is guaranteed whole nodes of it, in proportion to
the GPU time that its jobs take, at least one. Its private cluster is exactly these nodes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from whaleflux import names
from whaleflux.fleet.model import Gpu, Node
from whaleflux.fleet.profile import Profile
from whaleflux_scheduler.core.model import Queue
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.cluster_file import machine
from whaleflux_scheduler.simulation.records import Outcome
from whaleflux_scheduler.simulation.runner import Simulation
from whaleflux_scheduler.simulation.state import Result
from whaleflux_scheduler.simulation.workload import Delays, Submission, Workload

PER_NODE = 8
FEWEST_JOBS = 9  # of a tenant that is judged
WARM_UP_S = 3 * 86_400.0
DELAYS = Delays(start_s=20.0, save_s=30.0, checkpoint_every_s=1800.0, restart_s=60.0)


@dataclass(frozen=True, slots=True)
class Tenants:
    """The trace's jobs, the fleet's size, and the nodes that each tenant is guaranteed."""

    trace: traces.Trace
    nodes: int
    guaranteed: Mapping[str, int]  # nodes by tenant (queue id)
    jobs: Mapping[str, int]  # how many, by tenant

    @property
    def judged(self) -> list[str]:
        """Tenants with enough jobs for a percentile."""
        return [tenant for tenant, jobs in self.jobs.items() if jobs >= FEWEST_JOBS]

    def queues(self) -> dict[str, Queue]:
        """One for each tenant with its guarantee."""
        return {
            tenant: Queue(names.queue(tenant), weight=float(nodes), guaranteed_gpus=nodes * PER_NODE)
            for tenant, nodes in self.guaranteed.items()
        }

    def at_peak(self) -> Tenants:
        """Each tenant's nodes hold all that it ever asks for at once, were nobody to wait; as many in all as that takes."""
        peaks = {tenant: math.ceil(self._peak(tenant) / PER_NODE) for tenant in self.judged}
        guaranteed = {tenant: peaks.get(tenant, 0) for tenant in self.guaranteed}
        return replace(self, nodes=sum(peaks.values()), guaranteed=guaranteed)

    def as_needed(self) -> Tenants:
        """Guaranteed is no tenant more than it ever asks for at once."""
        most = {tenant: math.ceil(self._peak(tenant) / PER_NODE) for tenant in self.guaranteed}
        return replace(self, guaranteed={tenant: min(n, most[tenant]) for tenant, n in self.guaranteed.items()})

    def _peak(self, tenant: str) -> int:
        mine = [row for row in self.trace.rows if row.queue == tenant]
        changes = [change for row in mine for change in ((row.at_s, row.gpus), (row.at_s + row.run_s, -row.gpus))]
        held = most = 0
        for _, change in sorted(changes):
            held += change
            most = max(most, held)
        return most

    def shrunk(self, nodes: int) -> Tenants:
        """The same tenants on another number of nodes."""
        weights = {tenant: float(nodes) for tenant, nodes in self.guaranteed.items() if nodes}
        shares = _whole(weights, nodes)
        return replace(self, nodes=nodes, guaranteed={tenant: shares.get(tenant, 0) for tenant in self.guaranteed})

    def fits_at_home(self, row: traces.Row) -> bool:
        return row.gpus <= self.guaranteed[row.queue] * PER_NODE


def read(path: Path, nodes: int, jobs: int, load: float) -> Tenants:
    """Jobs of the trace, without the first hundredth (it begins with weeks of a few), coming at that load of the fleet."""
    trace = traces.read(path, nodes * PER_NODE)
    first = len(trace.rows) // 100
    begin_s = trace.rows[first].at_s
    rows = (replace(row, at_s=row.at_s - begin_s) for row in trace.rows[first : first + jobs])
    trace = replace(trace, rows=tuple(rows)).at_load(load, nodes * PER_NODE)
    count: Counter[str] = Counter(row.queue for row in trace.rows)
    work: dict[str, float] = {}
    for row in trace.rows:
        work[row.queue] = work.get(row.queue, 0.0) + row.gpus * row.run_s
    judged = {tenant: work[tenant] for tenant, many in count.most_common() if many >= FEWEST_JOBS}
    shares = _whole(judged, nodes)
    return Tenants(trace, nodes, {tenant: shares.get(tenant, 0) for tenant in count}, dict(count.most_common()))


def _whole(work: Mapping[str, float], nodes: int) -> dict[str, int]:
    """Nodes in proportion to work, at least one each; what is left by largest remainder."""
    total, free = sum(work.values()), nodes - len(work)
    exact = {tenant: free * part / total for tenant, part in work.items()}
    given = {tenant: 1 + int(part) for tenant, part in exact.items()}
    by_remainder = sorted(exact, key=lambda tenant: (int(exact[tenant]) - exact[tenant], tenant))
    for tenant in by_remainder[: nodes - sum(given.values())]:
        given[tenant] += 1
    return given


def fleet(nodes: int) -> list[Node]:
    """That many nodes of eight GPUs, twelve under a leaf."""
    whole = machine(Profile.load("h200x8"))
    return [
        replace(
            whole, name=names.node("site", f"n{at:03}"), site="site", leaf=f"leaf-{at // 12}", gpus=_gpus(whole, at)
        )
        for at in range(nodes)
    ]


def _gpus(whole: Node, at: int) -> tuple[Gpu, ...]:
    return tuple(replace(gpu, uuid=f"GPU-{at:03}-{gpu.index}") for gpu in whole.gpus)


def simulate(nodes: int, jobs: Iterable[Submission], queues: Mapping[str, Queue]) -> Result:
    """The production step on a fleet of that many nodes, to the end of the last job."""
    return Simulation(fleet(nodes), Workload(jobs, dict(queues), DELAYS)).run()


def submissions(rows: Iterable[traces.Row], one_queue: str = "") -> list[Submission]:
    """Jobs by row; `one_queue`: all in it, as if there were no tenants."""
    made = traces.Trace(tuple(rows)).submissions()
    return [replace(s, name=names.job(one_queue, names.last(s.name))) if one_queue else s for s in made]


def homes(tenants: Tenants) -> dict[str, Result]:
    """Each judged tenant's jobs in its private cluster; those that are larger than it are left out."""
    found = {}
    for tenant in tenants.judged:
        rows = [row for row in tenants.trace.rows if row.queue == tenant and tenants.fits_at_home(row)]
        found[tenant] = simulate(tenants.guaranteed[tenant], submissions(rows), {})
    return found


def waits(outcomes: Iterable[Outcome], from_s: float) -> list[float]:
    """Sorted waits of jobs that were submitted after the warm-up, in seconds."""
    return sorted(job.wait_s for job in outcomes if job.submit_s >= from_s and not math.isnan(job.start_s))


def warm_up_s(trace: traces.Trace) -> float:
    """When measuring begins: after three days, or a tenth of the time."""
    return min(WARM_UP_S, trace.span_s / 10)


def useful_gpu_s(result: Result, until_s: float) -> float:
    """GPU-seconds held until then, less what starts, saves and restarts of suspended jobs took at any time."""
    means, width = result.held.means(), result.held.bin_s
    held = sum(level * min(width, until_s - at) for at, level in means if at < until_s)
    again = DELAYS.start_s + DELAYS.save_s + DELAYS.restart_s
    return held - again * sum(job.suspensions * job.gpus for job in result.outcomes)
