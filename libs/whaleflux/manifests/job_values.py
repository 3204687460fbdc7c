"""Kinds of values that only job files have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import attrgetter
from pathlib import Path
from typing import Any

from whaleflux import names, quantities
from whaleflux.errors import FieldViolation
from whaleflux.fleet.model import Level
from whaleflux.manifests.reader import Reader
from whaleflux.manifests.text_values import Text, Texts, printable, text, texts
from whaleflux.manifests.values import Choice, Flag, Schema, Seconds, Value, Violations, Whole, number
from whaleflux.planning.known_models import MODELS, model_named

_NEVER = math.inf
_LABEL = re.compile(r"[A-Za-z0-9._/-]{1,128}")
_RESERVATION = re.compile(rf"reservations/{names.ID_PATTERN.pattern}")
_LEVELS = {
    "site": 1,
    "zone": 2,
    "spine": 3,
    "leaf": 4,
    "node": 5,
    "nvlink": 6,
}  # numbers of the contract's TopologyLevel


@dataclass(frozen=True, slots=True)
class Rule:
    """Ranks in runs of `size` (0: all) that a topology level (number of the contract's enum) holds together."""

    group: str = ""
    level: int = 0
    size: int = 0
    preferred: bool = False


@dataclass(frozen=True, slots=True)
class Dependency:
    """A job that must have ended first: {job}, {queue}/{job} or its full name, and the number of the contract's condition."""

    job: str = ""
    when: int = 0


@dataclass(frozen=True)
class Labels(Value):
    """Labels that a node must have: {pool: research}."""

    most: int = 64
    most_characters: int = 128

    def words(self) -> str:
        return f"labels with their values: `{{pool: research}}`, at most {self.most}"

    def take(self, reader: Reader, key: str, base: Path, absent: Any) -> Any:
        inner = reader.inner(key)
        return {name: inner.take(name, text, "") for name in inner.keys()}  # noqa: SIM118 - a reader is no mapping

    def write(self, message: Any, name: str, value: Any) -> None:
        getattr(message, name).update(value)

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(sorted(get(message).items()))

    def violations(self, at: str, value: Sequence[tuple[str, str]]) -> Violations:
        if len(value) > self.most:
            yield FieldViolation(at, f"{len(value)} labels; at most {self.most}")
        for name, wanted in value[: self.most]:
            if not _LABEL.fullmatch(name):
                yield FieldViolation(
                    at, f"key {name[:64]!r}: use 1-{self.most_characters} of letters, digits, '.', '_', '/' and '-'"
                )
            yield from printable(f"{at}[{name[:64]}]", wanted, self.most_characters)

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}


@dataclass(frozen=True)
class Speeds(Value):
    """How fast a job is by its number of GPUs: {8: 1.0, 16: 1.9}."""

    most_gpus: int
    most: int = 64

    def words(self) -> str:
        return "speeds by number of GPUs, in any unit: `{8: 1.0, 16: 1.9}`"

    def parse(self, value: object, base: Path) -> list[tuple[int, float]]:
        if not isinstance(value, dict) or not value or len(value) > self.most:
            raise ValueError(f"must be 1 to {self.most} speeds by number of GPUs, such as {{8: 1.0, 16: 1.9}}")
        return sorted(self._speed(gpus, speed) for gpus, speed in value.items())

    def _speed(self, gpus: object, speed: object) -> tuple[int, float]:
        number = isinstance(speed, (int, float)) and not isinstance(speed, bool) and 0 < speed < 1e12
        if not str(gpus).isdecimal() or not 1 <= int(str(gpus)[:9]) <= self.most_gpus or not number:
            raise ValueError(f"{gpus}: {speed} must be a number of GPUs and a speed above 0")
        return int(str(gpus)), float(str(speed))

    def write(self, message: Any, name: str, value: Any) -> None:
        getattr(message, name).update(value)

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(sorted(get(message).items()))

    def violations(self, at: str, value: Any) -> Violations:
        if len(value) > self.most:
            yield FieldViolation(at, f"{len(value)} speeds; at most {self.most}")
        for gpus, speed in value[: self.most]:
            yield from number(f"{at}[{gpus}]", gpus, 1, self.most_gpus)
            yield from number(f"{at}[{gpus}]", speed, 1e-12, 1e12)

    def schema(self) -> Schema:
        speed = {"type": "number", "exclusiveMinimum": 0}
        return {"type": "object", "additionalProperties": speed, "minProperties": 1, "maxProperties": self.most}


@dataclass(frozen=True)
class Placement(Value):
    """Names of groups with the level that holds each together."""

    most_gpus: int
    most: int = 16

    def words(self) -> str:
        return "groups, each with one of " + ", ".join(f"`{level}`" for level in _LEVELS)

    def take(self, reader: Reader, key: str, base: Path, absent: Any) -> list[Rule]:
        group = reader.inner(key)
        return [self._rule(group, name, base) for name in group.keys()]  # noqa: SIM118 - a reader is no mapping

    def _rule(self, reader: Reader, name: str, base: Path) -> Rule:
        level = Choice(_LEVELS)
        if not isinstance(reader.raw(name), dict):
            return Rule(name[:63], level.take(reader, name, base, 0))
        inner = reader.inner(name)
        inner.require("level", "use one of: " + ", ".join(_LEVELS))
        size, wish = Whole(1, self.most_gpus).take(inner, "size", base, 0), Flag().take(inner, "preferred", base, False)
        rule = Rule(name[:63], level.take(inner, "level", base, 0), size, wish)
        inner.done()
        return rule

    def write(self, message: Any, name: str, value: Any) -> None:
        for rule in value:
            getattr(message, name).add(group=rule.group, level=rule.level, size=rule.size, preferred=rule.preferred)

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(Rule(r.group, r.level, r.size, r.preferred) for r in get(message))

    def violations(self, at: str, value: Any) -> Violations:
        if len(value) > self.most:
            yield FieldViolation(at, f"{len(value)} rules; at most {self.most}")
        for i, rule in enumerate(value[: self.most]):
            yield from printable(f"{at}[{i}].group", rule.group, 63)
            if not Level.SITE <= rule.level <= Level.ISLAND:
                yield FieldViolation(f"{at}[{i}].level", "is not set; use SITE, ZONE, SPINE, LEAF, NODE or NVLINK")
            yield from number(f"{at}[{i}].size", rule.size, 0, self.most_gpus)

    def schema(self) -> Schema:
        level = Choice(_LEVELS).schema()
        rule = {"level": level, "size": Whole(1, self.most_gpus).schema(), "preferred": Flag().schema()}
        full = {"type": "object", "properties": rule, "required": ["level"], "additionalProperties": False}
        return {"type": "object", "additionalProperties": {"anyOf": [level, full]}}


class Gpus(Whole):
    """GPUs in all. 0 says that there are none, which the message tells from nothing said by the number of ranks."""

    def write(self, message: Any, name: str, value: Any) -> None:
        super().write(message, name, value)
        if not value:
            message.ranks = 1


@dataclass(frozen=True)
class Kind(Choice):
    """Whether a job ends by itself; kinds that this version does not know count as training."""

    def __init__(self, kinds: type[IntEnum]) -> None:
        super().__init__({"training": kinds(1), "service": kinds(2)})

    def reading(self, path: str) -> Callable[[Any], Any]:
        get, training, service = attrgetter(path), self.choices["training"], self.choices["service"]
        return lambda message: service if get(message) == service else training


@dataclass(frozen=True)
class Named(Choice):
    """One of the words of an enum, whose 0 is what is not set; numbers that this version does not know count as that."""

    def __init__(self, words: type[IntEnum]) -> None:
        super().__init__({word.name.lower(): word for word in words if word})

    def reading(self, path: str) -> Callable[[Any], Any]:
        get, known = attrgetter(path), {int(word): word for word in self.choices.values()}
        unset = type(next(iter(known.values())))(0)
        return lambda message: known.get(get(message), unset)


@dataclass(frozen=True)
class Datasets(Texts):
    """Names of datasets: `dataset:c4-en` or `c4-en`, in the contract datasets/c4-en."""

    pattern: re.Pattern[str] = re.compile(rf"(datasets/)?{names.ID_PATTERN.pattern}")
    wanted: str = "the name of a dataset, such as datasets/c4-en"
    shown: str = "`dataset:ID`, or a list of them"

    def parse(self, value: object, base: Path) -> Any:
        return [names.dataset(names.check_id("data", item.removeprefix("dataset:"))) for item in texts(value)]


class ReservationName(Text):
    """A reservation: `launch-week`, in the contract reservations/launch-week."""

    def parse(self, value: object, base: Path) -> Any:
        return names.reservation(names.check_id("reservation", text(value).removeprefix("reservations/")))

    def violations(self, at: str, value: Any) -> Violations:
        if value and not _RESERVATION.fullmatch(value):
            yield FieldViolation(
                at, f"{value[:80]!r} is not the name of a reservation, such as reservations/launch-week"
            )

    def schema(self) -> Schema:
        return {"type": ["string", "integer"], "pattern": f"^(reservations/)?{names.ID_PATTERN.pattern}$"}


class KnownModel(Text):
    """A model that the planner knows by name."""

    def words(self) -> str:
        return "name of a model: `llama-3.1-70b`"

    def parse(self, value: object, base: Path) -> Any:
        return model_named(text(value)).name

    def violations(self, at: str, value: Any) -> Violations:
        if value and value not in MODELS:
            yield FieldViolation(at, f"{value[:80]!r} is no model that is known by name; see: whaleflux fits --list")


@dataclass(frozen=True)
class OnPartition(Seconds):
    """`wait 10 min`, or `never reroute`."""

    def words(self) -> str:
        return "`wait TIME` or `never reroute`"

    def parse(self, value: object, base: Path) -> float:
        text = value.strip() if isinstance(value, str) else ""
        try:
            if text == "never reroute":
                return _NEVER
            if text.startswith("wait "):
                return quantities.seconds(text[5:])
        except ValueError:
            pass
        raise ValueError("must be 'wait 10 min' (any time) or 'never reroute'")

    def write(self, message: Any, name: str, value: Any) -> None:
        if value == _NEVER:
            message.never_reroute = True
        else:
            super().write(message, name, value)

    def schema(self) -> Schema:
        return {"type": "string", "pattern": r"^\s*(never reroute|wait .*)$"}


_CLOCK = re.compile(
    r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]?\d):([0-5]?\d)"
)  # of Slurm's forms those that can mean one thing only


@dataclass(frozen=True)
class RunTime(Seconds):
    """A duration with its unit, or as Slurm writes it: people who mean minutes write 30, which is seconds elsewhere."""

    def words(self) -> str:
        return "time with its unit: `10 min`, `2 h`, `3 d`, or `12:00:00`, `1-00:00:00`"

    def parse(self, value: object, base: Path) -> float:
        text = str(getattr(value, "written", value)).strip()  # YAML 1.1 reads 12:00:00 as a number
        if clock := _CLOCK.fullmatch(text):
            days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
            return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
        try:
            return quantities.seconds(text)  # which wants a unit, since it is text
        except ValueError:
            other = "or hours:minutes:seconds such as 12:00:00, or days-hours:minutes:seconds such as 1-00:00:00"
            raise ValueError(f"must be a time with its unit, such as 30 s, 30 min, 2 h or 3 d, {other}") from None

    def schema(self) -> Schema:
        return {"type": "string"}


_CONDITIONS = {"succeeded": 1, "ended": 2, "failed": 3}  # numbers of the contract's DependencyCondition


@dataclass(frozen=True)
class Dependencies(Value):
    """Jobs that must have ended first: names, or names with the condition."""

    most: int = 64

    def words(self) -> str:
        return "job, or a list of jobs, each `NAME`, `QUEUE/NAME`, or `{job: NAME, when: succeeded|ended|failed}`"

    def parse(self, value: object, base: Path) -> Any:
        return [self._one(item) for item in (value if isinstance(value, list) else [value])]

    def _one(self, item: object) -> Dependency:
        given = item if isinstance(item, dict) else {"job": item}
        job, when = given.get("job"), given.get("when", "succeeded")
        if not isinstance(job, str) or not names.JOB_REFERENCE.fullmatch(job):
            raise ValueError("must be names of jobs, such as prep or research/prep, or {job: prep, when: ended}")
        if when not in _CONDITIONS or given.keys() - {"job", "when"}:
            raise ValueError("must be {job: NAME, when: CONDITION}, with one of: " + ", ".join(_CONDITIONS))
        return Dependency(job, _CONDITIONS[str(when)])

    def write(self, message: Any, name: str, value: Any) -> None:
        for one in value:
            getattr(message, name).add(job=one.job, when=one.when)

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(Dependency(one.job, one.when) for one in get(message))

    def violations(self, at: str, value: Any) -> Violations:
        if len(value) > self.most:
            yield FieldViolation(at, f"{len(value)} jobs; at most {self.most}")
        for i, one in enumerate(value[: self.most]):
            if not names.JOB_REFERENCE.fullmatch(one.job):
                yield FieldViolation(
                    f"{at}[{i}].job", "is not the name of a job; use {job}, {queue}/{job} or its full name"
                )
            if not 0 <= one.when <= max(_CONDITIONS.values()):
                yield FieldViolation(f"{at}[{i}].when", "is not known; use one of: " + ", ".join(_CONDITIONS))

    def schema(self) -> Schema:
        name = {"type": "string", "pattern": f"^({names.JOB_REFERENCE.pattern})$"}
        full = {"type": "object", "properties": {"job": name, "when": Choice(_CONDITIONS).schema()}, "required": ["job"],
                "additionalProperties": False}  # fmt: skip
        one = {"anyOf": [name, full]}
        return {"anyOf": [one, {"type": "array", "items": one}]}
