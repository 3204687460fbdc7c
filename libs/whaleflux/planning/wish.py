"""What a job is planned anew with, on other GPUs than it was planned for: written into its mesh when it is submitted. Without NumPy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

VARIABLE = "MESH"  # of the ranks' environment, which `whaleflux.sdk.device_mesh` reads
KEY = "replan"  # of a mesh
_MOST_CHARS = 1 << 16


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
    said = _table(mesh).get(KEY)
    if not isinstance(said, Mapping):
        return None
    try:
        wish = Wish(**{one.name: _of(one.type, said[one.name]) for one in fields(Wish) if one.name in said})
    except (TypeError, ValueError):
        return None
    return wish if min(wish.batch, wish.sequence, wish.tp, wish.pp, wish.cp) >= 1 else None


def _of(kind: Any, value: Any) -> Any:
    return {"str": str, "int": int, "bool": bool}[kind](value)


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
