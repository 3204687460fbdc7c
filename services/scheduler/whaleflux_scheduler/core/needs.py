"""What a request needs at least, and which requests a node that gained room could admit. Pure.

These are necessary conditions, by whole devices alone: whoever does not meet them cannot be placed, whoever does is asked of the engine.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from whaleflux.fleet.model import Level
from whaleflux_scheduler.core.placement.api import PlaceRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Need:
    """`gpus` free devices of one of `models` ("" any) in a domain of `level`; 0: not counted in whole devices."""

    models: tuple[str, ...]
    level: Level
    gpus: int


def need_of(request: PlaceRequest, *, own: bool = False) -> Need:
    """`own`: the asker holds or claims devices already, which count for it wherever they are."""
    if own or request.without_gpus or request.group.share:
        return Need(("",), Level.FLEET, 0)
    options = request.requirement.any_of
    models = tuple(dict.fromkeys(option.model for option in options))
    return Need(models, _level(request), request.units * min(option.per_unit for option in options))


def _level(request: PlaceRequest) -> Level:
    level = max(request.level or Level.FLEET, request.group.level or Level.FLEET)
    return Level.NODE if request.max_nodes == 1 or level > Level.NODE else Level(level)


class NeedIndex(Generic[T]):
    """Things by what they need."""

    def __init__(self) -> None:
        self._by_size: dict[tuple[str, Level], dict[int, dict[T, None]]] = {}
        self._sizes: dict[str, dict[Level, list[int]]] = {}  # by model; of what is in here alone

    def add(self, thing: T, need: Need) -> None:
        for model in need.models:
            group = self._by_size.setdefault((model, need.level), {})
            if need.gpus not in group:
                group[need.gpus] = {}
                insort(self._sizes.setdefault(model, {}).setdefault(need.level, []), need.gpus)
            group[need.gpus][thing] = None

    def discard(self, thing: T, need: Need) -> None:
        for model in need.models:
            group = self._by_size.get((model, need.level), {})
            if thing not in group.get(need.gpus, ()):
                continue
            del group[need.gpus][thing]
            if not group[need.gpus]:
                del group[need.gpus]
                self._sizes[model][need.level].remove(need.gpus)
            if not group:
                del self._sizes[model][need.level]

    def admissible(self, models: Iterable[str], free: Callable[[str, Level], int]) -> Iterator[T]:
        """Those that could use devices of these models; `free`: most free devices of a model in one domain that gained some."""
        for model in (*models, ""):
            levels = self._sizes.get(model)
            for level in sorted(levels) if levels else ():
                group, sizes = self._by_size[model, level], self._sizes[model][level]
                for size in sizes[: bisect_right(sizes, free(model, level))]:
                    yield from group[size]
