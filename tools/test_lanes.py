"""`make test`: all tests, in two lanes side by side, since most of what waits for processes leaves a core idle.

The lanes share nothing but the checkout. The first is shown as it goes, the second when both have ended. With paths among the
arguments there is one lane, with these.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

SDK = (
    "tests/integration/sdk"  # heavy in computing, as little else of the first lane: it makes the two about equally long
)
FIRST = ("tests/e2e", "tests/integration", f"--ignore={SDK}")
SECOND = ("tests/contract", SDK, "tests/robustness", "tests/simulation", "tests/unit")
_NOTHING_COLLECTED = 5  # https://docs.pytest.org/en/stable/reference/exit-codes.html


def main(args: list[str]) -> int:
    """Runs pytest with `args`; the worse exit code of the two lanes."""
    if any(Path(arg.partition("::")[0]).exists() for arg in args):
        return subprocess.call(_pytest(args))
    with tempfile.TemporaryFile("w+") as shown_later:
        second = subprocess.Popen(_pytest([*SECOND, *args]), stdout=shown_later, stderr=subprocess.STDOUT)
        try:
            codes = [subprocess.call(_pytest([*FIRST, *args])), second.wait()]
        finally:
            second.terminate()
            second.wait()
        shown_later.seek(0)
        print(shown_later.read(), flush=True)
    return worse(codes)


def worse(codes: list[int]) -> int:
    """What both lanes end with. A lane that a signal ended has a negative code, which is no success; one that found nothing is fine."""
    if set(codes) == {_NOTHING_COLLECTED}:
        return _NOTHING_COLLECTED
    return max(0 if code == _NOTHING_COLLECTED else abs(code) for code in codes)


def _pytest(args: list[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", *args]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
