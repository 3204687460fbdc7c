"""The kinds of values that stand in job and model files, each in one class; those made of text are in `text_values`.

A kind knows how people write it, how the contract's message holds it, what the contract allows, and how to describe it.
Nothing here imports the contract: messages are reached by the names of their fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from whaleflux import quantities
from whaleflux.errors import FieldViolation
from whaleflux.manifests.reader import Reader, quoted

LEAST_BYTES = 1 << 20  # that anybody means: a smaller number lacks its unit

Violations = Iterator[FieldViolation]
Schema = dict[str, Any]


class Value:
    """One kind of value."""

    def words(self) -> str:
        """What may stand there, for people."""
        raise NotImplementedError

    def take(self, reader: Reader, key: str, base: Path, absent: Any) -> Any:
        """The value of `key`; `absent` where it is missing or wrong. Relative folders are below `base`."""
        return reader.take(key, lambda value: self.parse(value, base), absent)

    def parse(self, value: object, base: Path) -> Any:
        """What the message is given. Raises ValueError with what would be right."""
        raise NotImplementedError

    def write(self, message: Any, name: str, value: Any) -> None:
        """Puts a parsed value into a field of a message."""
        setattr(message, name, value)

    def written(self, value: Any) -> str:
        """What a field of a message holds, as people write it in a file."""
        return str(value)

    def reading(self, path: str) -> Callable[[Any], Any]:
        """How to read the field at `path` of a message, as immutable data."""
        return attrgetter(path)

    def violations(self, at: str, value: Any) -> Violations:
        """What is wrong with a value that `reading` found, whoever wrote it."""
        yield from ()

    def schema(self) -> Schema:
        """JSON Schema of what may stand in a file."""
        return {}


@dataclass(frozen=True)
class Whole(Value):
    """A whole number. In messages 0 means not set where `unset` says so."""

    least: int
    most: int
    unset: bool = True

    def words(self) -> str:
        return f"whole number, {self.least} to {self.most}"

    def parse(self, value: object, base: Path) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            raise ValueError(f"must be a whole number, {self.least} to {self.most}")
        return value

    def violations(self, at: str, value: Any) -> Violations:
        yield from number(at, value or 0, 0 if self.unset else self.least, self.most)

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


class Count(Whole):
    """A whole number that may be large, with the letters that commands take: 4M."""

    def words(self) -> str:
        return f"number such as `4M` or `512k`, {self.least} to {quantities.shown_count(self.most).replace(' ', '')}"

    def parse(self, value: object, base: Path) -> Any:
        if not self.least <= (found := quantities.whole_count(value)) <= self.most:
            raise ValueError(f"is {quoted(value)}; give a {self.words().replace('`', '')}")
        return found

    def schema(self) -> Schema:
        return {"type": ["integer", "string"]}


class OptionalWhole(Whole):
    """A whole number whose absence the message tells from 0."""

    def reading(self, path: str) -> Callable[[Any], Any]:
        return where_set(path, lambda value: value)


class WholeOrAuto(Whole):
    """A whole number, or `auto`, which is 0 in messages."""

    def words(self) -> str:
        return f"`auto`, or a {super().words()}"

    def parse(self, value: object, base: Path) -> Any:
        return 0 if value == "auto" else super().parse(value, base)

    def schema(self) -> Schema:
        return {"anyOf": [{"const": "auto"}, super().schema()]}


@dataclass(frozen=True)
class Scaled(Value):
    """A number that the message holds as a whole number of parts; 0: not set, so that a written one has `least` parts at least."""

    parts: int
    most: int  # parts
    shown: str = "number above 0"
    least: int = 1  # parts

    def words(self) -> str:
        return self.shown

    def parse(self, value: object, base: Path) -> Any:
        least, most = self.least / self.parts, self.most / self.parts
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"is {quoted(value)}; give a number from {least:g} to {most:g}")
        return round(self.parts * float(value))

    def written(self, value: Any) -> str:
        return f"{value / self.parts:g}"

    def violations(self, at: str, value: Any) -> Violations:
        yield from number(at, value, 0, self.most)

    def schema(self) -> Schema:
        return {"type": "number", "minimum": self.least / self.parts, "maximum": self.most / self.parts}


@dataclass(frozen=True)
class Size(Value):
    """Bytes; 0: not set."""

    most: int = 1 << 50  # a pebibyte
    none: str = "0"  # what a written 0 means to say; it would be taken for "not set", and is refused where that is another thing

    def words(self) -> str:
        return "size: `80 GB`, `512 MiB`, or bytes"

    def parse(self, value: object, base: Path) -> Any:
        size = quantities.size_bytes(value)
        if 0 < size < LEAST_BYTES:
            raise ValueError(f"is {size} bytes, which is no size of memory; say the unit, such as {size} GB")
        if size > self.most:
            raise ValueError(f"is {quoted(value)}; give at most {quantities.exact_bytes(self.most)}")
        if not size and self.none != "0":
            raise ValueError(f"must be a size above 0; for {self.none}, leave it out")
        return size

    def written(self, value: Any) -> str:
        return quantities.exact_bytes(value)

    def violations(self, at: str, value: Any) -> Violations:
        yield from number(at, value, 0, self.most)

    def schema(self) -> Schema:
        return {"type": ["string", "integer"]}


@dataclass(frozen=True)
class Seconds(Value):
    """A duration; None where the message does not set it."""

    most: float = 366 * 24 * 3600.0
    least: float = 0.0

    def words(self) -> str:
        return "time: `10 min`, `30 s`, `2 h`, or seconds"

    def parse(self, value: object, base: Path) -> Any:
        return quantities.seconds(value)

    def write(self, message: Any, name: str, value: Any) -> None:
        getattr(message, name).FromMilliseconds(round(1000 * value))

    def reading(self, path: str) -> Callable[[Any], Any]:
        return where_set(path, lambda duration: duration.seconds + duration.nanos / 1e9)

    def violations(self, at: str, value: Any) -> Violations:
        if value is not None:
            yield from number(at, value, self.least, self.most, "s")

    def schema(self) -> Schema:
        return {"type": ["string", "number"]}


@dataclass(frozen=True)
class Dollars(Value):
    """An amount; 0: not set, so that a written 0 is refused; `none` says what is meant where nothing is written."""

    most: float = 1e9
    none: str = "no limit"

    def words(self) -> str:
        return "amount: `12000 USD`"

    def parse(self, value: object, base: Path) -> Any:
        if not (amount := quantities.dollars(value)):
            raise ValueError(f"must be an amount above 0, such as 12000 USD; for {self.none}, leave it out")
        return amount

    def violations(self, at: str, value: Any) -> Violations:
        yield from number(at, value, 0.0, self.most)

    def schema(self) -> Schema:
        return {"type": ["string", "number"]}


class Instant(Value):
    """A UTC instant; None where the message does not set it."""

    def words(self) -> str:
        return "time: `2036-12-01T08:00Z`"

    def parse(self, value: object, base: Path) -> datetime:
        return quantities.instant(value)

    def write(self, message: Any, name: str, value: Any) -> None:
        getattr(message, name).FromDatetime(value)

    def reading(self, path: str) -> Callable[[Any], Any]:
        return where_set(path, lambda stamp: stamp.ToDatetime(tzinfo=UTC))

    def schema(self) -> Schema:
        return {"type": "string"}


class Flag(Value):
    """Yes or no."""

    def words(self) -> str:
        return "`true` or `false`"

    def parse(self, value: object, base: Path) -> bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Choice(Value):
    """One of some words; the message holds what each stands for."""

    choices: Mapping[str, Any]

    def words(self) -> str:
        return "one of " + ", ".join(f"`{word}`" for word in self.choices)

    def parse(self, value: object, base: Path) -> Any:
        if isinstance(value, str) and value.lower() in self.choices:
            return self.choices[value.lower()]
        raise ValueError("must be one of: " + ", ".join(self.choices))

    def schema(self) -> Schema:
        return {"enum": list(self.choices)}


def where_set(path: str, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Reads a field whose absence the message knows; None where it is not set."""
    *groups, name = path.split(".")
    parent: Callable[[Any], Any] = attrgetter(".".join(groups)) if groups else lambda message: message

    def read(message: Any) -> Any:
        holder = parent(message)
        return convert(getattr(holder, name)) if holder.HasField(name) else None

    return read


def number(at: str, value: float, least: float, most: float, unit: str = "") -> Violations:
    """Names a number out of its range."""
    if not math.isfinite(value) or not least <= value <= most:
        yield FieldViolation(at, f"{value:.15g} is out of range; use {least:.15g} to {most:.15g}{unit and ' ' + unit}")
