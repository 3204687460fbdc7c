"""`make test`: all tests, in two lanes side by side, since most of what waits for processes leaves a core idle.

The lanes share nothing but the checkout. The first is shown as it goes, the second when both have ended. A few tests that failed with
real processes are run once more, by themselves, and named when they pass then. With paths among the arguments there is one lane,
with these, and no second try.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Of the first lane's folders what the second one runs, so that the two are about equally long.
MOVED = ("tests/integration/sdk",)
FIRST = ("tests/e2e", "tests/integration", *(f"--ignore={path}" for path in MOVED))
SECOND = ("tests/contract", *MOVED, "tests/robustness", "tests/simulation", "tests/unit")
AT_MOST = 3  # tests of a lane that get a second try: more have a cause that is no busy machine
DETERMINISTIC = ("tests/unit/", "tests/simulation/")  # no real time, no processes: what fails there failed
_FAILED, _NOTHING_COLLECTED = 1, 5  # https://docs.pytest.org/en/stable/reference/exit-codes.html


@dataclass(frozen=True)
class Lane:
    """How a run of pytest ended; `outcomes` says it of each test, and is None when the run did not come to its end."""

    code: int
    outcomes: Mapping[str, str] | None = None


def main(args: list[str]) -> int:
    """Runs pytest with `args`; 0 when every test passed at its first or, where it may have one, its second try."""
    if any(Path(arg.partition("::")[0]).exists() for arg in args):
        return subprocess.call(_pytest(args))
    with tempfile.TemporaryDirectory() as folder:
        lanes = _both_lanes(args, Path(folder))
        again = second_try(lanes)
        if not again:
            return worse([lane.code for lane in lanes])
        print(f"\nOnce more, by themselves: {', '.join(again)}", flush=True)
        file = Path(folder) / "again.json"
        alone = _ended(subprocess.call(_pytest([*again, *args], file)), file)
    if not passed_alone(again, alone):
        return worse([lane.code for lane in lanes])
    print("\n".join(["", "=" * 100, "UNSTABLE: passed only when run alone:", *again, "=" * 100]), flush=True)
    return 0


def worse(codes: list[int]) -> int:
    """What both lanes end with. A lane that a signal ended has a negative code, which is no success; one that found nothing is fine."""
    if set(codes) == {_NOTHING_COLLECTED}:
        return _NOTHING_COLLECTED
    return max(0 if code == _NOTHING_COLLECTED else abs(code) for code in codes)


def second_try(lanes: Sequence[Lane]) -> list[str]:
    """The tests to run once more: those that failed; none when one of the lanes' ends is none that a busy machine explains."""
    if any(lane.code not in {0, _FAILED, _NOTHING_COLLECTED} for lane in lanes):
        return []
    failed = [_failed(lane) for lane in lanes if lane.code == _FAILED]
    if any(not 1 <= len(tests) <= AT_MOST for tests in failed):
        return []
    again = [test for tests in failed for test in tests]
    return [] if any(test.startswith(DETERMINISTIC) for test in again) else again


def passed_alone(again: Sequence[str], alone: Lane) -> bool:
    """True when each of `again` ran and passed: one that was skipped, or not found, did not."""
    return alone.code == 0 and all((alone.outcomes or {}).get(test) == "passed" for test in again)


def _failed(lane: Lane) -> list[str]:
    return [test for test, outcome in (lane.outcomes or {}).items() if outcome == "failed"]


def _both_lanes(args: list[str], folder: Path) -> list[Lane]:
    files = [folder / "first.json", folder / "second.json"]
    with tempfile.TemporaryFile("w+") as shown_later:
        command = _pytest([*SECOND, *args], files[1])
        second = subprocess.Popen(command, stdout=shown_later, stderr=subprocess.STDOUT)
        try:
            codes = [subprocess.call(_pytest([*FIRST, *args], files[0])), second.wait()]
        finally:
            second.terminate()
            second.wait()
        shown_later.seek(0)
        print(shown_later.read(), flush=True)
    return [_ended(code, file) for code, file in zip(codes, files, strict=True)]


def _ended(code: int, file: Path) -> Lane:
    return Lane(code, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None)


def _pytest(args: list[str], outcomes: Path | None = None) -> list[str]:
    reporting = ["-p", "tools.test_outcomes", "--outcomes", str(outcomes)] if outcomes else []
    return [sys.executable, "-m", "pytest", "-q", *reporting, *args]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
