"""The order in which jobs of one command are submitted: each after those that it depends on. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

from whaleflux.errors import FieldViolation, InvalidArgument

T = TypeVar("T")


def in_order(items: Sequence[T], called: Callable[[T], Iterable[str]], needs: Callable[[T], Iterable[str]]) -> list[T]:
    """As given, but for what has to come earlier. `called`: the names of an item, of which others name some in `needs`.

    Raises InvalidArgument naming the jobs of a circle.
    """
    by_name: dict[str, list[int]] = {}
    for at, item in enumerate(items):
        for name in called(item):
            by_name.setdefault(name, []).append(at)
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for at, item in enumerate(items):
        sorter.add(at, *(earlier for name in needs(item) for earlier in by_name.get(name, ())))
    try:
        return [items[at] for at in sorter.static_order()]
    except CycleError as circle:
        around = " -> ".join(next(iter(called(items[at])), "?") for at in reversed(circle.args[1]))
        raise InvalidArgument(FieldViolation("depends_on", f"goes round in a circle: {around}")) from None
