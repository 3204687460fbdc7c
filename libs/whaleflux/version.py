"""Which WhaleFlux this is: the version of the installed distribution and, from a checkout, its commit."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

_GIT_WITHIN_S = 2.0
_BUILT = "built-from.txt"  # beside this file, written where a wheel is built


def version() -> str:
    """Such as "0.1.0", and "0.1.0 (git 3f2c1ab, changed)" where the commit is known."""
    try:
        number = installed("whaleflux")
    except PackageNotFoundError:  # run from its sources, not installed
        number = "0"
    return f"{number} (git {commit})" if (commit := _commit(Path(__file__).parent)) else number


def _commit(package: Path) -> str:
    """Of the checkout that `package` lies in, else as noted when the wheel was built; "" for neither."""
    if (package.parents[1] / ".git").exists():
        return described(package)
    noted = package / _BUILT
    return noted.read_text().strip() if noted.exists() else ""


def described(folder: Path) -> str:
    """What git calls the commit of the checkout at `folder`, with ", changed" where files differ; "" without git."""
    asked = ["git", "-C", str(folder), "describe", "--tags", "--always", "--dirty=, changed"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=_GIT_WITHIN_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
