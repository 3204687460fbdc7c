"""What placement knows of datasets: the facts of each, and the room that they take on nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from whaleflux_scheduler.core.placement.api import DatasetFact
from whaleflux_scheduler.core.placement.pin_book import PinBook

_PINS = "!pins"


class Datasets(dict[str, DatasetFact]):
    """By name; `book` says whose room is taken where."""

    def __init__(self, facts: Iterable[DatasetFact] = ()) -> None:
        super().__init__()
        self.book = PinBook()
        for fact in facts:
            self.know(fact)

    def know(self, fact: DatasetFact) -> set[str]:
        """As it is now; returns the nodes on which datasets take another room than before."""
        changed = set(self.book.resize(fact.name, fact.size_bytes))
        before, self[fact.name] = self.get(fact.name), fact
        return changed | self._pin(fact.name, before, fact)

    def drop(self, name: str) -> set[str]:
        """It is gone, and so are its pins."""
        changed = self._pin(name, self.pop(name, None), None)
        self.book.forget(name)
        return changed

    def _pin(self, name: str, before: DatasetFact | None, now: DatasetFact | None) -> set[str]:
        pins, changed = _by_queue(now), set[str]()
        for queue in {*_by_queue(before), *pins}:
            copies = [(node, name) for node in pins.get(queue, ())]
            changed |= self.book.hold(f"{name}{_PINS}/{queue}", copies, queue)
        return changed

    def here(self, node: str, names: Iterable[str]) -> bool:
        """Whether the node has a whole copy of each of them."""
        return all(name in self and node in self[name].cached_on for name in names)


def _by_queue(fact: DatasetFact | None) -> dict[str, Collection[str]]:
    """Nodes where its room is taken for good, by the queue whose quota counts it."""
    if fact is None:
        return {}
    nodes = dict[str, list[str]]()
    for queue, node in fact.charged_on:
        nodes.setdefault(queue, []).append(node)
    return {"": fact.held_on, **nodes}
