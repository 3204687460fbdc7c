"""When a model is ready at a site, and whether it fits there: from what was measured there, said as not known where nothing was. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from whaleflux.quantities import shown_bytes

WEIGHTS_FACTOR = 1.1  # what engines hold beside the bytes of the files
KV_BYTES = 2 * 10**9  # where the model says nothing


@dataclass(frozen=True, slots=True)
class Card:
    """GPUs of one type on one node."""

    gpu_model: str
    memory_bytes: int
    count: int
    usd_per_gpu_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What the last pulls and starts took at a site; 0: not known."""

    source_bytes_per_s: float = 0.0
    peer_bytes_per_s: float = 0.0
    engine_start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's weights, as seen from one site. `size_bytes` 0: not known."""

    name: str = ""
    size_bytes: int = 0
    here: bool = False  # a node of the site has all of it
    source: str = ""
    had_bytes: int = 0  # of it, what is in the version of before, which a node of the site has

    @property
    def missing_bytes(self) -> int:
        return 0 if self.here else self.size_bytes - self.had_bytes


@dataclass(frozen=True, slots=True)
class Arrival:
    """`seconds` None: not known."""

    seconds: float | None
    why: str


def gpu_memory_bytes(weights_bytes: int, kv_bytes: int, gpus: int) -> int:
    """Least memory of each of a replica's GPUs; 0 where it is not known how large the weights are."""
    return math.ceil((WEIGHTS_FACTOR * weights_bytes + (kv_bytes or KV_BYTES)) / gpus) if weights_bytes else 0


def misfit(cards: Sequence[Card], wanted: Sequence[str], gpus: int, least_bytes: int) -> str:
    """Why no node of a site can hold a replica, "" where one can or nothing is known of its nodes. `wanted`: GPU types, none: any."""
    if not cards:
        return ""
    named = [card for card in cards if not wanted or card.gpu_model in wanted]
    if not named:
        return f"has no {' or '.join(wanted)}; its GPUs are {_types(cards)}"
    many = [card for card in named if card.count >= gpus]
    if not many:
        return f"has no node with {gpus} of {_types(named)}; the most is {max(card.count for card in named)}"
    if any(card.memory_bytes >= least_bytes for card in many):
        return ""
    largest = max(many, key=lambda card: card.memory_bytes)
    return (
        f"cannot hold it: each of {gpus} GPU(s) needs {shown_bytes(least_bytes)} (weights x {WEIGHTS_FACTOR} and room for requests), its largest, "
        f"{largest.gpu_model}, has {shown_bytes(largest.memory_bytes)}"
    )


def arrival(weights: Weights, measured: Measured) -> Arrival:
    """From the placement to the first token: weights, then the engine. What boots and the image take is not in it."""
    pull_s, pulled = _pull(weights, measured)
    start_s = measured.engine_start_s or None
    engine = f"engine {start_s:.0f} s" if start_s else "how long the engine needs is not known yet"
    why = f"{pulled}, then {engine}" if pulled else engine
    return Arrival(None if pull_s is None or start_s is None else pull_s + start_s, why)


def left(whole: Arrival, measured: Measured, done_bytes: float, size_bytes: float, bytes_per_s: float) -> Arrival:
    """The same of a pull that is under way, as it goes now."""
    pull_s = (size_bytes - done_bytes) / bytes_per_s if bytes_per_s else None
    start_s = measured.engine_start_s or None
    engine = f"engine {start_s:.0f} s" if start_s else "how long the engine needs is not known yet"
    rate = f" at {shown_bytes(bytes_per_s)}/s" if bytes_per_s else ""
    why = f"{shown_bytes(size_bytes - done_bytes)} of {shown_bytes(size_bytes)} left{rate}, then {engine}"
    if pull_s is None:
        return Arrival(whole.seconds, why)
    return Arrival(None if start_s is None else pull_s + start_s, why)


def _pull(weights: Weights, measured: Measured) -> tuple[float | None, str]:
    if not weights.name:
        return 0.0, ""
    if not weights.size_bytes:
        return None, f"{weights.name}, whose size is not known yet"
    size, pulled = shown_bytes(weights.size_bytes), weights.size_bytes - (0 if weights.here else weights.had_bytes)
    if pulled < weights.size_bytes:
        size = f"{shown_bytes(pulled)} of {size} (the rest is in the version of before)"
    rate = measured.peer_bytes_per_s if weights.here else measured.source_bytes_per_s
    origin = "a node of the site" if weights.here else weights.source
    if not rate:
        return None, f"{size} from {origin}, how fast is not known yet"
    return pulled / rate, f"{size} at {shown_bytes(rate)}/s from {origin}"


def _types(cards: Iterable[Card]) -> str:
    return ", ".join(sorted({card.gpu_model or "of no known type" for card in cards}))
