"""Kinds of values that say which GPUs will do, and which part of one a rank gets."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from whaleflux import quantities
from whaleflux.errors import FieldViolation
from whaleflux.manifests.text_values import Texts, text
from whaleflux.manifests.values import Schema, Size, Value, Violations, number

MAX_PER_UNIT = 64
LEAST_SPEED, MOST_SPEED = 0.01, 100.0
_GPU_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,62}")
_COUNTED = re.compile(r"\s*(\d{1,9})\s*x\s*(\S.*)")
_FORM = "a type such as A100-80GB, `2 x A100-80GB`, or {type: A100-80GB, each: 2, speed: 0.9}"

_MIG_PROFILE = re.compile(r"([1-9]c\.)?[1-9]g\.[1-9][0-9]{0,3}gb(\+[a-z.]{1,8})?")


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """A GPU type of which `per_unit` count as one GPU asked for, `throughput` times as fast together as the job's reference GPU."""

    model: str = ""
    per_unit: int = 1
    throughput: float = 1.0

    @property
    def plain(self) -> bool:
        return self.per_unit == 1 and self.throughput == 1.0


@dataclass(frozen=True)
class GpuTypes(Texts):
    """GPU types that will do. The message has their names, and in `options` what counts as something else than one GPU."""

    pattern: re.Pattern[str] = _GPU_NAME
    wanted: str = "a catalogue name such as H200 or A100-80GB"
    most: int = 32
    shown: str = "GPU type, or a list of `H200`, `2 x A100-80GB`, `{type: A100-80GB, each: 2, speed: 0.9}`"

    def parse(self, value: object, base: Path) -> list[GpuChoice]:
        return [_choice(item) for item in (value if isinstance(value, list) else [value])]

    def write(self, message: Any, name: str, value: Any) -> None:
        getattr(message, name).extend(choice.model for choice in value)
        for choice in value:
            if not choice.plain:
                message.options.add(model=choice.model, per_unit=choice.per_unit, throughput=choice.throughput)

    def schema(self) -> Schema:
        each = {"type": "integer", "minimum": 1, "maximum": MAX_PER_UNIT}
        speed = {"type": "number", "minimum": LEAST_SPEED, "maximum": MOST_SPEED}
        full = {"type": "object", "properties": {"type": {"type": "string"}, "each": each, "speed": speed}, "required": ["type"],
                "additionalProperties": False}  # fmt: skip
        one = {"anyOf": [{"type": ["string", "number"]}, full]}
        return {"anyOf": [one, {"type": "array", "items": one}]}


def _choice(item: object) -> GpuChoice:
    given = item if isinstance(item, dict) else {"type": item}
    if unknown := sorted(map(str, given.keys() - {"type", "each", "speed"})):
        raise ValueError(f"{unknown[0][:40]!r} is not known of a GPU type; write {_FORM}")
    if given.get("type") is None:
        raise ValueError(f"must be {_FORM}")
    model = text(given["type"])
    counted = _COUNTED.fullmatch(model)
    if counted and "each" in given:
        raise ValueError(f"{model[:40]}: says how many twice; write {_FORM}")
    each, speed = given.get("each", int(counted[1]) if counted else 1), given.get("speed", 1.0)
    if isinstance(each, bool) or not isinstance(each, int) or not 1 <= each <= MAX_PER_UNIT:
        raise ValueError(f"{model}: so many GPUs count as one; use 1 to {MAX_PER_UNIT}")
    if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not LEAST_SPEED <= speed <= MOST_SPEED:
        raise ValueError(f"{model}: speed is against the reference GPU, 1.0; use {LEAST_SPEED:g} to {MOST_SPEED:g}")
    return GpuChoice(counted[2] if counted else model, each, float(speed))


class GpuOptions(Value):
    """What types of `any_of` count as; the message says it of those that do not count as one GPU at speed 1."""

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(GpuChoice(o.model, o.per_unit or 1, o.throughput or 1.0) for o in get(message))

    def violations(self, at: str, value: Any) -> Violations:
        for i, choice in enumerate(value[: GpuTypes.most]):
            yield from number(f"{at}[{i}].per_unit", choice.per_unit, 1, MAX_PER_UNIT)
            yield from number(f"{at}[{i}].throughput", choice.throughput, LEAST_SPEED, MOST_SPEED)


@dataclass(frozen=True)
class LeastSize(Size):
    """A least size, written with >=: without it nobody could tell "at least" from "this much of it"."""

    instead: str = ""  # the field for "this much of it"

    def words(self) -> str:
        return "least size: `>= 80 GB`"

    def parse(self, value: object, base: Path) -> Any:
        if isinstance(value, str) and value.strip().startswith(">="):
            return super().parse(value, base)
        shown = str(value)[:40]
        raise ValueError(
            f"is the least memory of each whole GPU and is written with >=: '>= {shown}'; for {shown} of a GPU that others"
            f" may use too write {self.instead}: {shown} instead"
        )

    def schema(self) -> Schema:
        return {"type": "string", "pattern": r"^\s*>="}


@dataclass(frozen=True)
class MigInstance(Value):
    """A MIG profile, or the least memory that the profile has by its name; the message has a field for each."""

    most: int = 4 << 40

    def words(self) -> str:
        return "MIG profile: `1g.18gb`; or a least size: `20 GB`"

    def parse(self, value: object, base: Path) -> str | int:
        if isinstance(value, str) and _MIG_PROFILE.fullmatch(value.strip()):
            return value.strip()
        try:
            size = quantities.size_bytes(value)
        except ValueError:
            size = 0
        if not 0 < size <= self.most:
            raise ValueError(
                "must be a MIG profile such as 1g.18gb, or a size such as 20 GB for the smallest that has it"
            )
        return size

    def write(self, message: Any, name: str, value: Any) -> None:
        if isinstance(value, str):
            message.mig_profile = value
        else:
            message.mig_memory_bytes = value

    def violations(self, at: str, value: Any) -> Violations:
        if value and not _MIG_PROFILE.fullmatch(value):
            yield FieldViolation(at, f"{value[:40]!r} is not a MIG profile; use one such as 1g.18gb or 3g.71gb")

    def schema(self) -> Schema:
        return {"type": ["string", "integer"]}
