"""One table of all targets, met or missed, from the result files of the last runs: `python -m benchmarks.run --report`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Row, show, wanted
from benchmarks.doors import DOORS, NO_DOOR

Result = Mapping[str, Any]

INTRODUCTION = """Written by `python -m benchmarks.run --report`. A target per loop is stated for the reference host and read through the
yardstick of the host that ran it (`benchmarks/yardstick.py`); the others do not depend on the host's speed."""


def read_results(folder: Path, names: Iterable[str]) -> dict[str, Result | None]:
    """The result of each benchmark, in the order of `names`; None for one that was not run here."""
    return {name: _read(folder / f"{name}.json") for name in names}


def _read(path: Path) -> Result | None:
    if not path.exists():
        return None
    result: Result = json.loads(path.read_text(encoding="utf-8"))
    return result


def target_rows(results: Mapping[str, Result | None]) -> list[Row]:
    """A row per target; one row for a benchmark that was not run or has no target, so that nothing is passed over in silence."""
    return [row for name, result in results.items() for row in _rows_of(name, result)]


def _rows_of(name: str, result: Result | None) -> list[Row]:
    if result is None:
        return [_row(name, met="not run")]
    how = "quick" if result["quick"] else "full"
    if not result["targets"]:
        return [_row(name, run=how, met="no target")]
    return [_target_row(name, how, target) for target in result["targets"]]


def _target_row(name: str, how: str, target: Mapping[str, Any]) -> Row:
    measured = f"{_shown(target['value'])} {target['unit']}".rstrip()
    read = _shown(target["on_reference_host"]) if target["per"] else ""
    met = "met" if target["met"] else "MISSED"
    return _row(name, target["id"], measured, read, wanted(target), how, met)


def _row(
    name: str, target: str = "", value: str = "", reference: str = "", wants: str = "", run: str = "", met: str = ""
) -> Row:
    return {
        "benchmark": name + (f" ({NO_DOOR})" if name in DOORS and DOORS[name].waits_for else ""),
        "target": target,
        "measured": value,
        "on the reference host": reference,
        "wanted": wants,
        "run": run,
        "": met,
    }


def _shown(value: float | None) -> str:
    return "not measured" if value is None else show(float(value))


def summary(rows: Sequence[Row]) -> str:
    counts = {word: sum(row[""] == word for row in rows) for word in ("met", "MISSED", "not run")}
    return f"{counts['met']} targets met, {counts['MISSED']} missed; {counts['not run']} benchmarks not run"


def markdown(results: Mapping[str, Result | None]) -> str:
    """The page `benchmarks/report.md`."""
    rows = target_rows(results)
    parts = [
        "# Targets",
        INTRODUCTION,
        f"{summary(rows)}.",
        _table(rows),
        "## Runs",
        _table([_run_row(name, result) for name, result in results.items() if result]),
        "## Notes",
        _notes(results),
    ]
    return "\n\n".join(parts) + "\n"


def _run_row(name: str, result: Result) -> Row:
    host = result["host"]
    slowness = host["yardstick"]["slowness"]
    return {
        "benchmark": name + (f" ({NO_DOOR})" if name in DOORS and DOORS[name].waits_for else ""),
        "commit": result["git"],
        "run": "quick" if result["quick"] else "full",
        "wall s": show(float(result["wall_s"])),
        "host": f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, Python {host['python']}",
        "load before": host["load_1min"],
        "times the reference's loops": ", ".join(f"{loop} {show(times)}" for loop, times in slowness.items()),
        "simulated": result["simulated"],
    }


def _notes(results: Mapping[str, Result | None]) -> str:
    """What a benchmark says about its own figures."""
    return "\n".join(f"* {name}: {note}" for name, result in results.items() if result for note in result["notes"])


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
