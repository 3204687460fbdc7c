"""What an agent may say of its machine: bounds on every number and text, and whether they agree with one another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet import Disk, Gpu, Link, Node, Price
from whaleflux.names import ID_PATTERN

MAX_GPUS = 64
MAX_DISKS = 64
MAX_LABELS = 64
MAX_RUNTIMES = 8
MAX_MIG_PROFILES = 7
MAX_CONDITIONS = 16
MAX_REASON = 500
MAX_GPU_BYTES = 4 << 40
MAX_MEMORY_BYTES = 1 << 50
MAX_DISK_BYTES = 1 << 56
MAX_CPU_MILLICORES = 10_000_000
MAX_BYTES_PER_S = 1e15
MAX_USD_PER_GPU_HOUR = 10_000.0
MAX_TEXT = 253
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([1-9][0-9]{0,4})")
_HOST = re.compile(r"[0-9a-fA-F:.]+|[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Presence:
    """What a registration says besides the node itself. `address` is host:port, `host_address` a host."""

    boot_id: str
    address: str = ""
    host_address: str = ""
    driver_version: str = ""
    agent_version: str = ""
    runtimes: Sequence[str] = ()
    conditions: Sequence[tuple[str, str, str]] = ()  # type, reason, message


class Findings:
    """Collects what is wrong, field by field, so that the caller hears everything at once."""

    MOST = 16  # more would only repeat the same mistake

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        if len(self.violations) < self.MOST:
            self.violations.append(FieldViolation(field, description))

    def number(self, field: str, value: float, low: float, high: float) -> None:
        """`value` must be finite and within [low, high]."""
        if not (math.isfinite(value) and low <= value <= high):
            self.add(field, f"{value:.12g} is outside of {low:.12g} to {high:.12g}")

    def text(self, field: str, value: str, most: int = MAX_TEXT) -> None:
        """At most `most` printable characters."""
        if len(value) > most:
            self.add(field, f"has {len(value)} characters; use at most {most}")
        elif not value.isprintable():
            self.add(field, "has characters that cannot be printed")

    def count(self, field: str, items: Sequence[object] | Mapping[str, str], most: int) -> bool:
        """At most `most` items; False (and nothing else of them needs a look) when there are more."""
        if len(items) > most:
            self.add(field, f"has {len(items)} entries; use at most {most}")
        return len(items) <= most

    def raise_if_any(self) -> None:
        """Raises InvalidArgument with every violation."""
        if self.violations:
            raise InvalidArgument(self.violations)


def check_registration(node: Node, presence: Presence) -> None:
    """Raises InvalidArgument naming every field of the facts that cannot be true or is too large."""
    found = Findings()
    if found.count("facts.gpus", node.gpus, MAX_GPUS):
        _check_gpus(found, node.gpus)
        if found.count("facts.links", node.links, MAX_GPUS * (MAX_GPUS - 1) // 2):
            _check_links(found, node.links, {gpu.index for gpu in node.gpus})
    for level in ("zone", "spine", "leaf"):
        check_place(found, f"facts.{level}", getattr(node, level))
    found.number("facts.cpu_millicores", node.cpu_millicores, 0, MAX_CPU_MILLICORES)
    found.number("facts.memory_bytes", node.memory_bytes, 0, MAX_MEMORY_BYTES)
    found.number("facts.network_bytes_per_s", node.network_bytes_per_s, 0, MAX_BYTES_PER_S)
    if found.count("facts.disks", node.disks, MAX_DISKS):
        _check_disks(found, node.disks)
    check_labels(found, "facts.labels", dict(node.labels))
    check_price(found, "facts.price", node.price)
    _check_presence(found, presence)
    found.raise_if_any()


def check_place(found: Findings, field: str, value: str) -> None:
    """A domain's id, or "" for the only one."""
    if value and not ID_PATTERN.fullmatch(value):
        found.add(field, f"{value[:64]!r} is not an id: use 1-63 of a-z, 0-9 and '-', or leave it empty")


def check_labels(found: Findings, field: str, labels: Mapping[str, str]) -> None:
    """At most 64 labels with short, plain keys."""
    if not found.count(field, labels, MAX_LABELS):
        return
    for key, value in labels.items():
        if not _LABEL_KEY.fullmatch(key):
            found.add(field, f"key {key[:64]!r}: use 1-128 of letters, digits, '.', '_', '/' and '-'")
        found.text(f"{field}[{key[:64]!r}]", value)


def check_price(found: Findings, field: str, price: Price) -> None:
    """US dollars per GPU-hour within reason."""
    found.number(f"{field}.usd_per_gpu_hour", price.usd_per_gpu_hour, 0, MAX_USD_PER_GPU_HOUR)


def _check_gpus(found: Findings, gpus: Sequence[Gpu]) -> None:
    if len({gpu.index for gpu in gpus}) < len(gpus):
        found.add("facts.gpus", "has two GPUs with the same index")
    for at, gpu in enumerate(gpus):
        field = f"facts.gpus[{at}]"
        found.number(f"{field}.index", gpu.index, 0, MAX_GPUS - 1)
        least = 1 if gpu.healthy else 0  # one that was lost before it was read has no size
        found.number(f"{field}.memory_bytes", gpu.memory_bytes, least, MAX_GPU_BYTES)
        found.number(f"{field}.numa_node", gpu.numa_node, -1, 1023)
        for part in gpu.compute_capability:
            found.number(f"{field}.compute_capability", part, 0, 99)
        if not gpu.model:
            found.add(f"{field}.model", "is empty; name it as the catalogue does, for example H200")
        for name, text in (("model", gpu.model), ("uuid", gpu.uuid), ("pci_bus_id", gpu.pci_bus_id)):
            found.text(f"{field}.{name}", text, 128)
        found.text(f"{field}.unhealthy_reason", gpu.unhealthy_reason, MAX_REASON)
        _check_instance(found, field, gpu)
        if found.count(f"{field}.mig_profiles", gpu.mig_profiles, MAX_MIG_PROFILES):
            for profile in gpu.mig_profiles:
                found.text(f"{field}.mig_profiles", profile, 32)


def _check_instance(found: Findings, field: str, gpu: Gpu) -> None:
    """A MIG instance is part of a GPU that is larger, or nothing is said of one."""
    found.text(f"{field}.mig_profile", gpu.mig_profile, 32)
    found.text(f"{field}.parent_uuid", gpu.parent_uuid, 128)
    if not gpu.mig_profile:
        if gpu.parent_uuid or gpu.parent_memory_bytes:
            found.add(f"{field}.parent_uuid", "is set without mig_profile; a whole GPU has no parent")
        return
    if not gpu.parent_uuid:
        found.add(f"{field}.parent_uuid", "is empty; name the GPU that the instance is part of")
    found.number(f"{field}.parent_memory_bytes", gpu.parent_memory_bytes, max(1, gpu.memory_bytes), MAX_GPU_BYTES)


def _check_links(found: Findings, links: Sequence[Link], indices: set[int]) -> None:
    if len({(link.a, link.b) for link in links}) < len(links):
        found.add("facts.links", "names a pair of GPUs twice; report the best path only")
    for at, link in enumerate(links):
        if not (link.a < link.b and {link.a, link.b} <= indices):
            found.add(f"facts.links[{at}]", f"{link.a}-{link.b}: a and b must be indices of its GPUs, a < b")
        found.number(f"facts.links[{at}].bandwidth_bytes_per_s", link.bandwidth_bytes_per_s, 0, MAX_BYTES_PER_S)


def _check_disks(found: Findings, disks: Sequence[Disk]) -> None:
    for at, disk in enumerate(disks):
        found.text(f"facts.disks[{at}].mount", disk.mount, 1024)
        found.number(f"facts.disks[{at}].capacity_bytes", disk.capacity_bytes, 0, MAX_DISK_BYTES)


def _check_presence(found: Findings, presence: Presence) -> None:
    if not presence.boot_id:
        found.add("boot_id", "is empty; send the host's boot id (/proc/sys/kernel/random/boot_id)")
    found.text("boot_id", presence.boot_id, 64)
    found.text("facts.driver_version", presence.driver_version, 64)
    found.text("facts.agent_version", presence.agent_version, 64)
    check_address(found, "facts.address", presence.address)
    if presence.host_address and not (
        len(presence.host_address) <= MAX_TEXT and _HOST.fullmatch(presence.host_address)
    ):
        found.add("facts.host_address", f"{presence.host_address[:64]!r} is not a host name or an IP address")
    if found.count("facts.conditions", presence.conditions, MAX_CONDITIONS):
        for kind, reason, message in presence.conditions:
            found.text("facts.conditions.type", kind, 64)
            found.text("facts.conditions.reason", reason, 64)
            found.text("facts.conditions.message", message, MAX_REASON)
    if found.count("facts.runtimes", presence.runtimes, MAX_RUNTIMES):
        for runtime in presence.runtimes:
            check_place(found, "facts.runtimes", runtime)


def check_address(found: Findings, field: str, address: str) -> None:
    """host:port, or "" where the node cannot be dialled."""
    match = _ADDRESS.fullmatch(address) if len(address) <= MAX_TEXT else None
    if address and not (match and int(match[2]) <= 65535):
        found.add(field, f"{address[:64]!r} does not have the form host:port")
