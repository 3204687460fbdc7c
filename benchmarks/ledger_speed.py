"""The usage ledger: what reports cost until their hour is closed, how soon dashboards are answered, and whether a killed ledger loses anything.

Reports, bills and fleets are made up; NATS, etcd, files and the ledger are the production ones. CPU is that of the console's process, with
all its threads; a share of a core is CPU seconds for each second's worth of reports. `month`: 16,384 GPUs at a sample a minute; so many hours
of the 720 are really appended, rolled up and closed, and what that costs is multiplied. Kills: SIGKILL at a random moment of a process that
appends, tells, closes and rolls up as fast as it can; then every report, hour and fact that it had acknowledged is looked for, and each file read.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Options, Report, Target, main, percentile
from benchmarks.ledger_lab import console, killing, questions, rates
from benchmarks.ledger_lab.fleet import MadeFleet
from benchmarks.ledger_lab.servers import an_etcd
from whaleflux.store.etcd import EtcdStore
from whaleflux_console.ledger.manifest import DAY_MS

MONTH_GPUS, MONTH_HOURS = 16_384, 720
QUICK_GPUS = 2_048
KILLS, QUICK_KILLS = 200, 4
YEAR_DAYS, QUICK_YEAR_DAYS = 365, 60


def measure(options: Options) -> Report:
    """What the ledger costs, answers and survives."""
    logging.disable(logging.WARNING)
    report = Report(simulated="agents, GPUs, jobs and bills are made up")
    parts = (_rates, _month, _questions, _kills)
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="ledger-speed-") as folder:
            asyncio.run(part(report, Path(folder), options))
    return report


async def _rates(report: Report, folder: Path, options: Options) -> None:
    nodes = 125 if options.quick else 1_250
    found = await rates.end_to_end(folder, nodes, 6 if options.quick else 12, options.seed)
    core = found.cpu_s / found.rows * 1_000
    report.rows.append(
        {"what": "stream to closed hour", "rows": found.rows, "cpu_s": round(found.cpu_s, 2), "wall_s": round(found.wall_s, 2),
         "bytes_per_row": round(found.bytes / found.rows, 1)}
    )  # fmt: skip
    report.targets += [
        Target("core_share_at_1000_rows_per_s", core, 0.03, "cores", per="python"),
        Target("rows_per_s_sustained", found.rows / found.wall_s, 10_000, "rows/s", "higher", per="python"),
    ]


async def _month(report: Report, folder: Path, options: Options) -> None:
    hours = 1 if options.quick else 6
    found = await rates.month(folder, MONTH_GPUS, hours, options.seed)
    times = MONTH_HOURS / hours
    report.rows.append(
        {"what": f"{hours} h of {MONTH_GPUS} GPUs by minute", "rows": found.rows, "append_cpu_s": round(found.append_cpu_s, 1),
         "close_cpu_s": round(found.close_cpu_s, 1), "bytes_per_row": round(found.bytes / found.rows, 1)}
    )  # fmt: skip
    cpu_h = (found.append_cpu_s + found.close_cpu_s) * times / 3_600
    report.notes.append(
        f"month: {hours} of {MONTH_HOURS} hours were done ({found.rows:,} of {found.rows * times:,.0f} samples); CPU of the month is that times {times:.0f}"
    )
    report.targets += [
        Target("month_of_16384_gpus_cpu", cpu_h, 12.0, "h", per="numpy"),
        Target("month_of_16384_gpus_peak_memory", found.peak_bytes / (1 << 30), 2.0, "GiB"),
    ]


async def _questions(report: Report, folder: Path, options: Options) -> None:
    """By CostService of a console process, while it closes hours and after that."""
    fleet, days = MadeFleet(cards=512 if options.quick else 2_048), QUICK_YEAR_DAYS if options.quick else YEAR_DAYS
    busy = console.BusyConsole(folder, QUICK_GPUS if options.quick else MONTH_GPUS, options.seed)
    async with an_etcd(folder) as endpoint:
        store = EtcdStore([endpoint])
        rows = await busy.fill(store, fleet, days, 3 if options.quick else 35)
        await store.close()
        asked = questions.questions(busy.end_ms - days * DAY_MS, days)
        requests = {name: console.request_of(question) for name, question in asked}
        async with busy.running(endpoint) as stub:
            taken = await console.ask(busy, stub, requests, 3 if options.quick else 25)
    for name in requests:
        closing, after = taken.closing[name], taken.after[name]
        report.rows.append(
            {"what": name, "p50_ms": round(percentile(after, 50), 1), "p95_ms": round(percentile(after, 95), 1),
             "p95_ms_while_closing": round(percentile(closing, 95), 1)}
        )  # fmt: skip
    closing = [ms for each in taken.closing.values() for ms in each]
    report.rows.append(
        {"what": f"closing hours of {busy.gpus} GPUs", "wall_s": round(taken.closing_s, 1), "answers": len(closing),
         "light_p95_ms": round(percentile(taken.light, 95), 1), "light_max_ms": round(max(taken.light), 1)}
    )  # fmt: skip
    report.notes.append(
        f"questions: a year of {days} days, {fleet.jobs} jobs at a time on {fleet.cards} cards, {rows:,} rows, asked by CostService over mTLS"
    )
    report.targets += [
        Target("worst_question_p95", max(percentile(each, 95) for each in taken.after.values()), 200.0, "ms", per="python"),
        Target("answers_p95_while_an_hour_is_closed", percentile(closing, 95), 200.0, "ms", per="python"),
        Target("light_call_p95_while_an_hour_is_closed", percentile(taken.light, 95), 100.0, "ms", per="python"),
        Target("start_of_the_console_to_its_first_answer", taken.opened_s, 30.0, "s", per="python"),
    ]  # fmt: skip


async def _kills(report: Report, folder: Path, options: Options) -> None:
    rounds = QUICK_KILLS if options.quick else KILLS
    async with an_etcd(folder) as endpoint:
        said = await killing.kill_again_and_again(endpoint, folder / "ledger", rounds, random.Random(options.seed))
        faults = await killing.faults(endpoint, folder / "ledger", said)
    report.notes += [f"after kills: {fault}" for fault in faults[:10]]
    report.rows.append(
        {
            "what": f"{said.rounds} kills",
            "reports": said.reports,
            "hours": len(said.closed),
            "facts": len(said.told),
            "faults": len(faults),
        }
    )
    report.targets.append(Target(f"faults_after_{rounds}_kills", len(faults), 0, "acknowledged things"))


if __name__ == "__main__":
    sys.exit(main("ledger_speed", measure))
