"""A simulation's figures as tables for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from whaleflux.quantities import shown_duration
from whaleflux_scheduler.simulation.results import Group, Summary

MOST_QUEUES = 20


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells, the first to the left, the others to the right; the first row is the header."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """3d4h, 12s, 0.4s; "-" for what is not known."""
    if math.isnan(seconds):
        return "-"
    return f"{seconds:.2g}s" if 0 < seconds < 1 else shown_duration(seconds)


def groups(title: str, found: Iterable[Group], most: int = MOST_QUEUES) -> str:
    """Waits and completion times by group; of more than `most` groups those with the longest p99 wait."""
    listed = list(found)
    shown = listed
    if len(listed) > most:
        longest = sorted(listed, key=lambda group: -_number(group.wait_p99_s))[:most]
        shown = [group for group in listed if group in longest]
    header = [title, "JOBS", "WAIT MEAN", "P50", "P95", "P99", "MOST", "COMPLETION MEAN", "P99", "GPU-HOURS"]
    lines = table([header, *map(_group, shown)])
    rest = len(listed) - len(shown)
    return lines + (f"\nand {rest} more, which waited less at p99 (all with -o json)" if rest else "")


def _number(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _group(group: Group) -> list[str]:
    waits = (group.wait_mean_s, group.wait_p50_s, group.wait_p95_s, group.wait_p99_s, group.wait_most_s)
    done = (group.completion_mean_s, group.completion_p99_s)
    return [group.name, f"{group.jobs:,}", *map(duration, (*waits, *done)), f"{group.gpu_hours:,.0f}"]


Line = tuple[str, Callable[[Summary], str], Callable[[Summary], float] | None]
_LINES: tuple[Line, ...] = (
    ("jobs", lambda s: f"{s.jobs:,}: {_jobs(s)}", None),
    ("makespan", lambda s: duration(s.makespan_s), lambda s: s.makespan_s),
    ("wait, mean", lambda s: duration(s.overall.wait_mean_s), lambda s: s.overall.wait_mean_s),
    ("wait, p99", lambda s: duration(s.overall.wait_p99_s), lambda s: s.overall.wait_p99_s),
    ("completion, mean", lambda s: duration(s.overall.completion_mean_s), lambda s: s.overall.completion_mean_s),
    ("utilisation", lambda s: _percent(s.utilisation), lambda s: s.utilisation),
    ("busy", lambda s: f"{s.busy_gpu_hours:,.0f} GPU-hours", lambda s: s.busy_gpu_hours),
    ("idle", lambda s: f"{s.idle_gpu_hours:,.0f} GPU-hours", lambda s: s.idle_gpu_hours),
    ("held in vain", lambda s: _known(s.wasted_gpu_hours, "GPU-hours"), lambda s: s.wasted_gpu_hours),
    ("preemptions", lambda s: f"{s.suspensions:,}", lambda s: s.suspensions),
    ("lost to nodes", lambda s: f"{s.recoveries:,} attempts", lambda s: s.recoveries),
    ("promised starts", lambda s: f"{s.promised:,}, {s.promises_violated:,} broken", lambda s: s.promises_violated),
    ("fleet", lambda s: f"${s.fleet_usd:,.0f}, of which idle ${s.idle_usd:,.0f}", lambda s: s.fleet_usd),
    ("jobs' bill", lambda s: f"${s.job_usd:,.0f}", lambda s: s.job_usd),
    ("moves", lambda s: f"{s.moves:,}, digest {s.moves_digest}", None),
)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _jobs(summary: Summary) -> str:
    parts = (("succeeded", summary.succeeded), ("failed", summary.failed), ("not done", summary.unfinished))
    counts = ", ".join(f"{count:,} {what}" for what, count in parts if count) or "none"
    return counts + (f" ({summary.never_started:,} never started)" if summary.never_started else "")


def _known(value: float, unit: str) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f} {unit}"


def overview(summary: Summary) -> str:
    """All in a few lines."""
    width = max(len(name) for name, _, _ in _LINES)
    return "\n".join(f"{name:<{width}}  {show(summary)}" for name, show, _ in _LINES)


def comparison(first: str, summary: Summary, second: str, other: Summary) -> str:
    """Two of the same workload, or of the same cluster, side by side."""
    rows = [["", first, second, "CHANGE"]]
    for name, show, value in _LINES:
        rows.append([name, show(summary), show(other), _change(value(summary), value(other)) if value else ""])
    return table(rows)


def _change(before: float, after: float) -> str:
    if math.isnan(before) or math.isnan(after):
        return "-"
    if before == after:
        return "same"
    return f"{100 * (after - before) / before:+.1f} %" if before else f"{after - before:+,.4g}"
