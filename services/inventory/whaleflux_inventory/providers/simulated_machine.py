"""The process that plays one rented machine: boots, runs an agent, and ends it as a machine ends: with everything on it.

`python -m whaleflux_inventory.providers.simulated_machine FOLDER`. It ends when it is told to, at its hard end, and when the front door
has not answered for as long as the lease says: nobody has to be alive for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from whaleflux import hostport
from whaleflux.errors import InvalidArgument

PID, STOP = "pid", "stop"
_LOOK_EVERY_S = 0.5
_DIAL_EVERY_S = 10.0


def start(folder: Path, python: str) -> None:
    """Starts it beside this process, which it outlives."""
    with (folder / "machine.log").open("ab") as log:
        started = subprocess.Popen(
            [python, "-m", "whaleflux_inventory.providers.simulated_machine", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _note_pid(folder, started.pid)


def _note_pid(folder: Path, pid: int) -> None:
    """At once: who reads half of it would take the machine for one that has ended."""
    part = folder / f".pid-{os.getpid()}"
    part.write_text(str(pid))
    part.replace(folder / PID)


async def live(folder: Path) -> None:
    """Until its end."""
    facts: dict[str, Any] = json.loads((folder / "machine.json").read_text())
    stop = asyncio.Event()
    _note_pid(folder, os.getpid())  # whoever started it may have died before it could write this
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    watching = asyncio.create_task(_watch(folder, facts, stop))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(facts["boot_s"]):
            await stop.wait()
    if not stop.is_set():
        await _run_agent(folder, facts["environment"], stop)
    watching.cancel()


async def _run_agent(folder: Path, environment: Mapping[str, str], stop: asyncio.Event) -> None:
    # Jobs find the Python that this runs in, with what is installed there.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WHALEFLUX_")}
    with (folder / "agent.log").open("ab") as log:
        agent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "whaleflux_agent",
            env={**inherited, **environment, "PATH": path},
            stdout=log,
            stderr=log,
        )
    ended, told = asyncio.create_task(agent.wait()), asyncio.create_task(stop.wait())
    await asyncio.wait({ended, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if agent.returncode is None:
        agent.kill()
        await ended
    await _power_off(folder)


async def _power_off(folder: Path) -> None:
    """What the agent has started ends with the machine."""
    from whaleflux.embedded import processes

    tokens = {token for token in processes.shims_below(folder / "agent").values() if token}

    def rest() -> Iterator[int]:
        yield from processes.shims_below(folder / "agent")
        for token in tokens:
            yield from processes.with_variables(f"WHALEFLUX_TASK_TOKEN={token}")

    await processes.end(rest)


async def _watch(folder: Path, facts: Mapping[str, Any], stop: asyncio.Event) -> None:
    """The dead-man's switch."""
    heard_s = dialled_s = time.monotonic()
    while not stop.is_set():
        await asyncio.sleep(_LOOK_EVERY_S)
        if time.monotonic() - dialled_s >= min(_DIAL_EVERY_S, facts["silent_s"] / 3):
            dialled_s = time.monotonic()
            if await _answers(facts["environment"]["WHALEFLUX_SERVER"]):
                heard_s = time.monotonic()
        silent = time.monotonic() - heard_s > facts["silent_s"]
        if silent or time.time() >= facts["hard_end_s"] or (folder / STOP).exists():
            stop.set()


async def _answers(address: str) -> bool:
    try:
        async with asyncio.timeout(3.0):
            _, writer = await asyncio.open_connection(*hostport.parse(address))
    except (OSError, TimeoutError, InvalidArgument):
        return False
    writer.close()
    return True


if __name__ == "__main__":
    asyncio.run(live(Path(sys.argv[1])))
