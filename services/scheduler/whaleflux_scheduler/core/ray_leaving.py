"""Which idle workers of a Ray cluster go before their time, because somebody waits for GPUs. Pure.

A worker leaves by itself when it was idle for as long as its cluster allows. That is for GPUs that nobody else wants: it saves the next task a
start. Where jobs wait for GPUs in vain, a start costs less than what idles meanwhile: after `SOON_S`, about what a node takes to join.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SOON_S = 5.0


@dataclass(frozen=True, slots=True)
class Idle:
    """A worker on which nothing has run for a while. `instance` is what its node is called in Ray."""

    instance: str
    gpus: int
    gpu_type: str
    idle_s: float


def leaving(idle: Iterable[Idle], wanted: Mapping[str, int]) -> list[str]:
    """Their instances, longest idle first, until as many GPUs come free as are waited for. `wanted`: GPUs by type, "": of any."""
    left, found = Counter(wanted), list[str]()
    for one in sorted(idle, key=lambda one: (-one.idle_s, one.instance)):
        if one.idle_s < SOON_S or not one.gpus:
            continue
        kind = next((kind for kind in (one.gpu_type, "") if left[kind] > 0), None)
        if kind is not None:
            left[kind] -= one.gpus
            found.append(one.instance)
    return found
