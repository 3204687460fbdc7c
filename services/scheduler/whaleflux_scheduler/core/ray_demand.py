"""What a Ray cluster asks for, by shape: single bundles and gangs, as items that can be laid on nodes. Pure.

Quantities are whole numbers of ten-thousandths, the grain in which Ray counts, so that no sum is off by a rounding. `GPU` below one is
a share of one device, else it is whole devices; `gpu_memory` (MiB) is of one device where the bundle asks for a share or for memory
alone, and is spread evenly over its devices where it asks for whole ones. It is never added up over the devices of a node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum

UNIT = 10_000  # ten-thousandths
_NAMED = {"CPU", "GPU", "gpu_memory", "memory"}
_TYPE = "accelerator_type:"
_OF_RAY = ("node:", "object_store_memory", "bundle_group_", "implicit_resource_")  # no node is chosen by these


class Strategy(Enum):
    """How the bundles of a placement group lie; PACK and SPREAD are wishes that Ray itself follows as far as it goes."""

    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_PACK = "STRICT_PACK"
    STRICT_SPREAD = "STRICT_SPREAD"


@dataclass(frozen=True, slots=True)
class LabelRule:
    """`key` is one of `values`, or, of a rule that `excludes`, none of them."""

    key: str
    values: tuple[str, ...]
    excludes: bool = False

    def allows(self, labels: Mapping[str, str]) -> bool:
        return (labels.get(self.key) in self.values) is not self.excludes

    def __str__(self) -> str:
        return f"{self.key} {'not ' * self.excludes}in ({', '.join(self.values)})"


Selector = tuple[LabelRule, ...]  # all of them


@dataclass(frozen=True, slots=True)
class Shape:
    """What one bundle asks for, in ten-thousandths of a CPU, a GPU, a MiB of GPU memory, a byte of host memory, a custom resource."""

    cpu: int = 0
    gpu: int = 0
    gpu_memory: int = 0
    memory: int = 0
    accelerator: str = ""  # the name behind `accelerator_type:`
    custom: tuple[tuple[str, int], ...] = ()
    selectors: tuple[Selector, ...] = ()  # the first is the wish, later ones are for when it cannot be had

    @property
    def devices(self) -> int:
        """Whole devices that it takes."""
        return self.gpu // UNIT

    @property
    def needs_gpu(self) -> bool:
        return bool(self.gpu or self.gpu_memory)

    @property
    def memory_per_device(self) -> int:
        """What each of its devices has to have, as far as it says."""
        return -(-self.gpu_memory // max(1, self.devices))

    def resources(self) -> dict[str, float]:
        """As Ray names them."""
        named = {
            "CPU": self.cpu,
            "GPU": self.gpu,
            "gpu_memory": self.gpu_memory,
            "memory": self.memory,
            **dict(self.custom),
        }
        found = {name: amount / UNIT for name, amount in named.items() if amount}
        return found | ({f"{_TYPE}{self.accelerator}": 0.001} if self.accelerator else {})

    def size(self) -> tuple[int, ...]:
        """By which the largest goes first."""
        return self.devices, self.memory_per_device, self.gpu, self.cpu, self.memory


@dataclass(frozen=True, slots=True)
class Gang:
    """`count` placement groups of these bundles, each all or nothing."""

    bundles: tuple[tuple[Shape, int], ...]
    strategy: Strategy = Strategy.PACK
    count: int = 1


@dataclass(frozen=True, slots=True)
class Demand:
    """Bundles by shape with their number, and gangs."""

    singles: tuple[tuple[Shape, int], ...] = ()
    gangs: tuple[Gang, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """What is laid on one node at once, and how often: a bundle, or all bundles of a STRICT_PACK group.

    Of items with one `spread` key at most `per_node` lie on a node: with as many as there are groups, each group finds its bundles on
    nodes of its own, since a bipartite graph has an edge colouring with as many colours as its largest degree (Koenig).
    `source` is the place of its single or gang in the demand; a gang needs `per_gang` of the item each.
    """

    bundles: tuple[tuple[Shape, int], ...]
    count: int
    source: int
    of_gang: bool = False
    per_gang: int = 1
    spread: int = -1
    per_node: int = 0

    @property
    def shape(self) -> Shape:
        """Its largest bundle, which says the most of where it can lie."""
        return self.bundles[0][0]

    @property
    def needs_gpu(self) -> bool:
        return any(shape.needs_gpu for shape, _ in self.bundles)

    def size(self) -> tuple[int, ...]:
        devices = sum(shape.devices * n for shape, n in self.bundles)
        return (self.needs_gpu, devices, *self.shape.size()[1:])


def is_custom(resource: str) -> bool:
    """Whether it is a resource that somebody gave nodes by hand, and that work asks for by name."""
    return resource not in _NAMED and not resource.startswith((_TYPE, *_OF_RAY))


def shape_of(resources: Mapping[str, float], selectors: Sequence[Selector] = ()) -> Shape:
    """A shape of the resources that Ray names: CPU, GPU, gpu_memory (MiB), memory (bytes), accelerator_type:NAME, custom ones."""
    amounts = {name: round(value * UNIT) for name, value in resources.items() if value > 0}
    types = sorted(name.removeprefix(_TYPE) for name in amounts if name.startswith(_TYPE))
    others = {name: amount for name, amount in amounts.items() if is_custom(name)}
    named = {"cpu": "CPU", "gpu": "GPU", "gpu_memory": "gpu_memory", "memory": "memory"}
    return Shape(
        **{ours: amounts.get(theirs, 0) for ours, theirs in named.items()},
        accelerator=types[0] if types else "",
        custom=tuple(sorted(others.items())),
        selectors=tuple(selectors),
    )


@dataclass(slots=True)
class Items:
    """The items of a demand, equal ones together: those of the shapes in `first`, then the others, largest first."""

    demand: Demand
    first: Set[Shape] = frozenset()
    dropped: Counter[int] = field(default_factory=Counter)  # groups of a gang that cannot be had, by the gang's place

    def all(self) -> list[Item]:
        found = [Item(((shape, 1),), n, at) for at, (shape, n) in enumerate(self.demand.singles) if n > 0]
        for at, gang in enumerate(self.demand.gangs):
            if (count := gang.count - self.dropped[at]) > 0:
                found += _of_gang(gang, at, count)
        return sorted(found, key=lambda item: (item.shape in self.first, item.size()), reverse=True)


def _of_gang(gang: Gang, at: int, count: int) -> list[Item]:
    ordered = tuple(sorted(gang.bundles, key=lambda bundle: bundle[0].size(), reverse=True))
    if gang.strategy is Strategy.STRICT_PACK:
        return [Item(ordered, count, at, of_gang=True)]
    apart = gang.strategy is Strategy.STRICT_SPREAD
    spread, per_node = (at, count) if apart else (-1, 0)
    return [Item(((shape, 1),), n * count, at, True, n, spread, per_node) for shape, n in ordered if n > 0]
