"""The shape of a machine that is played, as its maker describes it.

One that the table of GPU types lists ("h200x8"), or the path of a small JSON file. Options stand behind it:
"h200x8:mig=3g.71gb,4*1g.18gb" cuts each of its GPUs into these MIG instances, "mig=none" has MIG on without any, "numa=2"
spreads the GPUs over two NUMA nodes, "lost=3@60s", "xid=79/0", "ecc=1" break one (`sickness`), and "usage=45%@50s,0%@10s" says what
their counters show while work has them (`activity`). "h200x4+a100x4pcie" is one machine with the GPUs of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet import activity, sickness
from whaleflux.fleet.activity import Spell
from whaleflux.fleet.gpu_types import CATALOGUE, Catalogue, LinkGroup, MachineShape, MigProfile
from whaleflux.fleet.model import Disk, LinkKind, Price, PriceKind
from whaleflux.fleet.sickness import Fault

_MOST_INSTANCES = 7
_MOST_NUMA_NODES = 8
_MOST_BYTES = 1 << 20  # of a file


@dataclass(frozen=True, slots=True)
class Profile:
    """A machine and the GPUs in it."""

    model: str  # catalogue name
    memory_bytes: int  # per GPU
    compute_capability: tuple[int, int]
    shape: MachineShape
    mig: tuple[MigProfile, ...] | None = None  # instances of each GPU; None: MIG is off
    numa_nodes: int = 0  # over which its GPUs are spread; 0: it does not say
    faults: tuple[Fault, ...] = ()
    usage: tuple[Spell, ...] = ()  # what its GPUs do while work has them; none: nothing is known of that
    also: tuple[Profile, ...] = ()  # whose GPUs are in the same machine, behind its own

    @classmethod
    def load(cls, text: str, catalogue: Catalogue = CATALOGUE) -> Profile:
        """One of the catalogue's by name, or a file, with options behind it; several with "+" between them.

        `InvalidArgument` says what is wrong with it.
        """
        first, *others = [cls._part(part, catalogue) for part in text.split("+")]
        return replace(first, also=tuple(others))

    @classmethod
    def _part(cls, text: str, catalogue: Catalogue) -> Profile:
        name, *options = text.split(":")
        profile = cls._named(name, catalogue)
        for option in options:
            profile = profile._with(*option.partition("=")[::2], catalogue)
        return profile

    def _with(self, key: str, value: str, catalogue: Catalogue) -> Profile:
        """The same with one option more."""
        if key in sickness.KINDS:
            return replace(self, faults=(*self.faults, sickness.parse(key, value, self.shape.count)))
        if key == "numa" and value.isdecimal() and 1 <= int(value) <= _MOST_NUMA_NODES:
            return replace(self, numa_nodes=int(value))
        if key == "usage":
            return replace(self, usage=activity.parse(value))
        if key == "mig":
            of_type = catalogue.types[self.model].mig if self.model in catalogue.types else ()
            return replace(self, mig=mig_instances(value, of_type))
        known = f"mig=PROFILES, numa=1 to {_MOST_NUMA_NODES}, usage=PERCENT%@TIME, lost=GPU@TIME, xid=CODE/GPU@TIME, ecc=GPU@TIME"
        raise InvalidArgument(FieldViolation("profile", f"{key}={value!r} is not an option; use {known}"))

    @property
    def parts(self) -> tuple[Profile, ...]:
        """Itself and what else is in the machine."""
        return (self, *self.also)

    @classmethod
    def _named(cls, name: str, catalogue: Catalogue) -> Profile:
        if "/" in name or name.endswith(".json"):
            return cls._read(Path(name))
        if (found := catalogue.profile(name)) is None:
            known = ", ".join(catalogue.profiles())
            raise InvalidArgument(
                FieldViolation("profile", f"{name!r} is not a profile; use one of {known}, or a path")
            )
        gpu, shape = found
        return cls(gpu.name, gpu.memory_bytes, gpu.compute_capability, shape)

    @classmethod
    def _read(cls, path: Path) -> Profile:
        try:
            with path.open("rb") as file:
                raw = file.read(_MOST_BYTES + 1)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is no path"
            raise InvalidArgument(FieldViolation("profile", f"{str(path)[:200]} cannot be read: {why}")) from None
        try:
            if len(raw) > _MOST_BYTES:
                raise ValueError
            return cls.parse(json.loads(raw))
        except KeyError as missing:
            raise _no_profile(path, f"has no {missing.args[0]!r}") from None
        except (ValueError, TypeError, ArithmeticError, RecursionError, AttributeError):
            raise _no_profile(path, "is no profile") from None

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Profile:
        """From the content of a file. Raises KeyError, ValueError, TypeError, ArithmeticError or AttributeError."""
        if not isinstance(content, Mapping):
            raise TypeError("it must hold one object")
        major, minor = content["compute_capability"]
        return cls(str(content["model"]), int(content["memory_bytes"]), (int(major), int(minor)), _shape(content))


def _no_profile(path: Path, what: str) -> InvalidArgument:
    """A file that describes no machine."""
    wanted = "give JSON of a machine: model, memory_bytes, compute_capability, count, links, cpu_millicores, host_memory_bytes, network_bytes_per_s"
    return InvalidArgument(FieldViolation("profile", f"{str(path)[:200]} {what}; {wanted}"))


def mig_instances(text: str, known: Sequence[MigProfile]) -> tuple[MigProfile, ...]:
    """The instances that "3g.71gb,4*1g.18gb" means; none for "none". Raises InvalidArgument for what no GPU can be cut into."""
    if text == "none":
        return ()
    by_name = {profile.name: profile for profile in known}
    found: list[MigProfile] = []
    for part in text.split(","):
        count, times, name = part.rpartition("*")
        if name not in by_name or (times and not count.isdecimal()):
            one_of = ", ".join(by_name) or "none: this type has no MIG"
            raise InvalidArgument(FieldViolation("profile", f"mig={part!r} is not [N*]PROFILE; profiles are: {one_of}"))
        found += [by_name[name]] * min(int(count or 1), _MOST_INSTANCES + 1)
    if sum(one.sevenths for one in found) > _MOST_INSTANCES or sum(one.eighths for one in found) > 8:
        too_much = f"mig={text} is more than one GPU has: 7 sevenths of compute and 8 eighths of memory"
        raise InvalidArgument(FieldViolation("profile", too_much))
    return tuple(found)


def _shape(content: Mapping[str, Any]) -> MachineShape:
    price = content.get("price", {})
    return MachineShape(
        count=int(content["count"]),
        links=tuple(
            LinkGroup(frozenset(link["gpus"]), LinkKind(link["kind"]), float(link["bandwidth_bytes_per_s"]))
            for link in content["links"]
        ),
        cpu_millicores=int(content["cpu_millicores"]),
        memory_bytes=int(content["host_memory_bytes"]),
        disks=tuple(Disk(d["mount"], int(d["capacity_bytes"]), bool(d["nvme"])) for d in content.get("disks", ())),
        network_bytes_per_s=float(content["network_bytes_per_s"]),
        price=Price(PriceKind(price.get("kind", "owned")), float(price.get("usd_per_gpu_hour", 0.0))),
    )
