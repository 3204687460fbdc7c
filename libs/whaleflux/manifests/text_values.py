"""Kinds of values that are text: lines, ids, folders, lists of them, command lines, environment variables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from whaleflux import names
from whaleflux.errors import FieldViolation
from whaleflux.manifests import shell_text
from whaleflux.manifests.reader import Reader, kind_of
from whaleflux.manifests.values import Schema, Value, Violations

MAX_LIST = 1000  # items of any list in a file
MAX_TEXT_CHARS = 4_096


@dataclass(frozen=True)
class Text(Value):
    """One line; empty in messages: not set."""

    most: int = MAX_TEXT_CHARS
    shown: str = "text"

    def words(self) -> str:
        return self.shown

    def parse(self, value: object, base: Path) -> Any:
        return text(value, self.most)

    def violations(self, at: str, value: Any) -> Violations:
        yield from printable(at, value, self.most)

    def schema(self) -> Schema:
        return {"type": ["string", "number"], "maxLength": self.most}


class Id(Text):
    """An id."""

    def parse(self, value: object, base: Path) -> Any:
        return names.check_id("id", text(value))

    def schema(self) -> Schema:
        return {"type": ["string", "integer"], "pattern": f"^{names.ID_PATTERN.pattern}$"}


class Folder(Text):
    """A folder; relative ones are below the folder of the file."""

    def parse(self, value: object, base: Path) -> Any:
        return str((base / text(value, self.most)).resolve())


class Workdir(Folder):
    """A folder that travels with the job, or `none` for nothing, which is ""."""

    def parse(self, value: object, base: Path) -> Any:
        return "" if value == "none" else super().parse(value, base)


class Digest(Text):
    """sha256 in hexadecimal; empty: not set."""

    def violations(self, at: str, value: Any) -> Violations:
        if value and not re.fullmatch(r"[0-9a-f]{64}", value):
            yield FieldViolation(at, f"{shortened(value)!r} is not a sha256 in hexadecimal, as UploadCode answers")


@dataclass(frozen=True)
class Texts(Value):
    """A list of texts, or one. In messages each must have the form `pattern` (`wanted` in words) and be there once."""

    pattern: re.Pattern[str] = re.compile(r".*", re.DOTALL)
    wanted: str = "a text"
    most: int = 100
    shown: str = "text, or a list of texts"

    def words(self) -> str:
        return self.shown

    def parse(self, value: object, base: Path) -> Any:
        return texts(value)

    def write(self, message: Any, name: str, value: Any) -> None:
        getattr(message, name).extend(value)

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(get(message))

    def violations(self, at: str, value: Any) -> Violations:
        if len(value) > self.most:
            yield FieldViolation(at, f"{len(value)} entries; at most {self.most}")
        for i, item in enumerate(value[: self.most]):
            if not self.pattern.fullmatch(item):
                yield FieldViolation(f"{at}[{i}]", f"{shortened(item)!r} is not {self.wanted}")
        if len(set(value)) < len(value):
            yield FieldViolation(at, "names something twice; name it once")

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number"]}}]}


class Command(Texts):
    """A command line: a bash script, or a list of words that are executed as they are."""

    MAX_ARGUMENTS, MAX_BYTES = 1_000, 64 * 1024

    def words(self) -> str:
        return "bash script, or a list of words"

    def parse(self, value: object, base: Path) -> Any:
        if isinstance(value, list):
            return [_word(item) for item in items(value)]
        if not isinstance(value, str):
            raise ValueError(f"must be a bash script or a list of words, not {kind_of(value)}")
        if wrong := shell_text.mistake(value):
            raise ValueError(wrong)
        _encodable(value)
        return shell_text.as_command(value)

    def violations(self, at: str, value: Any) -> Violations:
        if value and not value[0].strip():
            yield FieldViolation(f"{at}[0]", "is blank; give the program to run")
        if (script := shell_text.script_of(value)) is not None and (wrong := shell_text.mistake(script)):
            yield FieldViolation(at, wrong)
        if len(value) > self.MAX_ARGUMENTS:
            yield FieldViolation(at, f"{len(value)} arguments; at most {self.MAX_ARGUMENTS}")
        if (size := sum(len(part.encode()) for part in value)) > self.MAX_BYTES:
            yield FieldViolation(at, f"{size} bytes; at most {self.MAX_BYTES}: use a script file")
        if any("\0" in part for part in value):
            yield FieldViolation(at, "contains a NUL character; remove it")

    def schema(self) -> Schema:
        return {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": ["string", "number"]}},
            ]
        }


@dataclass(frozen=True)
class Variables(Value):
    """Environment variables with any text as value. Reserved ones may not be set.

    A value that is no text in YAML (1.10, yes, 2026-01-01) is taken as it is written.
    """

    reserved: frozenset[str] = frozenset()
    reserved_prefixes: tuple[str, ...] = ()
    most: int = 500
    most_bytes_each: int = 64 * 1024  # the kernel starts no program with a longer text than 128 KiB
    most_bytes: int = 128 * 1024

    def words(self) -> str:
        return f"variables with their values: any text, at most {self.most_bytes_each >> 10} KiB each and {self.most_bytes >> 10} KiB in all"

    def take(self, reader: Reader, key: str, base: Path, absent: Any) -> Any:
        inner = reader.inner(key)
        if len(inner.keys()) > self.most:
            reader.note(key, f"has {len(inner.keys())} variables, at most {self.most}")
            return absent
        return {name: inner.take(name, inner.as_written(name, _value), "", missing=_no_value) for name in inner.keys()}  # noqa: SIM118 - a reader is no mapping

    def write(self, message: Any, name: str, value: Any) -> None:
        getattr(message, name).update(value)

    def reading(self, path: str) -> Callable[[Any], Any]:
        get = attrgetter(path)
        return lambda message: tuple(get(message).items())

    def violations(self, at: str, value: Sequence[tuple[str, str]]) -> Violations:
        if len(value) > self.most:
            yield FieldViolation(at, f"{len(value)} variables; at most {self.most}")
        for name, content in value[: self.most]:
            yield from self._variable(f"{at}[{shortened(name)}]", name, content)
        if (size := sum(len(name) + len(content.encode()) + 2 for name, content in value)) > self.most_bytes:
            yield FieldViolation(at, f"{size} bytes in all; at most {self.most_bytes}: put large values into files")

    def _variable(self, at: str, name: str, content: str) -> Violations:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,255}", name):
            yield FieldViolation(at, "is not a variable name; use letters, digits and _, at most 256")
        elif name in self.reserved or name.startswith(self.reserved_prefixes):
            yield FieldViolation(at, "is set for each rank by the agent; choose another name")
        if "\0" in content:
            yield FieldViolation(
                at, "contains a NUL character, which no environment can hold; remove it, or encode the value as base64"
            )
        elif (size := len(content.encode())) > self.most_bytes_each:
            yield FieldViolation(
                at, f"{size} bytes; at most {self.most_bytes_each}: put it into a file and give the file's name"
            )

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}


def _value(value: object) -> str:
    """The value of a variable: any text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {kind_of(value)}; JSON can be given as text, in single quotes")
    return _encodable(value)


def _no_value() -> str:
    raise ValueError('has no value; write "" for an empty one')


def _word(value: object) -> str:
    """One word of a command line: any text; numbers are taken as they are written."""
    return _encodable(value) if isinstance(value, str) else text(value)


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("contains half a character (a lone surrogate), which UTF-8 cannot hold; remove it") from None
    return value


def text(value: object, most: int = 65_536) -> str:
    """One printable line of at most `most` characters; numbers are taken as they are written."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"must be text, not {kind_of(value)}")
    found = getattr(value, "written", str(value))
    if not found or len(found) > most or "\0" in found or not found.isprintable():
        raise ValueError(f"must be printable text of 1 to {most} characters on one line")
    return found


def items(value: object) -> list[Any]:
    """A list of at most `MAX_LIST` items."""
    if not isinstance(value, list):
        raise ValueError(f"must be a list, not {kind_of(value)}")
    if len(value) > MAX_LIST:
        raise ValueError(f"has {len(value)} items, at most {MAX_LIST}")
    return value


def texts(value: object) -> list[str]:
    """A list of texts, or one text."""
    return [text(item) for item in items([value] if isinstance(value, str) else value)]


def printable(at: str, value: str, most: int = MAX_TEXT_CHARS) -> Violations:
    """Names a text that is too long or holds what cannot be printed."""
    if len(value) > most:
        yield FieldViolation(at, f"{len(value)} characters; at most {most}")
    elif not value.isprintable():
        yield FieldViolation(at, "contains characters that cannot be printed; remove them")


def shortened(value: str) -> str:
    return value if len(value) <= 64 else value[:61] + "..."
