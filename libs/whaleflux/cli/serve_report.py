"""What `whaleflux fits --serve` prints: which GPUs serve a model, and the same as JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from whaleflux.cli.planning_options import billions
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.serving import Replica, Requests
from whaleflux.quantities import shown_number

_MOST_SHOWN, _MOST_REFUSED = 12, 6


def report(shape: ModelShape, asked: Requests, found: Sequence[Replica]) -> list[str]:
    """For people: what meets the objective, the cheapest first; then why others do not."""
    lines = [
        f"{shape.name} ({billions(shape.parameters)} parameters), prompts of {asked.prompt:,} tokens, answers of {asked.answer:,}{_objective(asked)}"
    ]
    good = [one for one in found if one.meets]
    if good:
        heads = ("REPLICA", "AT ONCE", "FIRST TOKEN", "TOKEN", "REQUESTS/S", "$/1M TOKENS", "CONTEXT", "BOUND BY")
        lines += ["", *_aligned([heads, *map(_cells, good[:_MOST_SHOWN])])]
    if len(good) > _MOST_SHOWN:
        lines.append(f"and {len(good) - _MOST_SHOWN} more: -o json has them all")
    bad = [one for one in found if not one.meets]
    if bad and not good:
        lines += ["", "nothing meets it", *(f"  {one.tp} x {one.gpu}: {one.binding}" for one in bad[:_MOST_REFUSED])]
        lines.append("take larger GPUs, shorter prompts or context, --precision fp8, or a looser objective")
    return lines


def _objective(asked: Requests) -> str:
    parts = [
        f"{name} within {shown_number(limit * 1e3)} ms"
        for name, limit in (("the first token", asked.first_token_s), ("each further one", asked.token_s))
        if limit
    ]
    parts += [f"requests of up to {asked.context:,} tokens"] if asked.context else []
    parts += [f"{shown_number(asked.per_s)} requests/s"] if asked.per_s else []
    return f"; {', '.join(parts)}" if parts else ""


def _cells(one: Replica) -> tuple[str, ...]:
    cost = shown_number(one.usd_per_million_tokens) if one.usd_per_million_tokens else "not known"
    first, token = f"{one.first_token_s * 1e3:,.0f} ms", f"{one.token_s * 1e3:.1f} ms"
    return (
        f"{one.tp} x {one.gpu}",
        f"{one.at_once:,}",
        first,
        token,
        f"{one.requests_per_s:.2f}",
        cost,
        f"{one.context:,}",
        one.binding,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return ["".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]


def as_json(shape: ModelShape, asked: Requests, found: Sequence[Replica]) -> dict[str, Any]:
    """For programs."""
    return {
        "model": shape.name, "parameters": shape.parameters, "asked": asdict(asked),
        "replicas": [asdict(one) | {"lack": one.lack.value, "fits": one.fits, "meets": one.meets} for one in found],
    }  # fmt: skip
