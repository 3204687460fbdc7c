"""Taking fields out of what people wrote: every mistake is noted instead of the first, with its line where it is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.nearness import near


class Fields(dict[Any, Any]):
    """A mapping that knows the line of each of its keys, and how plain values (12, yes, 2026-01-01) are written."""

    lines: dict[str, int]
    written: dict[str, str]


class WrittenWhole(int):
    """A whole number that knows how it is written: 010 where text is wanted is no 8."""

    written: str

    @classmethod
    def of(cls, value: int, written: str) -> WrittenWhole:
        found = cls(value)
        found.written = written
        return found


class WrittenNumber(float):
    """A number that knows how it is written: 3.10 where text is wanted is no 3.1."""

    written: str

    @classmethod
    def of(cls, value: float, written: str) -> WrittenNumber:
        found = cls(value)
        found.written = written
        return found


def quoted(value: object) -> str:
    """A value as it stands in the file, at most 40 characters of it."""
    return str(getattr(value, "written", value))[:40]


def kind_of(value: object) -> str:
    """What a value is, in the words of people who write files."""
    kinds = {
        str: "text",
        list: "a list",
        dict: "fields",
        Fields: "fields",
        bool: "true or false",
        type(None): "nothing",
    }
    return kinds.get(type(value), "a number")


class Reader:
    """Takes fields out of a mapping, noting in `wrong` what is wrong, and at the end what is left over."""

    def __init__(self, content: object, path: str, wrong: list[FieldViolation]) -> None:
        self._path, self._wrong = path, wrong
        self._known: list[str] = []
        self._content: Mapping[str, Any] = content if isinstance(content, dict) else {}
        self._lines: dict[str, int] = getattr(content, "lines", {})
        self._written: dict[str, str] = getattr(content, "written", {})
        if not isinstance(content, dict):
            self.note("", f"must be fields and values, not {kind_of(content)}")

    def take(
        self, key: str, parse: Callable[[Any], Any], default: Any, missing: Callable[[], Any] | None = None
    ) -> Any:
        """The parsed value of `key`; `default` when it is absent or wrong (which is noted). `missing` is asked for the value of null."""
        self._known.append(key)
        value = self._content.get(key)
        if value is None and missing is None:
            return default
        try:
            return missing() if value is None and missing is not None else parse(value)
        except ValueError as error:
            self.note(key, str(error))
        except InvalidArgument as error:
            self.note(key, "; ".join(v.description for v in error.violations))
        return default

    def require(self, key: str, hint: str) -> None:
        """Notes a missing field."""
        if self._content.get(key) is None:
            self.note(key, f"is missing; {hint}")

    def has(self, key: str) -> bool:
        return self._content.get(key) is not None

    @property
    def path(self) -> str:
        """Where these fields stand in the file: `offers[0]`; "" at its top."""
        return self._path

    def inner(self, key: str, short: str = "") -> Reader:
        """The fields below `key`; none when it is absent. With `short`, a text or a list there stands for that one field."""
        self._known.append(key)
        value = self._content.get(key)
        if short and value is not None and not isinstance(value, dict):
            content = Fields({short: value})
            content.lines = {short: self._lines[key]} if key in self._lines else {}
            value = content
        return Reader({} if value is None else value, self._name(key), self._wrong)

    def keys(self) -> list[str]:
        return list(self._content)

    def as_written(self, key: str, parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`parse` of how a number, a truth value or a date is written; other values stay as they are."""
        written = self._written.get(key)
        return lambda value: parse(value if written is None or isinstance(value, (str, list, dict)) else written)

    def raw(self, key: str) -> Any:
        self._known.append(key)
        return self._content.get(key)

    def items(self, key: str, parse: Callable[[Any], list[Any]]) -> list[Reader]:
        """The fields of each item of the list below `key`."""
        found = enumerate(self.take(key, parse, []))
        return [Reader(item, f"{self._name(key)}[{number}]", self._wrong) for number, item in found]

    def done(self) -> None:
        """Notes every field that nobody took."""
        for key in self._content:
            if key not in self._known:
                meant = near(key, self._known)
                hint = f"did you mean {meant[0]!r}?" if meant else "known are: " + ", ".join(sorted(self._known))
                self.note(key, f"is not a field; {hint}")

    def _name(self, key: str) -> str:
        shown = key if len(key) <= 80 else key[:77] + "..."
        return f"{self._path}.{shown}".strip(".")

    def note(self, key: str, what: str) -> None:
        """Notes what is wrong with the value of `key`."""
        line = self._lines.get(key)
        self._wrong.append(FieldViolation(self._name(key) or "file", what + (f" (line {line})" if line else "")))
