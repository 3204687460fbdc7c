"""What a job is planned anew with, on other GPUs than it was planned for: written into its mesh when it is submitted. Without NumPy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

VARIABLE = "MESH"  # of the ranks' environment, which `whaleflux.sdk.device_mesh` reads
# Blocks of the allocator grow in place, which the planner's memory counts on: else a tenth of a GPU lies between them.
ALLOCATOR, GROWING = "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
KEY = "replan"  # of a mesh
MOST_BATCH, MOST_SEQUENCE = 1 << 24, 1 << 27  # samples, tokens: of what is planned at all
_MOST_CHARS, _MOST = 1 << 16, 1 << 17  # of a mesh; of ranks, stages and layers


class Kept(NamedTuple):
    """What checkpoints of a pipeline's stages keep: degrees, virtual stages (0: any), and the layers of the first and last stage (0: as many as the others)."""

    tp: int
    pp: int
    cp: int
    vp: int = 0
    first_layers: int = 0
    last_layers: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """The model (as `known_models.model_said` reads it), GPU type, batch in samples, sequence in tokens, and the split that was planned.

    `whole`: nothing of that split was settled by the job's file, so that all of it may change.
    """

    model: str
    gpu: str
    batch: int
    sequence: int
    tp: int
    pp: int
    cp: int
    vp: int = 0
    first_layers: int = 0
    last_layers: int = 0
    adapters: bool = False
    fp8: bool = False
    whole: bool = False

    def said(self) -> dict[str, Any]:
        """For the mesh."""
        return asdict(self)

    @property
    def kept(self) -> Kept:
        return Kept(self.tp, self.pp, self.cp, self.vp, self.first_layers, self.last_layers)


def wish_in(environment: Iterable[tuple[str, str]]) -> Wish | None:
    """That of the mesh in a job's environment; None: its ranks read no mesh, or its file brought one of its own."""
    return next((_wish(text) for name, text in environment if name == VARIABLE), None)


@lru_cache(maxsize=1024)
def _wish(mesh: str) -> Wish | None:
    """Whoever submits a job may write its mesh: what no plan says is no wish, for the scheduler works on what is one."""
    table = _table(mesh)
    said = table.get(KEY)
    if not isinstance(said, Mapping) or not _runs(table):
        return None
    given = {one.name: said[one.name] for one in fields(Wish) if one.name in said}
    if not all(_possible(one.name, str(one.type), given[one.name]) for one in fields(Wish) if one.name in given):
        return None
    try:
        return Wish(**given)
    except TypeError:  # one is missing
        return None


def _runs(table: Mapping[str, Any]) -> bool:
    """Whether the plan that it was submitted with can be read in it."""
    axes = table.get("mesh")
    if not isinstance(axes, Mapping):
        return False
    numbers = (axes.get("dp_replicate", 1), axes.get("dp_shard", 1), table.get("micro_batch", 1))
    return all(type(one) is int and 1 <= one <= MOST_BATCH for one in numbers)


def _possible(name: str, kind: str, value: Any) -> bool:
    if kind != "int":
        return type(value).__name__ == kind
    least = 0 if name in ("vp", "first_layers", "last_layers") else 1
    most = {"batch": MOST_BATCH, "sequence": MOST_SEQUENCE}.get(name, _MOST)
    return type(value) is int and least <= value <= most


def plain_mesh(mesh: str) -> dict[str, Any]:
    """The same without the wish: what ranks need."""
    return {key: value for key, value in _table(mesh).items() if key != KEY}


def _table(mesh: str) -> Mapping[str, Any]:
    if len(mesh) > _MOST_CHARS:
        return {}
    try:
        found = json.loads(mesh)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}
