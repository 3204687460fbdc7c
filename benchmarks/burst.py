"""Rented machines: what a crash or a failing provider leaves behind, how soon another offer is asked, and what renting saves and costs.

Waits and dollars are of Philly's jobs at 1.3 times what 64 owned GPUs can take, every n-th of them that runs for a minute to twelve hours. The rule
was made by looking at every 68th job from the 1st, 7th and 42nd on, and at the jobs from 5,000, 30,000 and 60,000 on; `..._held_out` is of others. The
least that could be paid for unused
machines is what who knows the future would pay for work at the same times: of each level, a boot or the idle time before it, whichever is
shorter (`policies.least_unused_h`). What is paid counts in whole billing units, the least does not.
"""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.burst_lab import crashes, rounds
from benchmarks.burst_lab.cloud import HARSH, Faults
from benchmarks.burst_lab.crashes import Outcome
from benchmarks.burst_lab.policies import Played, Policy, play
from benchmarks.common import Options, Report, Target, main
from benchmarks.scheduler_speed import fleet
from tests.support import virtual_time
from tests.support.virtual_time import LoopClock
from whaleflux_scheduler.core.burst import BurstRules
from whaleflux_scheduler.simulation import traces
from whaleflux_scheduler.simulation.workload import Submission

SEEDS, QUICK_SEEDS = 1000, 16
JOBS, NODES, LOAD, MACHINES = 1200, 8, 1.3, 24
WEEKS = (10_000, 20_000, 40_000, 50_000, 70_000)  # rows of the trace, in the order of time
QUICK = (
    "--quick has few seeds of crashes and no held-out weeks. It plays as many jobs as the full form: of a quarter of them no queue grows that is worth "
    "a machine, and p95_wait_share_of_never is anything from 0.3 to 1"
)
OLD_LEASES = (0, 1_000, 10_000)
SHORTEST_S, LONGEST_S = 60.0, 12 * 3600.0
POLICIES = (
    Policy("never"),
    Policy("whaleflux", BurstRules(usd_per_gpu_hour=2.0)),
    Policy("ski-rental rule alone", BurstRules(usd_per_gpu_hour=2.0), learns=False),
    Policy("for all who wait", BurstRules(usd_per_gpu_hour=1e6, after_s=0.0)),
    Policy("always three machines", always=3),
)
NONE = Faults()
OFTEN = replace(HARSH, no_stock=0.05, lost_after=0.3, duplicate=0.3, late=0.2, zombie=0.5)
REGIMES: dict[str, Faults] = {
    "no fault, killed": NONE,
    "every fault, killed": HARSH,
    "made and not answered, killed": OFTEN,
    "the same, tokens not kept": replace(OFTEN, keeps_tokens=False),
}


def measure(options: Options) -> Report:
    """Kills the keeper of leases at drawn steps, over clouds that fail, and looks for machines that are left."""
    logging.disable(logging.WARNING)  # each lost reply is one
    said = "the cloud, nodes, boots, prices and time; the keeper with its records, the planner and the policy are the real ones"
    report = Report(simulated=said)
    seeds = QUICK_SEEDS if options.quick else SEEDS
    every = list[Outcome]()
    for at, (name, faults) in enumerate(REGIMES.items()):
        of_regime = range(at, seeds, len(REGIMES))
        began_s = time.process_time()
        found = [_play(options.seed + seed, faults) for seed in of_regime]
        report.rows.append(_row(name, found, time.process_time() - began_s))
        every += found
    report.targets = _targets(every)
    _add_rounds(report)
    _add_policies(options, report)
    if options.quick:
        report.notes.append(QUICK)
    else:
        _add_weeks(options, report)
    return report


def _add_rounds(report: Report) -> None:
    """What a round of the keeper costs beside what was rented in a month."""
    took = {old: virtual_time.run(rounds.round_ms(old)) for old in OLD_LEASES}
    report.rows += [{"leases_that_are_over": old, "round_ms_cpu": round(ms, 2)} for old, ms in took.items()]
    report.targets.append(Target("round_over_one_without_old_leases", took[OLD_LEASES[-1]] / took[0], 1.5, "x"))


def _add_weeks(options: Options, report: Report) -> None:
    """Parts of the trace that had no part in making the rule, all of them together."""
    rows = traces.read(options.trace("pollux", "philly.csv.gz"), NODES * 8).rows
    found = list[Played]()
    for begin in WEEKS:
        some = tuple(row for row in rows[begin : begin + JOBS] if SHORTEST_S <= row.run_s <= LONGEST_S)
        trace = traces.Trace(some).at_load(LOAD, NODES * 8)
        found.append(play(fleet(NODES), partial(_submissions, trace), POLICIES[1], MACHINES))
        report.rows.append(_policy_row(f"whaleflux, jobs from {begin:,} on", found[-1]))
    unused_h = sum(one.paid_h - one.used_h for one in found)
    least_h = sum(one.least_unused_h for one in found)
    report.targets.append(Target("unused_hours_over_least_held_out", unused_h / least_h, 1.3, "x"))


def _submissions(trace: traces.Trace) -> list[Submission]:
    return list(trace.submissions())


def _add_policies(options: Options, report: Report) -> None:
    """Each policy on the same jobs."""
    rows = traces.read(options.trace("pollux", "philly.csv.gz"), NODES * 8).rows
    every = max(1, len(rows) // JOBS)
    some = tuple(row for row in rows[options.seed % every :: every] if SHORTEST_S <= row.run_s <= LONGEST_S)
    trace = traces.Trace(some).at_load(LOAD, NODES * 8)
    played = {one.name: play(fleet(NODES), lambda: list(trace.submissions()), one, MACHINES) for one in POLICIES}
    report.rows += [_policy_row(name, found) for name, found in played.items()]
    ours, never, always = played["whaleflux"], played["never"], played["for all who wait"]
    report.targets += [
        Target("p95_wait_share_of_never", _p95(ours) / _p95(never), 0.2, "x"),
        Target("usd_share_of_for_all_who_wait", ours.usd / always.usd, 1.0, "x"),
        Target("unused_hours_over_least", (ours.paid_h - ours.used_h) / ours.least_unused_h, 1.3, "x"),
        Target("paid_hours_over_least", ours.paid_h / (ours.used_h + ours.least_unused_h), 1.3, "x"),
    ]


def _policy_row(name: str, found: Played) -> dict[str, object]:
    return {
        "policy": name,
        "jobs": len(found.waits_s),
        "wait_min_mean": round(sum(found.waits_s) / len(found.waits_s) / 60, 1),
        "wait_min_p95": round(_p95(found) / 60, 1),
        "usd": round(found.usd),
        "rentals": found.rentals,
        "paid_h": round(found.paid_h, 1),
        "unused_h": round(found.paid_h - found.used_h, 2),
        "least_unused_h": round(found.least_unused_h, 2),
    }


def _p95(found: Played) -> float:
    waits = sorted(found.waits_s)
    return waits[int(0.95 * (len(waits) - 1))]


def _play(seed: int, faults: Faults) -> Outcome:
    draw = random.Random(seed)
    crash_at = [draw.randint(1, 40) for _ in range(draw.randint(1, 8))]

    async def go() -> Outcome:
        return await crashes.run(LoopClock(), seed, faults, crash_at)

    return virtual_time.run(go())


def _row(name: str, found: Sequence[Outcome], cpu_s: float) -> dict[str, object]:
    return {
        "provider": name,
        "seeds": len(found),
        "crashes": sum(one.crashes for one in found),
        "machines": sum(one.machines for one in found),
        "strays": sum(one.strays for one in found),
        "leaked": sum(one.leaked for one in found),
        "joined_twice": sum(one.double for one in found),
        "found_late": sum(one.late for one in found),
        "found_s_max": round(max(one.worst_found_s for one in found), 1),
        "failover_s_max": round(_most([one.failover_s for one in found]), 1),
        "notice_to_drained_s_max": round(_most([one.notice_s for one in found]), 1),
        "cpu_s": round(cpu_s, 1),
    }


def _most(times: Sequence[Sequence[float]]) -> float:
    return max((one for of_seed in times for one in of_seed), default=0.0)


def _targets(every: Sequence[Outcome]) -> list[Target]:
    failovers = [one for seen in every for one in seen.failover_s]
    return [
        Target("machines_leaked", sum(one.leaked for one in every), 0, "machines"),
        Target("leases_not_ended", sum(one.unended for one in every), 0, "leases"),
        Target("machines_joined_twice", sum(one.double for one in every), 0, "machines"),
        Target("found_again_s_max", max(one.worst_found_s for one in every), crashes.FOUND_S, "s"),
        Target("failover_s_max", max(failovers, default=0.0), 10.0, "s"),
        Target("notice_to_drained_s_max", _most([one.notice_s for one in every]), 30.0, "s"),
    ]


if __name__ == "__main__":
    sys.exit(main("burst", measure))
