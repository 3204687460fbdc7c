"""Which datasets have their room taken on which nodes, for whom, and whose quota counts it. Pure and exact.

Room is taken before a byte is pulled: when a job is placed, when GPUs are kept for one and its data is pulled ahead, and by pins. A copy has its
room once, whoever shares it; it counts once in each queue that holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

Copy = tuple[str, str]  # (node, dataset, or `part_of` one)


def part_of(dataset: str, ranks: int, world_size: int, holder: str) -> str:
    """What so many of its ranks read of a dataset that they divide: as large as their share, and no other holder's."""
    return f"{dataset}#{ranks}/{world_size}#{holder}"


class PinBook:
    """A holder is a job, or the pins of a dataset. `queue`: whose quota counts what it holds; "": nobody's."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}  # bytes by dataset; of others 0
        self._parts: dict[str, set[str]] = {}  # that are held, by dataset
        self._holders: dict[str, dict[str, set[str]]] = {}  # by dataset and node
        self._on_node: dict[str, int] = {}  # bytes
        self._of: dict[str, tuple[str, frozenset[Copy]]] = {}  # by holder: queue, and what it holds
        self._charges: dict[str, Counter[Copy]] = {}  # by queue: holders of each copy
        self._charged: dict[str, int] = {}  # by queue, bytes

    # reading

    def size_bytes(self, dataset: str) -> int:
        """Of a part its ranks' share; their files may be some more or less."""
        whole, _, part = dataset.partition("#")
        if not part:
            return self._sizes.get(dataset, 0)
        ranks, world_size = part.partition("#")[0].split("/")
        return -(-self._sizes.get(whole, 0) * int(ranks) // int(world_size))

    def holds(self, node: str, dataset: str) -> bool:
        """Whether its room is taken there."""
        return node in self._holders.get(dataset, ())

    def nodes_of(self, dataset: str) -> Collection[str]:
        """Where its room is taken."""
        return self._holders.get(dataset, {}).keys()

    def held_by(self, holder: str) -> frozenset[Copy]:
        """What it holds."""
        return self._of[holder][1] if holder in self._of else frozenset()

    def held_bytes(self, node: str) -> int:
        """Room that is taken on the node."""
        return self._on_node.get(node, 0)

    def missing_bytes(self, node: str, datasets: Iterable[str]) -> int:
        """Room that these would need beside what is taken."""
        return sum(self.size_bytes(name) for name in dict.fromkeys(datasets) if not self.holds(node, name))

    def charged_bytes(self, queue: str) -> int:
        """What the queue itself holds, on all nodes together."""
        return self._charged.get(queue, 0)

    def queues(self) -> Collection[str]:
        """Queues that hold something."""
        return self._charged.keys()

    def more_bytes(self, queue: str, holder: str, copies: Iterable[Copy]) -> int:
        """What more the queue would hold, if the holder held these instead of what it holds."""
        wanted, charges = set(copies), self._charges.get(queue, Counter())
        of, before = self._of.get(holder, ("", frozenset[Copy]()))
        gone = {copy for copy in before - wanted if charges[copy] == 1} if of == queue else set[Copy]()
        came = {copy for copy in wanted if not charges[copy]}
        return sum(self.size_bytes(name) for _, name in came) - sum(self.size_bytes(name) for _, name in gone)

    # changing

    def resize(self, dataset: str, size_bytes: int) -> Collection[str]:
        """Its size is known now, or another one; returns the nodes where it takes another room for that."""
        names = (dataset, *self._parts.get(dataset, ()))
        before = [self.size_bytes(name) for name in names]
        self._sizes[dataset] = size_bytes
        changed = set[str]()
        for name, was in zip(names, before, strict=True):
            if more := self.size_bytes(name) - was:
                changed |= self._grow(name, more)
        return changed

    def _grow(self, name: str, more: int) -> set[str]:
        nodes = set(self.nodes_of(name))
        for node in nodes:
            self._on_node[node] += more
        for queue, charges in self._charges.items():
            self._charged[queue] += more * sum((node, name) in charges for node in nodes)
        return nodes

    def forget(self, dataset: str) -> None:
        """It is nobody's dataset any more; what holds it still goes on to."""
        if dataset not in self._holders and dataset not in self._parts:
            self._sizes.pop(dataset, None)

    def hold(self, holder: str, copies: Iterable[Copy], queue: str = "") -> set[str]:
        """What the holder holds from now on; returns the nodes where that changed something for others."""
        of, before = self._of.pop(holder, ("", frozenset[Copy]()))
        wanted = frozenset(copies)
        if wanted:
            self._of[holder] = queue, wanted
        changed = set[str]()
        for node, dataset in before - wanted:
            changed |= self._let_go(holder, node, dataset)
        for node, dataset in wanted - before:
            changed |= self._take(holder, node, dataset)
        self._charge(of, before, -1)
        self._charge(queue, wanted, 1)
        return changed

    def _take(self, holder: str, node: str, dataset: str) -> set[str]:
        holders = self._holders.setdefault(dataset, {}).setdefault(node, set())
        holders.add(holder)
        if "#" in dataset:
            self._parts.setdefault(dataset.partition("#")[0], set()).add(dataset)
        if len(holders) > 1:
            return set()
        self._on_node[node] = self.held_bytes(node) + self.size_bytes(dataset)
        return {node}

    def _let_go(self, holder: str, node: str, dataset: str) -> set[str]:
        holders = self._holders[dataset][node]
        holders.discard(holder)
        if holders:
            return set()
        del self._holders[dataset][node]
        if not self._holders[dataset]:
            del self._holders[dataset]
            self._forget_part(dataset)
        self._on_node[node] -= self.size_bytes(dataset)
        return {node}

    def _forget_part(self, name: str) -> None:
        whole, _, part = name.partition("#")
        if part:
            self._parts[whole].discard(name)
            if not self._parts[whole]:
                del self._parts[whole]

    def _charge(self, queue: str, copies: frozenset[Copy], sign: int) -> None:
        if not queue:
            return
        charges, bytes_ = self._charges.setdefault(queue, Counter()), 0
        for copy in copies:
            before = charges[copy]
            charges[copy] += sign
            if not before or not charges[copy]:
                bytes_ += sign * self.size_bytes(copy[1])
            if not charges[copy]:
                del charges[copy]
        self._charged[queue] = self.charged_bytes(queue) + bytes_
        if not charges:
            del self._charges[queue], self._charged[queue]

    def check(self) -> None:
        """Raises AssertionError when a sum is not that of what is held."""
        copies = {(node, name) for name, nodes in self._holders.items() for node in nodes}
        held = {copy for _, of in self._of.values() for copy in of}
        assert copies == held, "copies without a holder"
        for node in {*self._on_node, *(node for node, _ in held)}:
            there = sum(self.size_bytes(name) for at, name in held if at == node)
            assert self.held_bytes(node) == there, f"{node}: what is held does not add up"
        for queue in {of for of, _ in self._of.values()} - {""}:
            its = {copy for of, copies in self._of.values() if of == queue for copy in copies}
            assert self.charged_bytes(queue) == sum(self.size_bytes(name) for _, name in its), f"{queue}: its charge"
        assert set(self._charges) == {of for of, _ in self._of.values()} - {""}, "charges of nobody"
