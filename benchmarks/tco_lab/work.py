"""The same work for every rung of the ladder: jobs of a week of Philly, each a training that Pollux measured, with what they hold in vain."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.tco_lab.speeds import NODE, App
from whaleflux.fleet.model import Gpu, Link, LinkKind, Node, Price, PriceKind
from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.workload import NodeEvent, Submission

WEEK_S = 7 * 86400.0
SHORTEST_S = 60.0  # of a job: less is a test of its script


@dataclass(frozen=True, slots=True)
class Work:
    """`run_s` on the fewest nodes; `idle_s` more it holds its GPUs behind that and does nothing."""

    number: int
    at_s: float
    run_s: float
    gpus: int
    app: App
    batch: int  # of each GPU
    idle_s: float
    was_gpus: int  # before anybody made it smaller

    def slowdown(self, nodes: int) -> float:
        """Of its steps, on so many nodes."""
        return self.app.slowdown(self.gpus, nodes, self.batch)

    @property
    def fewest_nodes(self) -> int:
        return -(-self.gpus // NODE)

    @property
    def useful_gpu_s(self) -> float:
        return self.run_s * self.gpus


def halves(trace: traces.Trace) -> dict[str, frozenset[str]]:
    """The virtual clusters in two groups of like size, so that a saving can be looked for among other people's jobs, too."""
    gpu_s: dict[str, float] = {}
    for row in trace.rows:
        gpu_s[row.queue] = gpu_s.get(row.queue, 0.0) + row.run_s * row.gpus
    order = sorted(gpu_s, key=lambda queue: (-gpu_s[queue], queue))
    return {"a": frozenset(order[0::4] + order[3::4]), "b": frozenset(order[1::4] + order[2::4])}


def week(
    rows: Sequence[traces.Row],
    number: int,
    load: float,
    gpus: int,
    idle: float,
    apps: Sequence[App],
    seed: int,
    *,
    tuned: bool = True,
) -> list[Work]:
    """A week's jobs at a load of that many GPUs: each an application by lot, idle for `idle` of its run time in the mean (exponential).

    A fleet that a week does not fill gets the weeks behind it too, one over the other. Jobs longer than a week are cut to it.
    """
    wanted, kept = load * gpus * WEEK_S, list[traces.Row]()
    drawn = random.Random(seed)
    last = max(row.at_s for row in rows)
    while wanted > 0 and number * WEEK_S <= last:
        of_week = _rows(rows, number)
        drawn.shuffle(of_week)
        for row in of_week:
            if wanted > 0:
                kept.append(row)
                wanted -= row.run_s * row.gpus
        number += 1
    kept.sort(key=lambda row: row.at_s)
    return [_work(n, row, drawn.choice(apps), idle, drawn, tuned) for n, row in enumerate(kept)]


def _rows(rows: Sequence[traces.Row], number: int) -> list[traces.Row]:
    begin_s = number * WEEK_S
    return [
        replace(row, at_s=row.at_s - begin_s, run_s=min(row.run_s, WEEK_S))
        for row in rows
        if begin_s <= row.at_s < begin_s + WEEK_S and row.run_s > SHORTEST_S
    ]


def _work(number: int, row: traces.Row, app: App, idle: float, drawn: random.Random, tuned: bool) -> Work:
    batch = app.drawn(row.gpus, drawn, tuned=tuned)
    idle_s = drawn.expovariate(1 / idle) * row.run_s if idle else 0.0
    return Work(number, row.at_s, row.run_s, row.gpus, app, batch, idle_s, row.gpus)


def submissions(work: Sequence[Work]) -> Iterator[Submission]:
    """For the production scheduler: each gang on the fewest nodes that hold it."""
    for one in work:
        spec = Spec(command=("true",), gpus=one.gpus, max_nodes=one.fewest_nodes, checkpoint_every_steps=100)
        spec = replace(spec, expected_s=one.run_s + one.idle_s)
        yield Submission(f"queues/q/jobs/j{one.number:06}", spec, one.at_s, one.run_s + one.idle_s)


def nodes(gpus: int, usd: float, spot_usd: float = 0.0) -> list[Node]:
    """Nodes of four, 16 below a leaf. With a price of spot every second one is of it."""
    return [_node(n, spot_usd if spot_usd and n % 2 else usd, bool(spot_usd and n % 2)) for n in range(gpus // NODE)]


def interrupted(nodes: Sequence[Node], mean_s: float, away_s: float, until_s: float, seed: int) -> list[NodeEvent]:
    """Spot nodes are taken back at random, each about every `mean_s`, and come again after `away_s`."""
    drawn, found = random.Random(seed), list[NodeEvent]()
    for node in nodes:
        at_s = drawn.expovariate(1 / mean_s) if node.price.kind is PriceKind.SPOT else until_s
        while at_s < until_s:
            found += [NodeEvent(at_s, "down", (node.name,)), NodeEvent(at_s + away_s, "up", (node.name,))]
            at_s += away_s + drawn.expovariate(1 / mean_s)
    return sorted(found, key=lambda event: event.at_s)


def _node(number: int, usd: float, spot: bool) -> Node:
    gpus = tuple(Gpu(i, f"GPU-{number}-{i}", "H100-80GB", 80 * 10**9, (9, 0)) for i in range(NODE))
    links = tuple(Link(a, b, LinkKind.NVLINK, 300e9) for a in range(NODE) for b in range(a + 1, NODE))
    return Node(
        f"sites/s/nodes/n{number:04}", "s", gpus=gpus, links=links, leaf=f"l{number // 16}", cpu_millicores=128_000,
        memory_bytes=10**12, network_bytes_per_s=50e9,
        price=Price(usd_per_gpu_hour=usd, kind=PriceKind.SPOT if spot else PriceKind.ON_DEMAND), simulated=True,
    )  # fmt: skip
