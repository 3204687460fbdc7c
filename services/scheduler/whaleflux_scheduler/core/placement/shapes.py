"""Kinds of nodes: equal hardware is one `Shape`, so that questions about hardware are answered once per kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from whaleflux.fleet.model import Gpu, Node
from whaleflux.fleet.wiring import Wiring, wiring_of


@dataclass(frozen=True, eq=False)
class Shape:
    """Nodes with equal GPUs, wiring and network; per-GPU tuples are by position."""

    indices: tuple[int, ...]  # as drivers count
    models: tuple[str, ...]
    memory_bytes: tuple[int, ...]
    compute_capability: tuple[tuple[int, int], ...]
    mig_profiles: tuple[str, ...]  # "" of whole GPUs
    parts_of_gpu: tuple[float, ...]  # what each costs of a GPU's price
    network_bytes_per_s: float
    wiring: Wiring

    @cached_property
    def model_names(self) -> frozenset[str]:
        """The models of its GPUs."""
        return frozenset(self.models)

    @cached_property
    def whole(self) -> bool:
        """Whether all of them are whole GPUs."""
        return not any(self.mig_profiles)

    def gpus(self, mask: int) -> float:
        """How many GPUs the devices of the mask are worth: a MIG instance counts as the part that it is."""
        return sum(part for at, part in enumerate(self.parts_of_gpu) if mask >> at & 1)

    @cached_property
    def size(self) -> int:
        return len(self.models)

    @cached_property
    def value(self) -> tuple[float, float]:
        """What such a node is worth to others: its links, then its memory."""
        return self.wiring.ring_bytes_per_s((1 << self.size) - 1), float(max(self.memory_bytes, default=0))

    @cached_property
    def _all(self) -> int:
        """All positions where indices are positions; else 0."""
        size = len(self.indices)
        return (1 << size) - 1 if self.indices == _PLAIN[:size] else 0

    def mask(self, gpus: tuple[int, ...]) -> int:
        """Positions of driver indices; an index that the node does not have (any more) is left out."""
        if self._all:
            return _plain_mask(gpus) & self._all
        return sum(1 << self.indices.index(g) for g in set(gpus) if g in self.indices)


_PLAIN = tuple(range(64))


@lru_cache(maxsize=4096)
def _plain_mask(gpus: tuple[int, ...]) -> int:
    return sum(1 << g for g in set(gpus))


class Shapes:
    """Gives equal hardware the same `Shape`. Lives as long as the engine: the tables of a wiring are worth keeping."""

    def __init__(self) -> None:
        self._shapes: dict[object, Shape] = {}
        self._wirings: dict[object, Wiring] = {}

    def of(self, node: Node) -> Shape:
        key = (tuple(map(_gpu_key, node.gpus)), node.links, node.network_bytes_per_s)
        found = self._shapes.get(key)
        if found is None:
            found = self._shapes[key] = self._new(node)
        return found

    def _new(self, node: Node) -> Shape:
        wiring = wiring_of(node)
        return Shape(
            tuple(g.index for g in node.gpus),
            tuple(g.model for g in node.gpus),
            tuple(g.memory_bytes for g in node.gpus),
            tuple(g.compute_capability for g in node.gpus),
            tuple(g.mig_profile for g in node.gpus),
            tuple(g.part_of_gpu for g in node.gpus),
            node.network_bytes_per_s,
            self._wirings.setdefault((wiring.matrix, wiring.kinds), wiring),
        )


def _gpu_key(gpu: Gpu) -> tuple[object, ...]:
    return (gpu.index, gpu.model, gpu.memory_bytes, gpu.compute_capability, gpu.mig_profile, gpu.parent_memory_bytes)
