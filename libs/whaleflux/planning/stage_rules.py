"""Whether the layers that a configuration says fit its pipeline: of the stages alike, and of a first and a last one with layers of their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stages:
    """`layers` of the model in `pp` stages, each in multiples of `multiple` (virtual stages); `first` and `last` have their own (0: as the others).

    `listed`: layers stage by stage, where a configuration has them all. `parts`: how many (virtual) stages it makes, where it says so.
    """

    layers: int
    pp: int
    multiple: int = 1
    first: int = 0
    last: int = 0
    listed: tuple[int, ...] = ()
    parts: int = 0


def wrong_layers(it: Stages) -> str:
    """In words; "": nothing."""
    if it.parts and it.parts % it.pp:
        return f"{it.layers} layers make {it.parts} stages, not a multiple of pipeline parallelism {it.pp}"
    if it.listed:
        fits = sum(it.listed) == it.layers and len(it.listed) == it.pp
        return (
            ""
            if fits
            else f"stages of {', '.join(map(str, it.listed[:8]))} layers are not {it.layers} in {it.pp} stages"
        )
    return "" if it.parts else _wrong_ends(it)


def _wrong_ends(it: Stages) -> str:
    ends = [one for one in (it.first, it.last) if one]
    between, rest = it.pp - len(ends), it.layers - sum(ends)
    if any(one % it.multiple for one in ends):
        return f"{' and '.join(map(str, ends))} layers at the ends are not a multiple of {it.multiple} (virtual)"
    if (rest == 0 and between == 0) or (between > 0 and rest > 0 and rest % (between * it.multiple) == 0):
        return ""
    virtual = f" x {it.multiple} (virtual)" if it.multiple > 1 else ""
    return f"{rest} layers are not a multiple of {between} stages{' between the ends' if ends else ''}{virtual}"
