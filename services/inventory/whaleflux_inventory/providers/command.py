"""A provider behind an executable: bare-metal shops, batch systems, clouds without an adapter.

The offer's option `command` names an executable in the folder that inventory's setting `rent_commands` names; operators put executables
there, an offer cannot. It is started with one word, `launch`, `list` or `terminate`, is given JSON on stdin and answers JSON on stdout:

    launch     {"fleet", "lease", "token", "tags", "offer": {...}, "user_data", "hard_end_s"}  ->  {"id": "..."}
    list       {"fleet"}                             ->  {"machines": [{"id", "tags", "created_s", "ended"?, "taken_s"?, "taken_why"?}]}
    terminate  {"id"}                                ->  {}

It may refuse: {"error": "no_capacity" | "throttled" | "auth" | "unsupported" | "not_found", "message": "..."}; whatever else it does
(another exit code, no JSON, no end in time) means that nobody knows what came of it. The parts of the offer's secret are in its environment as
SECRET_NAME: under no other name, since whoever declares offers chooses these names, and PATH, LD_PRELOAD or BASH_ENV would run what they like.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whaleflux.names import ID_PATTERN
from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers.api import (
    CALL_WITHIN_S,
    FLEET_TAG,
    LEASE_TAG,
    MAX_MACHINES,
    OFFER_TAG,
    TOKEN_TAG,
    AuthFailed,
    LaunchRequest,
    MachineNotFound,
    NoCapacity,
    ProviderError,
    Throttled,
    Unsupported,
)
from whaleflux_inventory.providers.user_data import user_data

MAX_ANSWER_BYTES = 8 << 20
KILLED_WITHIN_S = 1.0
MAX_ID = 256
MAX_TIME_S = 253_402_300_799.0  # the end of the year 9999
_ERRORS: dict[str, type[ProviderError]] = {
    "no_capacity": NoCapacity,
    "throttled": Throttled,
    "auth": AuthFailed,
    "unsupported": Unsupported,
    "not_found": MachineNotFound,
}
_KEPT = ("PATH", "HOME", "LANG", "TZ", "HTTPS_PROXY", "NO_PROXY")


class CommandKind:
    """`folder`: with the executables that offers may name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def problems(self, offer: Offer) -> dict[str, str]:
        name = offer.options.get("command", "")
        if not ID_PATTERN.fullmatch(name):
            return {"options.command": "must name an executable in inventory's folder of rent_commands: a-z, 0-9, -"}
        if not os.access(self._folder / name, os.X_OK) or not (self._folder / name).is_file():
            return {"options.command": f"{name!r} is no executable in inventory's folder of rent_commands"}
        if offer.options.get("lag_s") and not offer.options["lag_s"].isdecimal():
            return {"options.lag_s": "must be whole seconds by which its list may lag behind"}
        return {}

    def open(self, offer: Offer, keys: Mapping[str, str]) -> Command:
        lag_s = float(offer.options.get("lag_s") or 60)
        return Command(self._folder / offer.options["command"], keys, lag_s)


class Command:
    """One executable with its keys."""

    def __init__(self, executable: Path, keys: Mapping[str, str], lag_s: float) -> None:
        self._executable, self._keys, self.lag_s = executable, keys, lag_s

    async def launch(self, request: LaunchRequest) -> str:
        offer = request.offer
        asked = {
            "fleet": request.fleet,
            "lease": request.lease,
            "token": request.token,
            "tags": request.tags,
            "offer": {
                "name": offer.name,
                "machine_type": offer.machine_type,
                "region": offer.region,
                "zone": offer.zone,
                "market": offer.market,
                "options": dict(offer.options),
            },
            "user_data": user_data(request),
            "hard_end_s": request.hard_end_s,
        }
        machine = (await self._run("launch", asked)).get("id")
        if not isinstance(machine, str) or not 0 < len(machine) <= MAX_ID:
            raise OSError(f"{self._executable.name} launch did not say the machine's id")
        return machine

    async def machines(self, fleet: str) -> Sequence[Machine]:
        answer = (await self._run("list", {"fleet": fleet})).get("machines")
        if not isinstance(answer, list) or len(answer) > MAX_MACHINES:
            raise OSError(f"{self._executable.name} list did not list machines")
        read = [_machine(one) for one in answer]
        return [machine for machine, of in read if of == fleet]

    async def terminate(self, machine_id: str) -> None:
        await self._run("terminate", {"id": machine_id})

    async def _run(self, what: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        process = await asyncio.create_subprocess_exec(
            str(self._executable),
            what,
            env={**environment, **{f"SECRET_{name}": value for name, value in self._keys.items()}},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # so that what it has started ends with it
        )
        try:
            async with asyncio.timeout(CALL_WITHIN_S - 1):
                said = await _answered(process, json.dumps(asked).encode())
                code = await process.wait()
        finally:
            await _ended(process)
        return self._answer(what, said, code)

    def _answer(self, what: str, said: bytes, code: int) -> dict[str, Any]:
        try:
            answer = json.loads(said)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise OSError(f"{self._executable.name} {what} ended with code {code} and no JSON object")
        if (error := _ERRORS.get(str(answer.get("error", "")))) is not None:
            raise error(str(answer.get("message", answer["error"]))[:300])
        if code or "error" in answer:
            raise OSError(f"{self._executable.name} {what} ended with code {code}")
        return answer


async def _answered(process: Process, asked: bytes) -> bytes:
    """What it says, read no further than an answer may be long. Raises OSError for a longer one."""
    assert process.stdin is not None and process.stdout is not None
    telling = asyncio.create_task(_tell(process.stdin, asked))
    said = bytearray()
    try:
        while chunk := await process.stdout.read(64 << 10):
            said += chunk
            if len(said) > MAX_ANSWER_BYTES:
                raise OSError(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
    finally:
        telling.cancel()
    return bytes(said)


async def _tell(stdin: asyncio.StreamWriter, asked: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it needs no more than it has read
        stdin.write(asked)
        await stdin.drain()
        stdin.close()


async def _ended(process: Process) -> None:
    """It and what it has started are gone, and waited for, unless the kernel holds it; what closed its answer and let it end stays."""
    assert process.stdout is not None
    if process.returncode is not None and process.stdout.at_eof():
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILLED_WITHIN_S):
            await process.wait()


def _machine(one: Any) -> tuple[Machine, str]:
    """A machine and the fleet whose tag it carries. Raises OSError for what is not one."""
    try:
        tags = one["tags"]
        machine = Machine(
            id=_id(one["id"]),
            lease=str(tags.get(LEASE_TAG, "")),
            token=str(tags.get(TOKEN_TAG, "")),
            created_s=_instant_s(one["created_s"]),
            offer=str(tags.get(OFFER_TAG, "")),
            ended=bool(one.get("ended", False)),
            taken_s=_instant_s(one.get("taken_s") or 0.0),
            taken_why=str(one.get("taken_why", ""))[:300],
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        raise OSError("a machine in the list lacks id, tags or created_s") from None
    return machine, str(tags.get(FLEET_TAG, ""))


def _id(said: Any) -> str:
    """Raises ValueError for what is none."""
    if not isinstance(said, str) or not 0 < len(said) <= MAX_ID:
        raise ValueError(said)
    return said


def _instant_s(said: Any) -> float:
    """Unix seconds. Raises ValueError, TypeError for what is no time."""
    if not 0 <= (value := float(said)) <= MAX_TIME_S:  # nor is NaN
        raise ValueError(said)
    return value
