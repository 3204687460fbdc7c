"""`make bench`: runs every benchmark, or those named, each in a process of its own; results in benchmarks/results.

With `--report` nothing is run: the last results become one table of all targets, printed and written to benchmarks/report.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.common import print_table
from benchmarks.report import markdown, read_results, summary, target_rows
from benchmarks.yardstick import host_yardstick

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NOT_BENCHMARKS = ("common", "ray_drain_program", "ray_peer", "report", "run", "yardstick")


def names() -> list[str]:
    return sorted(
        path.stem
        for path in HERE.glob("*.py")
        if path.stem not in NOT_BENCHMARKS and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    )


def report() -> int:
    results = read_results(RESULTS, names())
    rows = target_rows(results)
    print_table(rows)
    print(f"\n{summary(rows)}")
    (HERE / "report.md").write_text(markdown(results), encoding="utf-8")
    return 0


def main(argv: list[str]) -> int:
    if "--report" in argv:
        return report()
    chosen = [arg for arg in argv if not arg.startswith("-")] or names()
    options = [arg for arg in argv if arg.startswith("-")]
    if unknown := sorted(set(chosen) - set(names())):
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    host_yardstick()  # before the first of them heats the host
    RESULTS.mkdir(exist_ok=True)
    failed = [name for name in chosen if not _run(name, options)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _run(name: str, options: list[str]) -> bool:
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(RESULTS / f"{name}.json"), *options]
    return subprocess.run(command, cwd=HERE.parent, check=False).returncode == 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
