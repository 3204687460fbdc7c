"""What the same work costs, rung by rung: blind placement, ours, running jobs moved together, idle GPUs released, jobs right-sized, half of the GPUs spot; and what each kind of recommendation keeps of its promise.

python -m benchmarks.tco_replay [--quick] [--gpus 128 1024] [--weeks 2 5] --json FILE

The base is the best of three blind ways in each figure. A case differs from the usual one in one thing: idle time and what spot
machines do are assumed ([P]), so each has a case without it or with more of it.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.tco_lab import kinds, ladder, pools
from benchmarks.tco_lab.speeds import App, apps
from benchmarks.tco_lab.work import halves, week
from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.recommend import tracking
from whaleflux_console.core.recommend.recommendation import Kind
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.runner import SIMULATED

LOAD, IDLE = 0.9, 0.1
HELD_OUT = (2, 5, 8, 10)  # weeks of the trace; the scheduler's rules were chosen on its weeks 12 and 13
WEEK_OF_MANY = (2,)  # and those behind it, one over the other, until they fill the fleet
MANY = 1024
KEPT, SAVED = 0.9, 35.0
CASES = 1_000
FEWEST_JOBS = 100  # a week that a few huge jobs fill says nothing of the others: it is left out
SIZED, SPOT = "right-sized", "half of it spot"
NOTES = (
    "[P] assumed, since no trace has it: idle time (10 % of run time in the mean, exponential), and that a spot node is taken back once a day",
    "not in it: classes of GPUs (Gavel measured K80, P100 and V100, of which only V100 has a dated price), and Lingjun's tree (no speeds by distance beyond a node were measured, so a tree would change no dollar)",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One ladder: whose jobs of which week, and what differs from the usual."""

    gpus: int
    week: int
    clusters: str  # "a" or "b" of the virtual clusters, or "all"
    idle: float = IDLE  # [P] of run time, in the mean
    network: float = 1.0  # times faster than between T4s
    tuned: bool = True  # batches as a user chose them, else any that was measured

    @property
    def what(self) -> str:
        """What differs."""
        if not self.tuned:
            return "any batch"
        if self.network != 1.0:
            return f"network x{self.network:g}"
        return f"idle {self.idle:g}" if self.idle != IDLE else "usual"


def main_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, nargs="+", help="fleet sizes (default 128 1024; quick: 128)")
    parser.add_argument("--weeks", type=int, nargs="+", help=f"weeks of the trace, from 0 (default {HELD_OUT})")


def cases(sizes: Sequence[int], weeks: Sequence[int], *, quick: bool) -> Iterator[Case]:
    """Each week of each half of the clusters as usual, and of each size's first week what else might be so."""
    for gpus in sizes:
        many = gpus >= MANY
        yield from (Case(gpus, week, half) for week in weeks for half in (("all",) if many or quick else ("a", "b")))
        if not quick:
            usual = Case(gpus, weeks[0], "all" if many else "a")
            yield from (replace(usual, idle=0.0), replace(usual, idle=0.3))
            yield from (replace(usual, network=4.0), replace(usual, tuned=False))


def measure(options: Options) -> Report:
    """Dollars per GPU-hour of useful work on Philly's jobs with Pollux's speeds, by elastic and by owned GPUs."""
    folder = options.file("traces", "pollux", "throughput")
    known = apps(folder)
    report = Report(
        simulated=f"{SIMULATED}; sizes and times are Philly's, speeds Pollux's; which job is which is drawn"
    )
    report.notes += NOTES
    for gpus in options.extra.gpus or ([128] if options.quick else [128, MANY]):
        weeks = options.extra.weeks or (HELD_OUT[:1] if options.quick else WEEK_OF_MANY if gpus >= MANY else HELD_OUT)
        trace = traces.read(options.trace("pollux", "philly.csv.gz"), gpus // 2)
        for case in cases([gpus], weeks, quick=options.quick):
            report.rows += _ladder(case, trace, folder, options.seed)
    report.rows += _spread(report.rows)
    promises = _promises(known, options.seed, options.quick)
    report.targets += [Target(f"replayed/promised, {row['kind']}", row["kept"], KEPT, "", "higher") for row in promises]
    report.targets += _savings(report.rows)
    report.rows += promises
    return report


def _ladder(case: Case, trace: traces.Trace, folder: Path, seed: int) -> list[Row]:
    """Each rung with all below it, against the best of the blind ways; nothing of a week of too few jobs."""
    theirs = halves(trace).get(case.clusters)
    rows = [row for row in trace.rows if theirs is None or row.queue in theirs]
    known = apps(folder, case.network)
    work = week(rows, case.week, LOAD, case.gpus, case.idle, known, seed + case.week, tuned=case.tuned)
    if len(work) < FEWEST_JOBS:
        return []
    useful_h = sum(one.useful_gpu_s for one in work) / 3600
    blind = ladder.baselines(work, case.gpus)
    base = before = ladder.best(list(blind.values()))
    found = list[Row]()
    for name, ran in {**blind, "best blind": base, **ladder.rungs(work, case.gpus, seed)}.items():
        paid_usd = case.gpus * ran.done_s / 3600 * ladder.USD_PER_GPU_HOUR
        owned: Row = {
            "owned $/h": round(paid_usd / (ladder.DONE * useful_h), 3),
            "owned saved %": _percent(base.done_s, ran.done_s),
        }
        found.append(
            {
                "gpus": case.gpus, "week": case.week, "clusters": case.clusters, "case": case.what, "jobs": len(work),
                "rung": name,
                "elastic $/h": round(ran.usd / useful_h, 3),
                "elastic saved %": _percent(base.usd, ran.usd),
                "its share": 0.0 if name in blind else round(100 * (before.usd - ran.usd) / base.usd, 1),
                **({} if name == SPOT else owned),
                "p95 h": round(ran.p95_s / 3600, 1),
                "gangs' p95 h": round(ran.gangs_p95_s / 3600, 1),
                "p95 later %": round(-_percent(base.p95_s, ran.p95_s), 1),
            }
        )  # fmt: skip
        before = base if name in blind else ran
    return found


def _percent(before: float, after: float) -> float:
    return round(100 * (1 - after / before), 1) + 0.0  # no minus before a zero


def _spread(rows: Sequence[Row]) -> list[Row]:
    """Of each rung over the usual cases: median, least and most."""
    usual = [row for row in rows if row["case"] == "usual"]
    return [
        {"gpus": gpus, "of": rung, "cases": len(mine), **_over(mine, "elastic saved %"), **_over(mine, "owned saved %")}
        for gpus in dict.fromkeys(row["gpus"] for row in usual)
        for rung in dict.fromkeys(row["rung"] for row in usual)
        if (mine := [row for row in usual if (row["gpus"], row["rung"]) == (gpus, rung)])
    ]


def _over(rows: Sequence[Row], column: str) -> Row:
    values = [row[column] for row in rows if column in row]
    if not values:
        return {}
    return {
        f"{column}, median": round(median(values), 1),
        f"{column}, least": min(values),
        f"{column}, most": max(values),
    }


def _promises(known: Sequence[App], seed: int, quick: bool) -> list[Row]:
    """Of each kind; a case of `defragment` takes half a minute, so the quick form has none."""
    back, together, reserved = (10, 0, 10) if quick else (40, 20, 40)
    of_pools = pools.cases(seed, back=back, together=together, reserved=reserved)
    cases = [*_cases(known, CASES, seed), *(case for case in of_pools if case.promised)]
    number = Counter(case.kind for case in cases)
    return [_kind(kind, cases) for kind in number if number[kind] > 1]  # one half tells the other


def _cases(known: Sequence[App], count: int, seed: int) -> list[kinds.Case]:
    drawn = random.Random(seed)
    found = list[kinds.Case]()
    for _ in range(count):
        found += [
            kinds.idle(drawn),
            kinds.island(drawn, drawn.choice(known)),
            kinds.fewer(drawn, drawn.choice(known)),
            kinds.interval(drawn),
        ]
    return [case for case in found if case.promised]


def _kind(kind: str, cases: Sequence[kinds.Case]) -> Row:
    """The first half of the cases, then the second with what the console learned of the first."""
    mine = [case for case in cases if case.kind == kind]
    early, late = mine[: len(mine) // 2], mine[len(mine) // 2 :]
    told = ((Kind(kind), round(case.promised), round(case.replayed)) for case in early)
    trust = tracking.records(told)[Kind(kind)].trust_ppm / WHOLE_PPM
    return {
        "kind": kind,
        "cases": len(mine),
        "kept at first": round(_kept(early), 3),
        "trust then": round(trust, 3),
        "kept": round(_kept(late) / trust, 3),
        "cases that saved less than 0.9": sum(case.replayed < KEPT * trust * case.promised for case in late),
    }


def _kept(cases: Sequence[kinds.Case]) -> float:
    return sum(case.replayed for case in cases) / sum(case.promised for case in cases)


def _savings(rows: Sequence[Row]) -> list[Target]:
    """Over the usual cases; a rung is late where its p95 is more than a hundredth behind the best blind one."""
    usual = [row for row in rows if row.get("case") == "usual"]
    named = (("elastic", SIZED), ("elastic", SPOT), ("owned", SIZED))
    saved = {pair: [row[f"{pair[0]} saved %"] for row in usual if row["rung"] == pair[1]] for pair in named}
    late = sum(row["p95 later %"] > 1 for row in usual if row["rung"] in ladder.RUNGS)
    return [
        *(
            Target(f"saved, {how}, {rung}, worst", min(all_of), SAVED, "%", "higher")
            for (how, rung), all_of in saved.items()
        ),
        Target("rungs whose p95 completion is later", late, 0, ""),
    ]


if __name__ == "__main__":
    sys.exit(main("tco_replay", measure, add_arguments=main_arguments))
