"""Nodes for what waits in a Ray cluster: how long the decision takes, what it costs, and how much GPU memory it strands, beside Ray's own.

Ray's own scheduler (autoscaler v2, `ResourceDemandScheduler`) decides the same cases in the same run, in the interpreter of `--ray-python`
(`make ray` makes one); without it the comparisons are not met. Both choose among the same nodes; ours takes parts of them, as
the fleet gives them, and stands beside that with whole nodes, as Ray takes them. Ray adds the `gpu_memory` of a node's
GPUs up, so much of what it places has no GPU to run on. The comparison is therefore with a Ray that is helped twice: each bundle has a label
selector of the node types one of whose GPUs can hold it, and what does not fit device by device on the nodes that it chose (laid there by
our packing) is asked of it again until nothing is left: the row "Ray, helped". What it decides by itself stands beside it.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Options, Report, Row, Target, main
from whaleflux_scheduler.core.ray_demand import UNIT, Demand, Gang, Strategy, shape_of
from whaleflux_scheduler.core.ray_kinds import Kind, whole_devices
from whaleflux_scheduler.core.ray_plan import RayPlan, plan

GIB_MIB = 1024
BUNDLES, SHAPES = 300, 30  # of a trace
# Nodes of 8 GPUs: memory of one in GiB, US dollars per GPU and hour, processors, links in bytes per second.
TYPES = {"H200": (141, 2.6, 192, 347e9), "A100-80GB": (80, 1.8, 128, 231e9), "RTX4090": (24, 0.35, 96, 20e9)}
MOST_NODES, TRACES, QUICK_TRACES, REPEATS, MOST_ROUNDS = 1_000_000, 16, 2, 7, 12
Case = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What nodes cost per hour, how much GPU memory of them nobody asked for, and bundles that have no GPU on them."""

    usd_per_hour: float
    stranded_mib: float
    homeless: int


def measure(options: Options) -> Report:
    rows, targets = _decisions(options)
    more, choices = _choices(options)
    return Report(
        rows=rows + more,
        targets=targets + choices,
        simulated="demand and node types; no node is started. Ray's side is its own code, alone and without nodes that are there",
        notes=["times are CPU time of one core, the median of several for ours and one for Ray's"],
    )


# how long a decision takes


def _decisions(options: Options) -> tuple[list[Row], list[Target]]:
    cases = {
        "10,000 bundles, 100 shapes": _whole(10_000, 100),
        "10,000 bundles, mixed": _mixed(options.seed, 10_000, 100),
    }
    if not options.quick:
        cases["100,000 bundles, 100 shapes"] = _whole(100_000, 100)
        cases["100,000 bundles, mixed"] = _mixed(options.seed, 100_000, 100)
    small = {name: case for name, case in cases.items() if name.startswith("10,000")}  # 100,000 take Ray minutes
    small = dict(list(small.items())[:1]) if options.quick else small
    ray = dict(zip(small, _ask_ray(options, [*small.values()]), strict=False))
    rows, slowest = list[Row](), dict[str, float]()
    for name, case in cases.items():
        cpu_s = statistics.median(_timed(case) for _ in range(REPEATS))
        many = name.split()[0].replace(",", "")
        slowest[many] = max(slowest.get(many, 0.0), cpu_s)
        rays = ray.get(name, {}).get("cpu_s")
        rows.append({"what": name, "ours_ms": round(cpu_s * 1000, 1), "ray_ms": round(rays * 1000) if rays else "-"})
    limits = {"10000": 50.0, "100000": 100.0}
    targets = [Target(f"decision_{n}_bundles", s * 1000, limits[n], "ms", per="python") for n, s in slowest.items()]
    return rows, targets


def _timed(case: Case) -> float:
    demand, kinds = _demand(case), _kinds()
    begun = time.process_time()
    plan(demand, kinds)
    return time.process_time() - begun


# what is chosen


def _choices(options: Options) -> tuple[list[Row], list[Target]]:
    """On mixed traces, and on those of whole GPUs, where what fits by sum and by selector fits by device too."""
    many = QUICK_TRACES if options.quick else TRACES
    mixed = {f"mixed {n}": _mixed(options.seed + n, BUNDLES, SHAPES) for n in range(many)}
    openb = options.data / "traces" / "openb" / "openb_pod_list_default.csv.gz"
    if openb.exists():
        mixed["openb"] = _openb(openb, 300 if options.quick else 2_000)
    whole = {f"whole {n}": _mixed(options.seed + n, BUNDLES, SHAPES, shares=False) for n in range(many)}
    rows, worst, stranded, homeless = list[Row](), list[float](), list[float](), 0
    for name, cases in (("mixed", mixed), ("whole GPUs", whole)):
        ours, ray, shown = _compared(options, cases)
        rows += [_row(f"{len(cases)} traces, {name}: {who}", found) for who, found in shown.items() if found]
        worst += [ours[case].usd_per_hour / ray[case].usd_per_hour for case in ray]
        stranded += [_stranded(ours) / _stranded(ray) if ray else math.nan]
        homeless += sum(one.homeless for one in ours.values())
    return rows, [
        Target("cost_against_ray_at_worst", max(worst, default=math.nan), 1.0, "x"),
        Target("stranded_memory_against_ray_mixed", stranded[0], 0.8, "x"),
        Target("stranded_memory_against_ray_whole_gpus", stranded[1], 0.8, "x"),
        Target("bundles_without_a_gpu", homeless, 0, "bundles"),
    ]


def _compared(
    options: Options, cases: dict[str, Case]
) -> tuple[dict[str, Outcome], dict[str, Outcome], dict[str, dict[str, Outcome]]]:
    """Our choice, that of Ray helped, and all that is shown."""
    whole = {name: _of_plan(plan(_demand(case), _kinds())) for name, case in cases.items()}
    ours = {name: _of_plan(plan(_demand(case), _kinds(parts=True))) for name, case in cases.items()}
    alone, helped = _rays(options, cases, 1, selectors=False), _rays(options, cases, MOST_ROUNDS, selectors=True)
    shown = {"ours": ours, "ours, whole nodes": whole, "Ray": alone[0], "Ray with selectors": helped[0]}
    return ours, helped[1], shown | {"Ray, helped": helped[1]}


def _row(who: str, found: dict[str, Outcome]) -> Row:
    return {
        "what": who,
        "usd_per_hour": round(sum(one.usd_per_hour for one in found.values())),
        "stranded_gib": round(_stranded(found) / GIB_MIB),
        "bundles_without_a_gpu": sum(one.homeless for one in found.values()),
    }


def _stranded(found: dict[str, Outcome]) -> float:
    return sum(one.stranded_mib for one in found.values())


def _of_plan(found: RayPlan) -> Outcome:
    return Outcome(found.usd_per_hour, found.stranded_mib, sum(u.count for u in found.unmet))


def _rays(
    options: Options, cases: dict[str, Case], rounds: int, *, selectors: bool
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """Of Ray's nodes: as it decided, and after so many rounds in which it was asked again for what has no GPU."""
    first: dict[str, Outcome] = {}
    launched = {name: Counter[str]() for name in cases}
    asked = dict(cases)
    for _ in range(rounds):
        answers = _ask_ray(options, [*asked.values()], selectors=selectors)
        if not answers:
            return {}, {}
        for name, answer in zip(asked, answers, strict=True):
            launched[name].update(answer["launch"])
        found = {name: _on(cases[name], launched[name]) for name in asked}
        first = first or {name: outcome for name, (outcome, _) in found.items()}
        asked = {name: left for name, (_, left) in found.items() if left["singles"] or left["gangs"]}
        if not asked:
            break
    return first, {name: _on(case, launched[name])[0] for name, case in cases.items()}


def _on(case: Case, launched: Counter[str]) -> tuple[Outcome, Case]:
    """How a case lies on these nodes, and what of it does not."""
    kinds = [replace(kind, count=launched[kind.name]) for kind in _kinds()]
    found = plan(_demand(case), kinds)
    memory = sum(launched[kind.name] * kind.gpus * kind.device_memory_mib for kind in kinds)
    used = sum(part.filling.memory_used_mib * part.count for part in found.additions)
    usd = sum(launched[kind.name] * kind.gpus * kind.usd_per_gpu_hour for kind in kinds)
    left: Case = {"singles": [], "gangs": []}
    for unmet in found.unmet:
        of = "gangs" if unmet.of_gang else "singles"
        left[of].append([*case[of][unmet.source][:-1], unmet.count])
    return Outcome(usd, memory - used, sum(u.count for u in found.unmet)), left


def _ask_ray(options: Options, cases: Sequence[Case], *, selectors: bool = False) -> list[dict[str, Any]]:
    """What Ray decides; nothing where it is not installed."""
    python = options.extra.ray_python
    if not python.exists():
        print(f"{python} is not there: Ray is not measured; make it with: make ray", file=sys.stderr)
        return []
    types = [
        {"name": name, "labels": {"type": name}, "resources": {"CPU": cpus, "GPU": 8, "gpu_memory": 8 * gib * GIB_MIB}}
        for name, (gib, _, cpus, _) in TYPES.items()
    ]
    script = Path(__file__).with_name("ray_peer.py")
    given = json.dumps({"types": types, "selectors": selectors, "cases": cases})
    done = subprocess.run([python, script], input=given, capture_output=True, text=True, timeout=1800, check=True)
    return list(json.loads(done.stdout)["cases"])


# cases


def _kinds(*, parts: bool = False) -> list[Kind]:
    return [
        Kind(
            name,
            model=name,
            devices=whole_devices(8, gib * GIB_MIB),
            device_memory_mib=gib * GIB_MIB,
            cpu=cpus * UNIT,
            memory=2**41 * UNIT,
            count=MOST_NODES,
            usd_per_gpu_hour=usd,
            link_bytes_per_s=links,
            parts=parts,
        )
        for name, (gib, usd, cpus, links) in TYPES.items()
    ]


def _demand(case: Case) -> Demand:
    return Demand(
        tuple((shape_of(resources), count) for resources, count in case["singles"]),
        tuple(
            Gang(tuple((shape_of(resources), n) for resources, n in bundles), Strategy(strategy), count)
            for bundles, strategy, count in case["gangs"]
        ),
    )


def _whole(bundles: int, shapes: int) -> Case:
    """Whole GPUs with 10 to 69 GiB each."""
    asked = [
        [{"GPU": 1, "CPU": 1 + n % 4, "gpu_memory": round((10 + n % 60 + 0.001 * n) * GIB_MIB)}, bundles // shapes]
        for n in range(shapes)
    ]
    return {"singles": asked, "gangs": []}


def _mixed(seed: int, bundles: int, shapes: int, *, shares: bool = True) -> Case:
    """Memory alone and shares (with `shares`), whole GPUs, several of them, and a tenth of all bundles in placement groups."""
    draw = random.Random(seed)
    singles = [
        [_one(draw, 0.0 if shares else 0.5), max(1, round(bundles * 0.9 / shapes * draw.uniform(0.3, 1.7)))]
        for _ in range(shapes)
    ]
    gangs: list[Any] = []
    left = bundles // 10
    while left > 0:
        size = draw.choice([2, 4, 8])
        count = max(1, min(left, bundles // 20) // size)
        one = {"GPU": 1, "CPU": 2, "gpu_memory": draw.randint(8, 120) * GIB_MIB}
        gangs.append([[[one, size]], draw.choice(["STRICT_PACK", "PACK", "SPREAD"]), count])
        left -= size * count
    return {"singles": singles, "gangs": gangs}


def _one(draw: random.Random, least: float) -> dict[str, float]:
    kind, cpu = draw.uniform(least, 1), draw.randint(1, 4)
    memory = draw.choice([2, 4, 6, 10, 14, 18, 22, 30, 40, 48, 60, 70, 78, 100, 130]) * GIB_MIB
    if kind < 0.25:
        return {"CPU": cpu, "gpu_memory": memory}
    if kind < 0.5:
        return {"CPU": cpu, "GPU": draw.choice([0.1, 0.25, 0.5]), "gpu_memory": memory}
    if kind < 0.85:
        return {"CPU": cpu, "GPU": 1, "gpu_memory": memory}
    gpus = draw.choice([2, 4])
    return {"CPU": cpu * gpus, "GPU": gpus, "gpu_memory": memory * gpus}


def _openb(path: Path, most: int) -> Case:
    """The first pods with GPUs of the openb trace; a thousandth of a GPU is read as one of 40 GiB."""
    counts: Counter[tuple[tuple[str, float], ...]] = Counter()
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        for pod in csv.DictReader(lines):
            gpus, milli = int(pod["num_gpu"]), int(pod["gpu_milli"])
            if not gpus or counts.total() >= most:
                continue
            share = gpus if gpus > 1 or milli == 1000 else milli / 1000
            asked = {
                "CPU": int(pod["cpu_milli"]) / 1000,
                "GPU": share,
                "gpu_memory": gpus * milli * 40 * GIB_MIB // 1000,
            }
            counts[tuple(asked.items())] += 1
    return {"singles": [[dict(asked), n] for asked, n in counts.items()], "gangs": []}


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray-python", type=Path, default=ROOT / ".venv-ray" / "bin" / "python", help="an interpreter that has Ray"
    )


if __name__ == "__main__":
    sys.exit(main("ray_resize", measure, add_arguments=options_of))
