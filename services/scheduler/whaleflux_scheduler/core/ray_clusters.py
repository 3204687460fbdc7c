"""Ray clusters as they are asked for: what one is, and what is wrong with a request. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from whaleflux import hostport, names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.ray_file import (
    IDLE_S,
    LEAST_HEAD_BYTES,
    LEAST_HEAD_MILLICORES,
    LEAST_IDLE_S,
    MOST_GPUS,
    MOST_HEAD_MILLICORES,
    MOST_ID_CHARS,
    MOST_IDLE_S,
    MOST_NAMED,
    MOST_PRIORITY,
)

PYTHON, HEAD_MILLICORES = "python3", 2_000  # where nothing is said
_AT = "ray_cluster."
_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_PROGRAM = re.compile(r"[^\x00-\x1f\x7f]{1,500}")


class RayClusterState(IntEnum):
    """As in the contract."""

    UP = 1
    ENDING = 2


@dataclass(frozen=True, slots=True)
class RayCluster:
    """See the contract's RayCluster. `queue` is an id; `address` "": its head is started here."""

    name: str
    queue: str = "default"
    priority: int = 0
    max_gpus: int = 0
    sites: tuple[str, ...] = ()
    gpu_types: tuple[str, ...] = ()
    idle_s: float = IDLE_S
    python: str = PYTHON
    head_cpu_millicores: int = HEAD_MILLICORES
    head_memory_bytes: int = 0
    address: str = ""
    state: RayClusterState = RayClusterState.UP
    creator: str = ""
    uid: str = ""
    jobs_made: int = 0

    @property
    def id(self) -> str:
        return names.last(self.name)


def mistakes(asked: RayCluster) -> Iterator[FieldViolation]:
    """Everything that is wrong with it by itself, by paths of the contract."""
    yield from _number("priority", asked.priority, 0, MOST_PRIORITY)
    yield from _number("max_gpus", asked.max_gpus, 0, MOST_GPUS)
    if not LEAST_IDLE_S <= asked.idle_s <= MOST_IDLE_S:
        yield FieldViolation(_AT + "idle", f"is {asked.idle_s:g} s; give {LEAST_IDLE_S:g} s to 7 days, such as 60 s")
    yield from _number(
        "head_cpu_millicores",
        asked.head_cpu_millicores,
        LEAST_HEAD_MILLICORES,
        MOST_HEAD_MILLICORES,
        "thousandths of a CPU",
    )
    if asked.head_memory_bytes:
        yield from _number("head_memory_bytes", asked.head_memory_bytes, LEAST_HEAD_BYTES, 1 << 50, "bytes")
    if not _PROGRAM.fullmatch(asked.python):
        yield FieldViolation(
            _AT + "python", "is no program; give the path of an interpreter on the nodes that has Ray, in one line"
        )
    yield from _names("sites", asked.sites, names.ID_PATTERN, "the ids of sites, as: whaleflux sites")
    yield from _names("gpu_types", asked.gpu_types, _TYPE, "types as `whaleflux gpus` shows them, such as H200")
    yield from _address(asked.address)


def id_mistakes(cluster_id: str) -> Iterator[FieldViolation]:
    if len(cluster_id) > MOST_ID_CHARS:
        yield FieldViolation(
            "ray_cluster_id", f"has {len(cluster_id)} characters; at most {MOST_ID_CHARS}: its jobs are called after it"
        )


def _number(field: str, value: int, least: int, most: int, unit: str = "") -> Iterator[FieldViolation]:
    if not least <= value <= most:
        yield FieldViolation(_AT + field, f"is {value}; give {least} to {most} {unit}".rstrip())


def _names(field: str, given: Sequence[str], form: re.Pattern[str], wanted: str) -> Iterator[FieldViolation]:
    if len(given) > MOST_NAMED:
        yield FieldViolation(_AT + field, f"are {len(given)}; name at most {MOST_NAMED}, or none for all")
    for name in given[:MOST_NAMED]:
        if not form.fullmatch(name):
            yield FieldViolation(_AT + field, f"{name[:64]!r} is none; name {wanted}")


def _address(address: str) -> Iterator[FieldViolation]:
    if not address:
        return
    try:
        hostport.parse(address, _AT + "address")
    except InvalidArgument as wrong:
        yield from wrong.violations
