"""Which GPUs a replica gets, of what the scheduler says of the fleet; and what to change where nothing serves. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Lack(IntEnum):
    """What keeps a size from serving; the numbers are those of the contract, later ones hold only where none before them does."""

    NOTHING = 0
    WEIGHTS = 1
    CONTEXT = 2
    FIRST_TOKEN = 3
    TOKEN = 4
    RATE = 5


@dataclass(frozen=True, slots=True)
class Size:
    """So many GPUs of a type on a node of a site, and how it serves with them."""

    gpu_type: str
    gpus: int
    site: str
    lack: Lack = Lack.NOTHING
    words: str = ""
    starts_now: bool = True
    short_bytes: float = 0.0  # of its weights on each GPU
    context_tokens: int = 0
    first_token_s: float = 0.0
    per_token_s: float = 0.0
    requests_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing serves: the field of the model's record that is in the way, and what to change."""

    field: str
    words: str


def suiting(sizes: Sequence[Size], site: str, types: Collection[str]) -> list[Size]:
    """Those of a site ("": of any) and of some types (none: of all), in the order in which they are."""
    return [one for one in sizes if site in ("", one.site) and (not types or one.gpu_type in types)]


def chosen(sizes: Sequence[Size]) -> Size | None:
    """What the next replica gets: the first that serves; `sizes` as the scheduler has them, the best first."""
    return next((one for one in sizes if one.lack is Lack.NOTHING), None)


def better(sizes: Sequence[Size], gpu_type: str, gpus: int) -> Size | None:
    """What a replica that waits for such GPUs gets in their place: where they serve no more, or others can start now and they cannot."""
    best = chosen(sizes)
    mine = [one for one in sizes if (one.gpu_type, one.gpus) == (gpu_type, gpus) and one.lack is Lack.NOTHING]
    if best is None or any(one.starts_now for one in mine):
        return None
    return best if best.starts_now or not mine else None


def refusal(
    all_of_fleet: Sequence[Size], sizes: Sequence[Size], requests_per_s: float = 0.0, unable: Sequence[str] = ()
) -> Refusal | None:
    """Why none of `sizes` serves, by what is nearest to it; None where one does, or the fleet has no GPUs yet, which may come.

    `requests_per_s`: of all replicas together. `unable`: what the scheduler says of types that it left out.
    """
    if chosen(sizes) is not None or not (all_of_fleet or unable):
        return None
    if not sizes:
        there = "; ".join((*unable, *sorted({f"{one.gpus} x {one.gpu_type}" for one in all_of_fleet})[:10]))
        return Refusal(
            "engine.gpu_models",
            f"no GPUs that will do take work; there are: {there[:600]}. Allow other types or numbers",
        )
    one = max(sizes, key=_nearness)
    field, fix = _fixes(one, requests_per_s)
    return Refusal(
        field, f"nothing in the fleet serves it; the nearest, {one.gpus} x {one.gpu_type}: {one.words}. {fix}"
    )


def _nearness(one: Size) -> tuple[float, ...]:
    short_of = {
        Lack.WEIGHTS: -one.short_bytes,
        Lack.CONTEXT: float(one.context_tokens),
        Lack.FIRST_TOKEN: -one.first_token_s,
        Lack.TOKEN: -one.per_token_s,
        Lack.RATE: one.requests_per_s,
    }
    return float(one.lack), short_of.get(one.lack, 0.0)


def _fixes(one: Size, requests_per_s: float) -> tuple[str, str]:
    """The field of the model's record, and a fix in the words of a model's file."""
    enough = math.ceil(requests_per_s / one.requests_per_s) if one.requests_per_s else 0
    fixes = {
        Lack.WEIGHTS: (
            "engine.shape",
            "Add nodes with larger GPUs or more of them, take weights in 8 bit (`fp8`), or a smaller model",
        ),
        Lack.CONTEXT: ("context_window_tokens", f"Set `context` to {one.context_tokens} or less, or add larger GPUs"),
        Lack.FIRST_TOKEN: (
            "objective.first_token",
            f"Set `slo.first_token` to more than {1e3 * one.first_token_s:.0f} ms, or `slo.prompt` to less",
        ),
        Lack.TOKEN: (
            "objective.per_token",
            f"Set `slo.per_token` to more than {1e3 * one.per_token_s:.0f} ms, or add faster GPUs",
        ),
        Lack.RATE: ("objective.requests_per_s", f"Set `replicas.min` to {enough} or more, or `slo.requests` to less"),
    }
    return fixes.get(one.lack, ("engine.shape", ""))
