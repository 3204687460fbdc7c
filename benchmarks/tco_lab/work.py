"""The same work for every rung of the ladder: jobs of a week of Philly, each a training that Pollux measured, with what they hold in vain."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.tco_lab.speeds import NODE, App
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node, Price
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.workload import Submission

WEEK_S = 7 * 86400.0
WEEK_FILLS = 256  # GPUs, about, that a week of the trace keeps busy
SHORTEST_S = 60.0  # of a job: less is a test of its script


@dataclass(frozen=True, slots=True)
class Work:
    """`run_s` on the fewest nodes; `idle_s` more it holds its GPUs behind that and does nothing."""

    number: int
    at_s: float
    run_s: float
    gpus: int
    app: App
    idle_s: float

    @property
    def fewest_nodes(self) -> int:
        return -(-self.gpus // NODE)

    @property
    def useful_gpu_s(self) -> float:
        return self.run_s * self.gpus


def week(
    trace: traces.Trace, number: int, load: float, gpus: int, idle: float, apps: Sequence[App], seed: int
) -> list[Work]:
    """A week's jobs at a load of that many GPUs: each an application by lot, idle for `idle` of its run time in the mean (exponential).

    A fleet that a week does not fill gets the weeks behind it too, one over the other. Jobs longer than a week are cut to it.
    """
    begin_s, folded = number * WEEK_S, -(-gpus // WEEK_FILLS)
    rows = [
        replace(row, at_s=(row.at_s - begin_s) % WEEK_S, run_s=min(row.run_s, WEEK_S))
        for row in trace.rows
        if begin_s <= row.at_s < begin_s + folded * WEEK_S and row.run_s > SHORTEST_S
    ]
    drawn = random.Random(seed)
    drawn.shuffle(rows)
    wanted, kept = load * gpus * WEEK_S, list[traces.Row]()
    for row in rows:
        if wanted <= 0:
            break
        kept.append(row)
        wanted -= row.run_s * row.gpus
    kept.sort(key=lambda row: row.at_s)
    return [
        Work(
            n,
            row.at_s,
            row.run_s,
            row.gpus,
            drawn.choice(apps),
            drawn.expovariate(1 / idle) * row.run_s if idle else 0.0,
        )
        for n, row in enumerate(kept)
    ]


def submissions(work: Sequence[Work]) -> Iterator[Submission]:
    """For the production scheduler: each gang on the fewest nodes that hold it."""
    for one in work:
        spec = Spec(command=("true",), gpus=one.gpus, max_nodes=one.fewest_nodes, checkpoint_every_steps=100)
        spec = replace(spec, expected_s=one.run_s + one.idle_s)
        yield Submission(f"queues/q/jobs/j{one.number:06}", spec, one.at_s, one.run_s + one.idle_s)


def nodes(gpus: int, usd: float) -> list[Node]:
    """Nodes of four, 16 below a leaf."""
    return [_node(number, usd) for number in range(gpus // NODE)]


def _node(number: int, usd: float) -> Node:
    gpus = tuple(Gpu(i, f"GPU-{number}-{i}", "H100-80GB", 80 * 10**9, (9, 0)) for i in range(NODE))
    links = tuple(Link(a, b, LinkKind.NVLINK, 300e9) for a in range(NODE) for b in range(a + 1, NODE))
    return Node(
        f"sites/s/nodes/n{number:04}", "s", gpus=gpus, links=links, leaf=f"l{number // 16}", cpu_millicores=128_000,
        memory_bytes=10**12, network_bytes_per_s=50e9, price=Price(usd_per_gpu_hour=usd), simulated=True,
    )  # fmt: skip
