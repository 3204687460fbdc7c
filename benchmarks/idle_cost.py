"""What a suite costs that has nothing to do: CPU and memory of each process of `whaleflux up`, and of an agent without work.

Nothing runs, nothing is asked, so all that is seen is what keeps the suite alive: leases, heartbeats, signs of life on watches, timers.
CPU is user and system time over the whole window, from /proc, as a share of one core. The target of the suite's memory is read by the sum
of the proportional set sizes (PSS: a page shared by n processes counts 1/n in each): the six processes of Python map the same 30 MB of
libraries, which the machine holds once. The sum of the resident set sizes (RSS), which counts them six times, is stated beside it: it is what
the same processes would take on machines of their own. An agent is read by its RSS: on its own node it shares with nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Options, Report, Row, Target, main
from whaleflux.context import Context
from whaleflux.demo.fleet import DemoFleet, Machine
from whaleflux.sdk.client import AsyncClient

SUITE_CPU_PERCENT, SUITE_MB = 3.0, 500.0
AGENT_CPU_PERCENT, AGENT_MB = 0.5, 80.0
SETTLE_S = {"quick": 5.0, "full": 20.0}
WINDOW_S = {"quick": 20.0, "full": 60.0}
READY_S = 120.0
AGENTS = (Machine("idle", "simulated", "h200x8"), Machine("idle", "no-driver", ""))
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process has used so far, and what it holds now."""

    cpu_s: float
    switches: int  # voluntary ones of all its threads: how often something woke up
    threads: int
    pss_mb: float
    rss_mb: float


def usage(pid: int) -> Usage:
    """Read from /proc. Raises OSError when the process has ended."""
    folder = Path("/proc", str(pid))
    after_name = (folder / "stat").read_text().rpartition(")")[2].split()
    memory = _fields((folder / "smaps_rollup").read_text())
    tasks = list((folder / "task").iterdir())
    return Usage(
        cpu_s=(int(after_name[11]) + int(after_name[12])) / _TICKS_PER_S,
        switches=sum(_fields((task / "status").read_text())["voluntary_ctxt_switches"] for task in tasks),
        threads=len(tasks),
        pss_mb=memory["Pss"] / 1000,
        rss_mb=memory["Rss"] / 1000,
    )


def _fields(text: str) -> dict[str, int]:
    """The numbers of "Name:  123 kB" lines."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: int(rest.split()[0]) for name, rest in pairs if rest.split() and rest.split()[0].isdigit()}


def watch(pids: dict[str, int], seconds: float) -> list[Row]:
    """A row per process: what it used in the next `seconds`, most CPU first."""
    before, begun = {name: usage(pid) for name, pid in pids.items()}, time.monotonic()
    time.sleep(seconds)
    after, passed_s = {name: usage(pid) for name, pid in pids.items()}, time.monotonic() - begun
    rows = [_row(name, before[name], after[name], passed_s) for name in pids]
    return sorted(rows, key=lambda row: -row["cpu %"])


def _row(name: str, before: Usage, after: Usage, passed_s: float) -> Row:
    return {
        "process": name,
        "cpu %": 100 * (after.cpu_s - before.cpu_s) / passed_s,
        "wake-ups/s": (after.switches - before.switches) / passed_s,
        "threads": after.threads,
        "PSS MB": after.pss_mb,
        "RSS MB": after.rss_mb,
    }


def total(name: str, rows: list[Row]) -> Row:
    sums = {key: sum(row[key] for row in rows) for key in rows[0] if key != "process"}
    return {"process": name, **sums}


@contextlib.contextmanager
def suite(state: Path) -> Iterator[int]:
    """`whaleflux up` until the end of the block; gives its pid once everything serves."""
    with (state / "up.log").open("ab") as log:
        argv = [sys.executable, "-m", "whaleflux.cli", "up", "--no-register", "--state", str(state)]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_S
        while not (state / "context.json").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the suite did not start:\n{(state / 'up.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def parts(state: Path, supervisor: int) -> dict[str, int]:
    """Pids of the suite's processes by name."""
    found = {file.stem: int(file.read_text().split()[0]) for file in (state / "run").glob("*.pid")}
    return {"whaleflux up": supervisor} | {name: pid for name, pid in found.items() if pid != supervisor}


async def start_agents(fleet: DemoFleet, context_file: Path) -> dict[str, int]:
    async with AsyncClient.from_context(context_file) as client:
        await fleet.join(client, AGENTS)
    return {f"agent, {machine.node}": fleet.agents[machine.name].pid for machine in AGENTS}


def measure(options: Options) -> Report:
    """CPU and memory of an idle suite, process by process, and of idle agents with and without a driver."""
    mode = "quick" if options.quick else "full"
    with tempfile.TemporaryDirectory(prefix="wf-") as folder, suite(Path(folder)) as supervisor:
        state = Path(folder)
        time.sleep(SETTLE_S[mode])
        rows = watch(parts(state, supervisor), WINDOW_S[mode])
        fleet = DemoFleet(state, Context.load(state / "context.json"))
        try:
            pids = asyncio.run(start_agents(fleet, state / "context.json"))
            time.sleep(2 * SETTLE_S[mode])
            agents = watch(pids, WINDOW_S[mode])
        finally:
            fleet.stop()
    return report(rows, agents)


def _both_sizes(whole: Row) -> str:
    pss, rss = whole["PSS MB"], whole["RSS MB"]
    return f"the suite holds {pss:.0f} MB PSS, by which its target is read, and {rss:.0f} MB RSS, which counts shared pages in each process"


def report(suite_rows: list[Row], agent_rows: list[Row]) -> Report:
    whole = total("the suite", suite_rows)
    targets = [
        Target("suite_cpu", whole["cpu %"], SUITE_CPU_PERCENT, "% of a core", per="python"),
        Target("suite_memory", whole["PSS MB"], SUITE_MB, "MB (PSS)"),
    ]
    for row in sorted(agent_rows, key=lambda row: str(row["process"])):
        targets += [
            Target(f"cpu ({row['process']})", row["cpu %"], AGENT_CPU_PERCENT, "% of a core", per="python"),
            Target(f"memory ({row['process']})", row["RSS MB"], AGENT_MB, "MB (RSS)"),
        ]
    return Report(
        rows=[*suite_rows, whole, *agent_rows],
        targets=targets,
        simulated="the GPUs of one of the two agents",
        notes=[
            _both_sizes(whole),
            "the suite is measured before the agents join; wake-ups are voluntary context switches of all threads",
        ],
    )


if __name__ == "__main__":
    sys.exit(main("idle_cost", measure))
