"""The fewest GPUs with which no schedule could do: what has to run at one instant so that nobody waits longer than allowed.

Without suspensions a job that may wait for D after its submission and runs for longer than D runs in any schedule from its submission + D to its
submission + its run time. Of each group (tenant) some jobs may wait for as long as they like: a p99 is no promise to all. Which, is chosen
anew for each instant as suits the schedule best, and neither nodes nor what came before are looked at: so no planner, however much it
knew beforehand, gets below this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BoundJob:
    """Seconds; `longest_wait_s` is what its group may wait."""

    at_s: float
    run_s: float
    gpus: int
    group: str
    longest_wait_s: float


def fewest_gpus(jobs: Iterable[BoundJob], excused: Mapping[str, int], until_s: float) -> int:
    """At the worst instant up to `until_s`; of each group so many jobs are excused."""
    must = [job for job in jobs if job.run_s > job.longest_wait_s]
    changes = [(job.at_s + job.longest_wait_s, 1, job) for job in must]
    changes += [(job.at_s + job.run_s, 0, job) for job in must]
    runs: dict[str, list[int]] = {}
    needed: dict[str, int] = {}
    most = 0
    for at_s, begins, job in sorted(changes, key=lambda change: change[:2]):
        if at_s > until_s:
            break
        group = runs.setdefault(job.group, [])
        group.append(job.gpus) if begins else group.remove(job.gpus)
        needed[job.group] = sum(sorted(group, reverse=True)[excused.get(job.group, 0) :])
        most = max(most, sum(needed.values()))
    return most
