"""`whaleflux demo-elastic`: one pool that breathes.

A Ray program's queue grows and a training lends it GPUs, a peak is met by a rented machine, and a model goes to three sites.
Real are the suite, the agents, Ray, the ranks, the replicas and every decision; GPUs and the cloud's machines are simulated.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whaleflux.demo.fleet import DemoFleet, Machine, gpu_of_profile
from whaleflux.demo.lending import LENT_GPUS, Lent, Sizes, lend, watch_sizes
from whaleflux.demo.renting import BURST, Everywhere, Rented, meet_peak, serve_everywhere
from whaleflux.demo.suite import Teller, join, running_suite
from whaleflux.demo.training import Say, submit, until
from whaleflux.errors import FailedPrecondition
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.sdk.client import AsyncClient

EXAMPLES = Path(__file__).parents[3] / "examples"
FLEET = (
    Machine("onprem", "h200-a", "h200x4"),
    Machine("onprem", "l40s-a", "l40sx4"),
    Machine("cloud", "a100-a", "a100x4pcie"),
    Machine("edge", "rtx-a", "rtx4090x2"),
)
SITES = {"onprem": "l40sx4", "cloud": "a100x4pcie", "edge": "rtx4090x2"}
SOON_S = 5.0  # a busy host's; on a free one it is a second (benchmarks ray_start)
TRAINING_GPUS, TASKS, RUNNING_S, GROW_S = 4, 4, 90, 180


@dataclass(frozen=True, slots=True)
class ElasticOptions:
    """`ray_python` is an interpreter that has Ray; `keep` leaves everything running."""

    ray_python: Path
    state: Path = Path(".whaleflux") / "demo-elastic"
    keep: bool = False
    report: Path = Path("demo-elastic-report.json")


def run(options: ElasticOptions) -> int:
    """The demo; returns the exit code: 0 when everything that it claims was seen."""
    if not options.ray_python.exists():
        raise FailedPrecondition(f"{options.ray_python} is not there; Ray is installed beside with: make ray")
    say, state = Teller(), options.state.resolve()
    with running_suite(state, say, keep=options.keep, settings=BURST) as fleet:
        report = asyncio.run(_demo(options, state, fleet, say))
        options.report.write_text(json.dumps(report, indent=2) + "\n")
        _print_summary(report, options.report)
    return 0 if report["passed"] else 1


async def _demo(options: ElasticOptions, state: Path, fleet: DemoFleet, say: Say) -> dict[str, Any]:
    began = time.time()
    async with AsyncClient.from_context(state / "context.json") as client:
        await join(client, fleet, FLEET, say)
        sizes = await _train(client, say)
        watching = asyncio.create_task(watch_sizes(client, sizes, say))
        try:
            await until(lambda: sizes.now == TRAINING_GPUS, f"the training to run with {TRAINING_GPUS} GPUs", RUNNING_S)
            lent = await lend(client, options.ray_python.absolute(), EXAMPLES / "ray", sizes, TASKS, say)
            back_at = time.monotonic()
            rented = await meet_peak(client, EXAMPLES / "gpt", state, say)
            everywhere = await serve_everywhere(client, fleet.context, EXAMPLES / "gpt", state / "weights", SITES, say)
            say("      waiting for the training to grow back (what it gains has to be worth a restart)")
            await until(lambda: sizes.now == TRAINING_GPUS, "the training to have its GPUs back", GROW_S)
            back_s = sizes.seen[-1][0] - back_at
        finally:
            watching.cancel()
        return _report(sizes, lent, rented, everywhere, back_s, time.time() - began)


async def _train(client: AsyncClient, say: Say) -> Sizes:
    """The example's elastic training on the four H200, behind everything else on this machine's cores."""
    example = EXAMPLES / "gpt"
    spec = job_from_yaml((example / "elastic.yaml").read_text(), example).spec
    del spec.command[:]
    spec.command.extend(["nice", "-n", "19", sys.executable, "train.py", "--steps", "100000", "--print-every", "1000"])
    spec.gpus, spec.elastic.min, spec.elastic.max, spec.elastic.step = TRAINING_GPUS, 2, TRAINING_GPUS, 2
    spec.expected.FromSeconds(7200)  # so that it is known what growing back is worth
    spec.gpu.any_of.append(gpu_of_profile(FLEET[0].profile))
    say(f"TRAIN an elastic GPT with {TRAINING_GPUS} H200, 2 at least; it goes on from its checkpoint at each size")
    return Sizes(await submit(client, spec, "pretrain", say))


def _report(
    sizes: Sizes, lent: Lent, rented: Rented, everywhere: Everywhere, back_s: float, wall_s: float
) -> dict[str, Any]:
    had = [gpus for _, gpus in sizes.seen if gpus]
    checks = {
        f"a worker is on its way within {SOON_S:g} s of the queue": 0 <= lent.first_worker_s <= SOON_S,
        "the training lent GPUs and went on with fewer": 0 < min(had) < TRAINING_GPUS,
        "the Ray program ended, unmodified": lent.program_said.startswith(f"evaluated {lent.tasks}"),
        "workers had no more than their cluster's most": 0 < lent.most_worker_gpus <= LENT_GPUS,
        "idle workers left": lent.workers_gone_s >= 0,
        "the training has its GPUs back": had[-1] == TRAINING_GPUS,
        "one machine was rented, and only one": rented.leases == 1,
        "the job that waited ran on it": bool(rented.node) and rented.ran_on == rented.node,
        "it was given back": rented.gone_s >= 0,
        "the model answers from three sites": set(everywhere.ready_s) == set(SITES),
        "no request failed": everywhere.served.asked > 0 and everywhere.served.failed == 0,
    }
    return {
        "passed": all(checks.values()),
        "checks": checks,
        "simulated": "GPUs, and the provider of machines and its prices; Ray, the suite, agents, ranks and replicas are real",
        "training_gpus": [[round(at - sizes.seen[0][0], 1), gpus] for at, gpus in sizes.seen],
        "training_resizes": sizes.job.epoch - 1,
        "ray": asdict(lent),
        "burst": asdict(rented),
        "sites": {
            site: {"ready_s": everywhere.ready_s.get(site), "gpu": everywhere.classes.get(site), "said": said}
            for site, said in everywhere.promised.items()
        },
        "requests": {"asked": everywhere.served.asked, "failed": everywhere.served.failed, "errors": everywhere.served.errors[:5]},
        "gpus_back_s": back_s,
        "wall_s": wall_s,
        "host": {"cpus": os.cpu_count()},
    }  # fmt: skip


def _print_summary(report: dict[str, Any], file: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    ray, burst = report["ray"], report["burst"]
    rows = [
        ("the training's GPUs", " -> ".join(str(gpus) for _, gpus in report["training_gpus"] if gpus)),
        ("Ray: queue to first worker", f"{ray['first_worker_s']:.1f} s; done after {ray['program_done_s']:.1f} s"),
        ("Ray: idle workers gone", f"{ray['workers_gone_s'] - ray['program_done_s']:.1f} s after the program's end"),
        ("GPUs back in the training", f"{report['gpus_back_s']:.1f} s after the workers had left"),
        ("peak: asked, joined, done", f"{burst['asked_s']:.1f}, {burst['joined_s']:.1f}, {burst['done_s']:.1f} s"),
        ("rented machine", f"given back after {burst['gone_s']:.1f} s, ${burst['cost_usd']:.3f} (simulated)"),
        *((f"model at {site}", _at(what)) for site, what in report["sites"].items()),
        ("requests", f"{report['requests']['asked']}, {report['requests']['failed']} failed"),
        ("in all", f"{report['wall_s']:.0f} s"),
    ]
    table = Table(title="WhaleFlux: one pool that breathes (GPUs and cloud simulated)", show_header=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    for check, held in report["checks"].items():
        console.print(("[green]ok[/]   " if held else "[red]MISSED[/] ") + check, highlight=False)
    console.print(f"report: {file}", highlight=False)


def _at(what: dict[str, Any]) -> str:
    return "never ready" if what["ready_s"] is None else f"READY after {what['ready_s']:.1f} s on {what['gpu']}"
