"""`make bench`: runs every benchmark, or those named, each in a process of its own; results in benchmarks/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NOT_BENCHMARKS = ("common", "run")


def names() -> list[str]:
    return sorted(
        path.stem
        for path in HERE.glob("*.py")
        if path.stem not in NOT_BENCHMARKS and '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    )


def main(argv: list[str]) -> int:
    chosen = [arg for arg in argv if not arg.startswith("-")] or names()
    options = [arg for arg in argv if arg.startswith("-")]
    if unknown := sorted(set(chosen) - set(names())):
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    failed = []
    for name in chosen:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(results / f"{name}.json"), *options]
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
