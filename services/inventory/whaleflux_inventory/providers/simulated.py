"""Machines that are played: each is a process on this host that starts a real agent after a drawn delay. For tests and demonstrations.

Everything about a machine lies in a folder of its own, so that another start of inventory finds it. Options of offers: `boot_s` FIRST-LAST
seconds until its agent starts, `faults` what the first calls for the offer meet, comma separated: no_capacity, throttled, lost_reply (the
machine is made, the answer is not), auth, and ok; `notice_s`: seconds after which the machine is announced to be taken away in two minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from whaleflux.errors import InvalidArgument
from whaleflux.fleet.profile import Profile
from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers import simulated_machine
from whaleflux_inventory.providers.api import AuthFailed, LaunchRequest, NoCapacity, Throttled

NOTICE_S = 120.0
MOST = 8  # an agent holds some 70 MB
_BEGINS = [b""]  # the command line of a process in the moment in which it becomes another program
_FAULTS = ("ok", "no_capacity", "throttled", "lost_reply", "auth")


class SimulatedKind:
    """`folder`: where machines are kept, one folder each. `agent`: the command that starts an agent."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self._folder, self._settings = folder, settings

    def problems(self, offer: Offer) -> dict[str, str]:
        """The machine type is a profile; options as the module says."""
        found = dict[str, str]()
        try:
            found |= _differences(offer, Profile.load(offer.machine_type))
        except InvalidArgument as wrong:
            found["machine_type"] = f"{wrong.violations[0].description}; see: whaleflux profiles"
        for key, value in offer.options.items():
            if key == "faults" and any(fault not in _FAULTS for fault in value.split(",")):
                found["options.faults"] = f"must be a list of {', '.join(_FAULTS)}"
            elif key in ("boot_s", "notice_s") and not _is_span(value):
                found[f"options.{key}"] = "must be seconds, or FIRST-LAST"
            elif key not in ("faults", "boot_s", "notice_s"):
                found[f"options.{key}"] = "is no option of simulated machines; use boot_s, faults, notice_s"
        return found

    def open(self, offer: Offer, keys: Mapping[str, str]) -> SimulatedCloud:
        return SimulatedCloud(self._folder, self._settings)


class SimulatedCloud:
    """The machines below a folder."""

    lag_s = 5.0

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self._folder, self._settings = folder, settings

    async def launch(self, request: LaunchRequest) -> str:
        """The same token makes the same machine."""
        machine = f"sim-{request.token[:16]}"
        folder = self._folder / machine
        if (folder / "machine.json").exists():
            return machine
        fault = self._fault(request.offer)
        if fault == "no_capacity" or len(self._alive()) >= MOST:
            raise NoCapacity("no simulated machine is left")
        if fault == "throttled":
            raise Throttled("too many calls, as its plan says", 1.0)
        if fault == "auth":
            raise AuthFailed("the keys are refused, as its plan says")
        await asyncio.to_thread(self._start, folder, request)
        if fault == "lost_reply":
            raise TimeoutError
        return machine

    async def machines(self, fleet: str) -> Sequence[Machine]:
        return [_listed(folder, facts) for folder, facts in self._known() if facts["fleet"] == fleet]

    async def terminate(self, machine_id: str) -> None:
        """Asks the machine to end, and whoever does not listen is killed."""
        folder = self._folder / Path(machine_id).name
        pid = _pid(folder) if folder.is_dir() else 0
        if not pid:  # to which a signal would be one to everybody of this process's group
            return
        (folder / simulated_machine.STOP).touch()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def _known(self) -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for file in sorted(self._folder.glob("sim-*/machine.json")):
            with contextlib.suppress(OSError, ValueError):
                found.append((file.parent, json.loads(file.read_text())))
        return found

    def _alive(self) -> list[Path]:
        return [folder for folder, _ in self._known() if _pid(folder)]

    def _start(self, folder: Path, request: LaunchRequest) -> None:
        """The machine's own process, which outlives this one as a machine would."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.crt").write_text(request.authority_pem)
        token = folder / "join.token"
        token.touch(mode=0o600)
        token.write_text(request.environment["WHALEFLUX_JOIN_TOKEN"])
        own = {key: value for key, value in request.environment.items() if key != "WHALEFLUX_JOIN_TOKEN"}
        facts = {
            "fleet": request.fleet,
            "lease": request.lease,
            "token": request.token,
            "offer": request.offer.name,
            "created_s": time.time(),
            "boot_s": _drawn(request.offer.options.get("boot_s", "2-4"), request.token),
            "notice_s": _drawn(request.offer.options["notice_s"], request.token)
            if request.offer.options.get("notice_s")
            else 0.0,
            "hard_end_s": request.hard_end_s,
            "silent_s": request.silent_s,
            "environment": {
                **own,
                **self._settings,
                "WHALEFLUX_CA_FILE": str(folder / "ca.crt"),
                "WHALEFLUX_JOIN_TOKEN_FILE": str(token),
                "WHALEFLUX_PROFILE": request.offer.machine_type,
                "WHALEFLUX_STATE_DIR": str(folder / "agent"),
            },
        }
        part = folder / ".machine.json.part"
        part.write_text(json.dumps(facts))
        part.replace(folder / "machine.json")
        simulated_machine.start(folder, sys.executable)

    def _fault(self, offer: Offer) -> str:
        """What this call meets: the plan's entry for as many calls as were made before."""
        plan = [fault for fault in offer.options.get("faults", "").split(",") if fault]
        counted = self._folder / f"calls-{offer.name.rpartition('/')[2]}"
        self._folder.mkdir(parents=True, exist_ok=True)
        count = len(counted.read_text()) if counted.exists() else 0
        with counted.open("a") as file:
            file.write(".")
        return plan[count] if count < len(plan) else "ok"


def _differences(offer: Offer, profile: Profile) -> dict[str, str]:
    """What an offer says of its machine's GPUs that its profile does not have: jobs would be planned on what never comes."""
    has = Counter[str]()
    for part in profile.parts:
        has[part.model] += part.shape.count
    machine = f"{offer.machine_type[:40]} has {', '.join(f'{count} x {model}' for model, count in has.items())}"
    if offer.gpu_type and offer.gpu_type not in has:
        return {"gpu_type": f"is {offer.gpu_type[:40]}, but {machine}; say {' or '.join(has)}, or another machine"}
    if offer.gpu_type and offer.gpus != has[offer.gpu_type]:
        return {"gpus": f"is {offer.gpus}, but {machine}; say {has[offer.gpu_type]}, or another machine"}
    return {}


def _listed(folder: Path, facts: Mapping[str, Any]) -> Machine:
    notice_s = facts["created_s"] + facts["notice_s"] if facts["notice_s"] else float("inf")
    noticed = time.time() >= notice_s
    return Machine(
        id=folder.name,
        lease=facts["lease"],
        token=facts["token"],
        created_s=facts["created_s"],
        offer=facts["offer"],
        ended=not _pid(folder),
        taken_s=notice_s + NOTICE_S if noticed else 0.0,
        taken_why="the provider takes the spot machine away, as its plan says" if noticed else "",
    )


def _pid(folder: Path) -> int:
    """Of the machine's process; 0 when it has ended, or another process has its number."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((folder / simulated_machine.PID).read_text())
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
        if (str(folder).encode() in words or words == _BEGINS) and not _is_zombie(pid):
            return pid
    return 0


def _is_zombie(pid: int) -> bool:
    state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return state[0] == "Z"


def _is_span(text: str) -> bool:
    first, _, last = text.partition("-")
    try:
        return 0 <= float(first) <= float(last or first) <= 3600
    except ValueError:
        return False


def _drawn(span: str, token: str) -> float:
    """Between both ends, the same for the same token."""
    first, _, last = span.partition("-")
    share = int(hashlib.sha256(token.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    return float(first) + (float(last or first) - float(first)) * share
