"""Rented machines: what a crash or a failing provider leaves behind, and how soon another offer is asked."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.burst_lab import crashes
from benchmarks.burst_lab.cloud import HARSH, Faults
from benchmarks.burst_lab.crashes import Outcome
from benchmarks.common import Options, Report, Target, main
from tests.support import virtual_time
from tests.support.virtual_time import LoopClock

SEEDS, QUICK_SEEDS = 1000, 40
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
    report = Report(simulated="the cloud, nodes and time; the keeper, its rules and its records are the real ones")
    seeds = QUICK_SEEDS if options.quick else SEEDS
    every = list[Outcome]()
    for at, (name, faults) in enumerate(REGIMES.items()):
        of_regime = range(at, seeds, len(REGIMES))
        began_s = time.process_time()
        found = [_play(options.seed + seed, faults) for seed in of_regime]
        report.rows.append(_row(name, found, time.process_time() - began_s))
        every += found
    report.targets = _targets(every)
    return report


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
        Target("found_again_s_max", max(one.worst_found_s for one in every), crashes.SWEEP_S, "s"),
        Target("failover_s_max", max(failovers, default=0.0), 10.0, "s"),
        Target("notice_to_drained_s_max", _most([one.notice_s for one in every]), 30.0, "s"),
    ]


if __name__ == "__main__":
    sys.exit(main("burst", measure))
