"""What all benchmarks share: arguments, the JSON result file, the printed table, facts about the host.

A benchmark is `python -m benchmarks.<name> [--data DIR] [--seed N] [--quick] --json FILE`:

    def measure(options: Options) -> Report: ...

    if __name__ == "__main__":
        sys.exit(main("packing", measure))

The result file is `{"name", "git", "host", "quick", "seed", "simulated", "rows", "targets", "notes"}`. `host.yardstick` says how fast the
host is (`benchmarks/yardstick.py`), and targets that depend on that are read through it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from benchmarks.yardstick import Loop, Yardstick, facts, host_yardstick

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_DATA = ROOT.parent / "shared" / "data"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said. `data` is laid out like `../shared/data`."""

    data: Path
    seed: int
    quick: bool
    json_path: Path | None
    extra: argparse.Namespace

    def trace(self, *parts: str) -> Path:
        """A file under `data/traces`."""
        return self.file("traces", *parts)

    def file(self, *parts: str) -> Path:
        """A file under `data`; ends the program with a clear line when it is absent."""
        path = self.data.joinpath(*parts)
        if not path.exists():
            sys.exit(f"{path} does not exist: point --data at a folder laid out like ../shared/data")
        return path


@dataclass(frozen=True, slots=True)
class Target:
    """One promise: the measured `value` against `target` in `unit`; `better` says which direction is good.

    With `per`, the target is stated for the yardstick's reference host, and the value is compared as that host would have shown it: a rate
    times, a time divided by, how many times slower this host runs that loop. Without, the figure does not depend on the host's speed.
    """

    id: str
    value: float
    target: float
    unit: str
    better: Literal["higher", "lower"] = "lower"
    per: Loop | None = None

    def on_reference_host(self, host: Yardstick) -> float:
        slowness = host.slowness(self.per) if self.per else 1.0
        return self.value * slowness if self.better == "higher" else self.value / slowness

    def met(self, host: Yardstick) -> bool:
        """A value that could not be measured (NaN) meets nothing."""
        value = self.on_reference_host(host)
        return value >= self.target if self.better == "higher" else value <= self.target

    def as_json(self, host: Yardstick) -> dict[str, Any]:
        return {
            "id": self.id,
            "value": self.value,
            "on_reference_host": self.on_reference_host(host),
            "per": self.per or "",
            "target": self.target,
            "unit": self.unit,
            "better": self.better,
            "met": self.met(host),
        }


@dataclass(slots=True)
class Report:
    """What a benchmark found: rows for the table, targets, and what in it was simulated."""

    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    simulated: str = ""
    notes: list[str] = field(default_factory=list)


def main(
    name: str,
    measure: Callable[[Options], Report],
    *,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs `measure`, prints its tables, writes the JSON. Returns 0 even when a target is missed: a miss is a result."""
    options = parse(name, measure.__doc__ or "", add_arguments, argv)
    host = host_yardstick()
    load, begun = round(os.getloadavg()[0], 2), time.perf_counter()
    report = measure(options)
    result = as_json(name, options, report, host, load_1min=load, wall_s=time.perf_counter() - begun)
    print_report(result)
    if options.json_path:
        write_json(options.json_path, result)
    return 0


def parse(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> Options:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder laid out like ../shared/data")
    parser.add_argument("--seed", type=int, default=42, help="seed of every random choice (default 42)")
    parser.add_argument("--quick", action="store_true", help="a smaller run that ends within 60 s")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the result here")
    if add_arguments:
        add_arguments(parser)
    found = parser.parse_args(argv)
    return Options(found.data, found.seed, found.quick, found.json, found)


def as_json(
    name: str, options: Options, report: Report, host: Yardstick, *, load_1min: float, wall_s: float
) -> dict[str, Any]:
    """The result file's content; `load_1min` is the host's when the benchmark began, before its own work counted."""
    return {
        "name": name,
        "git": git_revision(),
        "host": host_facts() | {"load_1min": load_1min, "yardstick": facts(host)},
        "quick": options.quick,
        "seed": options.seed,
        "wall_s": round(wall_s, 2),
        "simulated": report.simulated,
        "rows": report.rows,
        "targets": [target.as_json(host) for target in report.targets],
        "notes": report.notes,
    }


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Written whole or not at all: a benchmark that is stopped leaves the last result intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN; null says "not measured"."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if hasattr(value, "item"):  # a NumPy scalar
        return _finite(value.item())
    return value


def git_revision() -> str:
    """The commit, with "+changes" when tracked files differ from it; "" outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def host_facts() -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that identifies the machine."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "libraries": {n: v for n in ("numpy", "numba", "grpcio", "torch") if (v := _version(n))},
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def print_report(result: Mapping[str, Any]) -> None:
    quick = " (quick)" if result["quick"] else ""
    slowness = ", ".join(f"{loop} {times:.2f}" for loop, times in result["host"]["yardstick"]["slowness"].items())
    print(
        f"{result['name']}{quick}: {result['host']['cpu']}, {result['wall_s']:.1f} s, load {result['host']['load_1min']}"
    )
    print(f"this host's loops take, as multiples of the reference host's: {slowness}")
    if result["simulated"]:
        print(f"simulated: {result['simulated']}")
    print_table(result["rows"])
    if result["targets"]:
        print()
        print_table([_target_row(t) for t in result["targets"]])
    for note in result["notes"]:
        print(f"note: {note}")


def _target_row(target: Mapping[str, Any]) -> Row:
    return {
        "target": target["id"],
        "value": target["value"],
        "on the reference host": target["on_reference_host"] if target["per"] else "",
        "wanted": wanted(target),
        "met": "yes" if target["met"] else "NO",
    }


def wanted(target: Mapping[str, Any]) -> str:
    """A target of a result file in words: ">= 10,000 /s per python loop"."""
    sign = ">=" if target["better"] == "higher" else "<="
    per = f" per {target['per']} loop" if target["per"] else ""
    return f"{sign} {show(target['target'])} {target['unit']}".rstrip() + per


def print_table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Plain columns in order of first appearance; numbers to the right."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return
    cells = [[show(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    numeric = [any(isinstance(row.get(c), int | float) for row in rows) for c in columns]
    for line in [columns, *cells]:
        padded = (
            text.rjust(w) if right else text.ljust(w) for text, w, right in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(padded).rstrip())


def show(value: Any) -> str:
    """Four significant digits are what these measurements carry."""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile: an observed value, never an interpolation; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return float(ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)])
