"""Plays a machine that is not there: facts from a profile, no hardware behind them, labelled simulated everywhere.

A profile is a small JSON file: the shape of a machine as its maker describes it. Name one of ours ("h200x8") or give
the path of another.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from whaleflux.errors import FieldViolation, Invalid
from whaleflux.fleet.model import Disk, Gpu, Link, LinkKind, Node, Price, PriceKind
from whaleflux_agent.devices.source import GpuEvent, Machine

_FOLDER = Path(__file__).parent.parent / "profiles"
_EVENTS_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine's shape. See the files in `profiles/`."""

    model: str
    count: int
    memory_bytes: int  # per GPU
    compute_capability: tuple[int, int]
    links: tuple[tuple[frozenset[int], LinkKind, float], ...]  # groups of GPUs, best first; bytes per second
    cpu_millicores: int
    host_memory_bytes: int
    disks: tuple[Disk, ...]
    network_bytes_per_s: float
    price: Price

    @classmethod
    def load(cls, name: str) -> Profile:
        """One of ours by name, or a file. `Invalid` says what is wrong with it."""
        path = Path(name) if "/" in name or name.endswith(".json") else _FOLDER / f"{name}.json"
        try:
            return cls.parse(json.loads(path.read_text()))
        except OSError:
            known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
            raise Invalid(
                FieldViolation("profile", f"{name!r} is not a profile; use one of {known}, or a path")
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise Invalid(FieldViolation("profile", f"{path} is malformed: {error!r}")) from None

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Profile:
        """From the content of a file. Raises KeyError, ValueError or TypeError."""
        if not isinstance(content, Mapping):
            raise TypeError("it must hold one object")
        price = content.get("price", {})
        return cls(
            model=str(content["model"]),
            count=int(content["count"]),
            memory_bytes=int(content["memory_bytes"]),
            compute_capability=(int(content["compute_capability"][0]), int(content["compute_capability"][1])),
            links=tuple(
                (frozenset(link["gpus"]), LinkKind(link["kind"]), float(link["bandwidth_bytes_per_s"]))
                for link in content["links"]
            ),
            cpu_millicores=int(content["cpu_millicores"]),
            host_memory_bytes=int(content["host_memory_bytes"]),
            disks=tuple(Disk(d["mount"], int(d["capacity_bytes"]), bool(d["nvme"])) for d in content.get("disks", ())),
            network_bytes_per_s=float(content["network_bytes_per_s"]),
            price=Price(PriceKind(price.get("kind", "owned")), float(price.get("usd_per_gpu_hour", 0.0))),
        )

    def link(self, a: int, b: int) -> Link:
        """The first group that holds both decides; without one, across sockets at the speed of the slowest."""
        for gpus, kind, bandwidth in self.links:
            if {a, b} <= gpus:
                return Link(a, b, kind, bandwidth)
        return Link(a, b, LinkKind.SYSTEM, min((bandwidth for _, _, bandwidth in self.links), default=10e9))


class ProfileSource:
    """A machine that exists in a file."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    async def read(self, name: str) -> Machine:
        profile = self.profile
        gpus = tuple(
            Gpu(
                index=index,
                uuid=_uuid(name, index),
                model=profile.model,
                memory_bytes=profile.memory_bytes,
                compute_capability=profile.compute_capability,
                pci_bus_id=f"00000000:{index + 1:02X}:00.0",
            )
            for index in range(profile.count)
        )
        node = Node(
            name=name,
            site=name.split("/")[1],
            gpus=gpus,
            links=tuple(profile.link(a, b) for a, b in combinations(range(profile.count), 2)),
            cpu_millicores=profile.cpu_millicores,
            memory_bytes=profile.host_memory_bytes,
            disks=profile.disks,
            network_bytes_per_s=profile.network_bytes_per_s,
            price=profile.price,
            simulated=True,
        )
        return Machine(node, "simulated")

    async def next_events(self) -> list[GpuEvent]:
        """None ever: nothing is there that could break."""
        await asyncio.sleep(_EVENTS_PAUSE_S)
        return []

    async def close(self) -> None:
        """Nothing is held."""


def _uuid(name: str, index: int) -> str:
    """Looks like a driver's, is the same at each start, and says what it is."""
    digest = hashlib.sha256(f"{name}/{index}".encode()).hexdigest()
    return f"GPU-simulated-{digest[:8]}-{digest[8:12]}-{digest[12:24]}"
