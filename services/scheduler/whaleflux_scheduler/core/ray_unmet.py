"""Why a bundle of a Ray cluster fits on no kind of node, in words that name the limit and the closest miss. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from whaleflux_scheduler.core.ray_demand import UNIT, Item


class _Kind(Protocol):
    """What is asked of a kind of node."""

    @property
    def model(self) -> str: ...
    @property
    def device_memory_mib(self) -> int: ...
    @property
    def gpus(self) -> int: ...
    @property
    def cpu(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def labels(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def custom(self) -> tuple[tuple[str, int], ...]: ...


@dataclass(frozen=True, slots=True)
class Never:
    """Words, whether it can never be had of these kinds, and whether nobody has looked yet."""

    words: str
    is_never: bool = True
    postponed: bool = False


NO_MORE = Never("no more nodes that it fits on are free", is_never=False)
POSTPONED = Never(
    "the time for one plan was over before its turn; it comes first in the next", is_never=False, postponed=True
)


def never(item: Item, kinds: Sequence[_Kind]) -> Never:
    """The first limit that no kind passes."""
    if not kinds:
        return Never("no node is free", is_never=False)
    for words in (
        _custom(item, kinds),
        _fraction(item),
        _types(item, kinds),
        _device(item, kinds),
        _sizes(item, kinds),
    ):
        if words:
            return Never(words)
    return Never("no node that has its labels and type is large enough for all of it")


def _custom(item: Item, kinds: Sequence[_Kind]) -> str:
    known = {name for kind in kinds for name, _ in kind.custom}
    asked = sorted({name for shape, _ in item.bundles for name, _ in shape.custom} - known)
    return f"it asks for the resource {', '.join(asked[:5])}, which no node has" if asked else ""


def _fraction(item: Item) -> str:
    bad = next((shape for shape, _ in item.bundles if shape.gpu > UNIT and shape.gpu % UNIT), None)
    return f"GPU: {bad.gpu / UNIT:g} is no whole number; above 1 GPUs are asked for whole" if bad else ""


def _types(item: Item, kinds: Sequence[_Kind]) -> str:
    for shape, _ in item.bundles:
        models = {kind.model for kind in kinds if kind.model}
        if shape.accelerator and not any(shape.accelerator in (m, m.partition("-")[0]) for m in models):
            return (
                f"no node has accelerator_type {shape.accelerator}; there are {', '.join(sorted(models)[:8]) or 'none'}"
            )
        wishes = shape.selectors
        if wishes and not any(all(rule.allows(dict(k.labels)) for rule in wish) for wish in wishes for k in kinds):
            return "no node has labels " + " or ".join(" and ".join(map(str, wish)) for wish in wishes[:3])
    return ""


def _device(item: Item, kinds: Sequence[_Kind]) -> str:
    asked = max(shape.memory_per_device for shape, _ in item.bundles) / UNIT
    largest = max(kinds, key=lambda kind: kind.device_memory_mib)
    if asked <= largest.device_memory_mib:
        return ""
    if not largest.device_memory_mib:
        return "it asks for GPU memory, and no node has a GPU"
    return f"it asks for {asked:g} MiB on one GPU; the largest, {largest.model}, has {largest.device_memory_mib}"


def _sizes(item: Item, kinds: Sequence[_Kind]) -> str:
    gpus = sum(shape.devices * n for shape, n in item.bundles)
    cpu = sum(shape.cpu * n for shape, n in item.bundles)
    memory = sum(shape.memory * n for shape, n in item.bundles)
    for asked, most, words in (
        (gpus, max(kind.gpus for kind in kinds), "GPUs"),
        (cpu / UNIT, max(kind.cpu for kind in kinds) / UNIT, "CPUs"),
        (memory / UNIT / 2**30, max(kind.memory for kind in kinds) / UNIT / 2**30, "GiB of memory"),
    ):
        if asked > most:
            return f"it asks for {asked:g} {words} on one node; the largest has {most:g}"
    return ""
