"""What isolation costs when a task starts: the same start as the agent's user, as a user of its own, and with a view of its own.

From the agent's order to the moment when every rank has become its program, and to its end with nothing left; starts of the three
kinds take turns, so that what else the host does meets all of them. Needs root; otherwise only the first kind is measured, and said so.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Options, Report, Row, Target, main, percentile
from whaleflux_agent.core.task_users import IsolationSettings
from whaleflux_agent.isolation import Isolation, with_user
from whaleflux_agent.runtime.api import LaunchPlan, RankPlan
from whaleflux_agent.runtime.process import ProcessRuntime
from whaleflux_agent.state import TaskMeta

STARTS = {"quick": 20, "full": 100}
RANKS = (1, 8)
JOB = "queues/bench/jobs/one"
ADDED_MS = 25.0  # to a start of 8 ranks: a tenth of what a person notices, and nothing beside loading PyTorch (seconds)
KINDS = ("as the agent", "own user", "own user and view")


@dataclass(slots=True)
class Starts:
    """Starts tasks of one kind."""

    kind: str
    isolation: Isolation
    state: Path
    number: int = 0

    async def one(self, ranks: int) -> tuple[float, float]:
        """Milliseconds until its ranks run, and from then until nothing is left of it."""
        self.number += 1
        task = f"one-{self.number}-{ranks}"
        folder = self.state / "tasks" / task
        folder.mkdir(parents=True)
        began = time.perf_counter()
        plan = await asyncio.to_thread(self._plan, task, folder, ranks)
        running = await ProcessRuntime().start(plan)
        started = time.perf_counter()
        codes = [ended.code async for ended in running.exits()]
        while not await running.gone():
            await asyncio.sleep(0.001)
        await asyncio.to_thread(self._clean, task, folder)
        if any(codes):
            raise RuntimeError(f"{self.kind}: ranks ended with {codes}; see {folder}")
        shutil.rmtree(folder)
        return 1000 * (started - began), 1000 * (time.perf_counter() - started)

    def _plan(self, task: str, folder: Path, ranks: int) -> LaunchPlan:
        folders = self.isolation.folders
        user = self.isolation.user_for(task, JOB)
        self.meta = with_user(TaskMeta(task), user, folders.tmp_for(folder, task))
        work = self.state / "work" / "one"
        work.mkdir(exist_ok=True, parents=True)
        folders.own(self.meta, folder, [], [work])
        environment = (("PATH", os.defpath), ("WHALEFLUX_TASK_TOKEN", task))
        plans = tuple(RankPlan(rank, ("true",), environment, folder / f"rank-{rank}.log") for rank in range(ranks))
        wall = self.isolation.wall(self.meta, {str(work): "rw"})
        return LaunchPlan(task, task, folder, plans, str(work), wall=wall)

    def _clean(self, task: str, folder: Path) -> None:
        self.isolation.folders.clean(self.meta, folder)
        self.isolation.forget(task)

    meta: TaskMeta = TaskMeta("")  # noqa: RUF009  # frozen


def kinds(folder: Path) -> Iterator[Starts]:
    for number, kind in enumerate(KINDS):
        state = folder / str(number)
        state.mkdir(mode=0o711)
        wanted = "none" if number == 0 else "auto"
        settings = IsolationSettings(wanted=wanted, private_folders=number == 2)
        isolation = Isolation(settings, state, state / "checkpoints")
        if number == 0 or (isolation.kind == "uid" and isolation.private == settings.private_folders):
            yield Starts(kind, isolation, state)


async def sample(starts: list[Starts], count: int) -> dict[tuple[str, int], list[tuple[float, float]]]:
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(count + 1):
        for ranks in RANKS:
            for one in starts:
                took = await one.one(ranks)
                if turn:  # the first of each warms caches
                    found.setdefault((one.kind, ranks), []).append(took)
    return found


def measure(options: Options) -> Report:
    """Milliseconds to start and to end a task, by kind of isolation and number of ranks."""
    folder = Path(tempfile.mkdtemp(prefix="wf-isolation-", dir="/var/tmp"))  # users of tasks pass through it
    folder.chmod(0o711)
    try:
        starts = list(kinds(folder))
        found = asyncio.run(sample(starts, STARTS["quick" if options.quick else "full"]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report(found)


def report(found: dict[tuple[str, int], list[tuple[float, float]]]) -> Report:
    rows: list[Row] = []
    for (kind, ranks), took in found.items():
        start, end = [one[0] for one in took], [one[1] for one in took]
        rows.append(
            {
                "ranks": ranks,
                "isolation": kind,
                "start ms p50": statistics.median(start),
                "start ms p99": percentile(start, 99),
                "end ms p50": statistics.median(end),
            }
        )
    medians = {(row["isolation"], row["ranks"]): row["start ms p50"] for row in rows}
    bare, walled = (medians.get((kind, RANKS[-1]), float("nan")) for kind in (KINDS[0], KINDS[-1]))
    notes = ["ends include sweeping what an attempt left in shared folders"]
    if len({row["isolation"] for row in rows}) < len(KINDS):
        notes.append("not measured: isolation needs root, and a host that lets namespaces be made")
    return Report(
        rows=rows,
        targets=[Target("added_to_a_start", walled - bare, ADDED_MS, "ms", per="python")],
        notes=notes,
        simulated="",
    )


if __name__ == "__main__":
    sys.exit(main("isolation_start", measure))
