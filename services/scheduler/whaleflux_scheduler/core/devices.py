"""Which node offers which GPU. A GPU is its UUID; its position on a node is what the driver counts at present.

A GPU is offered by one node only: not while its node reports it twice or without a UUID, not while another open node reports it
too (two agents on one machine), and not while work that was placed under another node's name holds it (an agent that was renamed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from whaleflux.fleet.model import Gpu, Node

Gpus = Mapping[str, frozenset[str]]
"""UUIDs by node."""
NOTHING: Gpus = {}


class Devices:
    """`holder_node` says under which node's name a GPU is held, "" when it is free."""

    def __init__(self, holder_node: Callable[[str], str]) -> None:
        self._holder_node = holder_node
        self._nodes: dict[str, Node] = {}  # as they report themselves
        self._positions: dict[str, dict[str, int]] = {}
        self._listed: dict[str, _Listed] = {}
        self._reporters: dict[str, tuple[str, ...]] = {}  # by UUID
        self._several: set[str] = set()  # UUIDs that several nodes report
        self.open: set[str] = set()

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._nodes

    def report(self, node: Node) -> set[str]:
        """A node's facts as they are now; returns the nodes whose offer may differ, itself included."""
        affected = {node.name} | self._forget(node.name)
        self._nodes[node.name], self._listed[node.name] = node, _Listed.of(node)
        self._positions[node.name] = {gpu.uuid: gpu.index for gpu in node.gpus if gpu.uuid}
        for uuid in self._positions[node.name]:
            others = self._reporters.get(uuid, ())
            self._reporters[uuid] = (*others, node.name)
            if others:
                self._several.add(uuid)
                affected.update(others)
        return affected

    def remove(self, name: str) -> set[str]:
        """The node is gone; returns the nodes whose offer may differ."""
        affected = self._forget(name)
        self._nodes.pop(name, None)
        self._listed.pop(name, None)
        self.open.discard(name)
        return affected

    def _forget(self, name: str) -> set[str]:
        affected = set[str]()
        for uuid in self._positions.pop(name, {}):
            others = tuple(other for other in self._reporters.pop(uuid) if other != name)
            if others:
                self._reporters[uuid] = others
                affected.update(others)
            if len(others) < 2:
                self._several.discard(uuid)
        return affected

    def elsewhere(self, gpus: Iterable[tuple[str, str]]) -> set[str]:
        """Other nodes that report some of these GPUs, (node, UUID)."""
        return {other for node, uuid in gpus for other in self._reporters.get(uuid, ()) if other != node}

    def twins(self, name: str) -> set[str]:
        """Other nodes that report some of the same GPUs."""
        if not self._several:  # as nearly always, and this is asked of each node of a fleet
            return set()
        return self.elsewhere((name, uuid) for uuid in self._positions.get(name, ()))

    def offered(self, node: Node) -> tuple[Node, list[str]]:
        """The node as placement may use it, and why some of its GPUs are left out."""
        seen = Counter(gpu.uuid for gpu in node.gpus)
        why = [self._why_not(node.name, gpu, seen[gpu.uuid]) for gpu in node.gpus]
        if not any(why):
            return node, []
        gpus = tuple(replace(gpu, healthy=gpu.healthy and not no) for gpu, no in zip(node.gpus, why, strict=True))
        return replace(node, gpus=gpus), [no for no in why if no]

    def _why_not(self, node: str, gpu: Gpu, times: int) -> str:
        if not gpu.uuid:
            return f"GPU {gpu.index} has no UUID"
        if times > 1:
            return f"{gpu.uuid} is reported {times} times"
        if (holder := self._holder_node(gpu.uuid)) and holder != node:
            return f"{gpu.uuid} is held by work on {holder}"
        reporters = self._reporters.get(gpu.uuid, ())
        others = [other for other in reporters if other != node and other in self.open] if len(reporters) > 1 else []
        return f"{gpu.uuid} is reported by {others[0]} too" if others else ""

    def indices(self, node: str, uuids: Collection[str]) -> tuple[int, ...]:
        """Where the driver counts these GPUs now; those that the node does not report (any more) are left out."""
        positions = self._positions.get(node, {})
        return tuple(sorted(positions[uuid] for uuid in uuids if uuid in positions))

    def uuids(self, node: str, indices: Iterable[int]) -> tuple[str, ...]:
        """The GPUs at these positions, in this order."""
        at = self._listed[node].at
        return tuple([at[index] for index in indices])

    def in_order(self, gpus: Gpus) -> Gpus:
        """Those of them that no node reports as sick."""
        return {
            node: uuids - self._listed[node].sick if node in self._listed else uuids for node, uuids in gpus.items()
        }

    def memory_bytes(self, node: str, uuid: str) -> int:
        """Memory of a GPU, 0 when the node does not report it."""
        known = self._nodes.get(node)
        return next((gpu.memory_bytes for gpu in known.gpus if gpu.uuid == uuid), 0) if known else 0

    def parts_of_gpu(self, node: str, uuids: Collection[str], share_bytes: int) -> list[float]:
        """How much of a GPU each is, by memory: a share of it, a MIG instance, or all."""
        if not share_bytes and self._listed[node].whole:
            return [1.0] * len(uuids)
        held = [gpu for gpu in self._nodes[node].gpus if gpu.uuid in uuids]
        return [share_bytes / gpu.memory_bytes if share_bytes else gpu.part_of_gpu for gpu in held]

    def models(self, node: str, uuids: Iterable[str]) -> list[str]:
        """The catalogue names of GPUs that the node reports."""
        models = self._listed[node].models
        return [models[uuid] for uuid in uuids]


@dataclass(frozen=True, slots=True)
class _Listed:
    """A node's GPUs, looked up often: UUIDs by position, models by UUID, whether all of them are whole GPUs, and those that are not healthy."""

    at: Mapping[int, str]
    models: Mapping[str, str]
    whole: bool
    sick: frozenset[str]

    @classmethod
    def of(cls, node: Node) -> _Listed:
        at = {gpu.index: gpu.uuid for gpu in node.gpus}
        models = {gpu.uuid: gpu.model for gpu in node.gpus}
        sick = frozenset(gpu.uuid for gpu in node.gpus if not gpu.healthy)
        return cls(at, models, all(gpu.part_of_gpu == 1.0 for gpu in node.gpus), sick)
