"""One file, many jobs: `array` numbers them, `matrix` gives them values. Pure.

A member is the file with its own name (NAME-INDEX), its variables in the environment, and `${{ matrix.KEY }}` and `${{ array.index }}`
replaced wherever they stand.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Fields, Reader, kind_of
from whaleflux.manifests.values import Schema, Value

MAX_MEMBERS = 1000
_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6})(?::(\d{1,6}))?)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MARK = re.compile(r"\$\{\{\s*(matrix|array)\.([A-Za-z0-9_]+)\s*\}\}")
_ANY_MARK = re.compile(r"\$\{\{\s*([A-Za-z_]\w*\.[\w.-]*)\s*\}\}")  # also of nothing that there is
ARRAY, MATRIX = "array", "matrix"


@dataclass(frozen=True, slots=True)
class Indices:
    """What `array` says: which members, and how many of them may run at a time (0: all)."""

    numbers: tuple[int, ...] = ()
    at_once: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """One job of an array."""

    index: int
    size: int
    at_once: int
    variables: Mapping[str, Any] = field(default_factory=dict)  # of the matrix, as the file has them


class ArrayOf(Value):
    """`10` (0 to 9), `0-9`, `0-99:10`, `1,4,7-9`, each with `%K` behind it or, beside a matrix, `%K` alone."""

    def words(self) -> str:
        return (
            "`10` for 0 to 9, `0-9`, `0-99:10`, `1,4,7-9`; behind it, or alone beside `matrix`, `%3`: so many at a time"
        )

    def parse(self, value: object, base: Path) -> Indices:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"must be such as 10, 0-9 or 0-9%3, not {kind_of(value)}")
        text, percent, limit = str(value).replace(" ", "").partition("%")
        if percent and not (limit.isdecimal() and 0 < int(limit) <= MAX_MEMBERS):
            raise ValueError(f"%{limit} is not a number of members that may run at a time, 1 to {MAX_MEMBERS}")
        return Indices(_numbers(text), int(limit) if percent else 0)

    def schema(self) -> Schema:
        return {"type": ["integer", "string"]}


class MatrixOf(Value):
    """Variables, each with its values; every combination is a member."""

    def words(self) -> str:
        return "variables, each with a list of values"

    def parse(self, value: object, base: Path) -> dict[str, list[Any]]:
        if not isinstance(value, dict) or not value:
            raise ValueError("must be variables, each with a list of values, such as {lr: [1e-3, 1e-4]}")
        for name, values in value.items():
            if not _VARIABLE.fullmatch(name) or name.startswith("WHALEFLUX_"):
                raise ValueError(f"{name[:64]!r} is not the name of a variable; use letters, digits and _")
            if not isinstance(values, list) or not values:
                raise ValueError(f"{name} must have a list of values, such as [1e-3, 1e-4]")
            if any(not isinstance(one, (str, int, float)) for one in values):
                raise ValueError(f"{name} has a value that is neither text nor a number nor true or false")
        return dict(value)

    def schema(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": "array"}}


def _numbers(text: str) -> tuple[int, ...]:
    if text.isdecimal():
        return _bounded(range(int(text)))
    found: list[int] = []
    for part in text.split(",") if text else ():
        match = _PART.fullmatch(part)
        if not match:
            raise ValueError(f"{part[:40]!r} is neither a number nor a range such as 0-9 or 0-99:10")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1:
            raise ValueError(f"{part!r} counts backwards or not at all")
        found += _bounded(range(first, last + 1, step))
    return _bounded(dict.fromkeys(found))


def _bounded(numbers: Any) -> tuple[int, ...]:
    if len(numbers) > MAX_MEMBERS:
        raise ValueError(f"has {len(numbers)} members; at most {MAX_MEMBERS}")
    return tuple(numbers)


def members(content: object, base: Path) -> list[Member]:
    """The members that a file's content asks for; none where it is one job. Raises InvalidArgument."""
    if not isinstance(content, dict) or not ({ARRAY, MATRIX} & content.keys()):
        return []
    wrong: list[FieldViolation] = []
    reader = Reader(content, "", wrong)
    indices = ArrayOf().take(reader, ARRAY, base, Indices())
    matrix = MatrixOf().take(reader, MATRIX, base, {})
    wrong += [] if wrong else _contradictions(content, indices, matrix)
    if wrong:
        raise InvalidArgument(wrong)
    if not matrix:
        return [Member(number, len(indices.numbers), indices.at_once) for number in indices.numbers]
    combinations = [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]
    return [Member(n, len(combinations), indices.at_once, chosen) for n, chosen in enumerate(combinations)]


def _contradictions(
    content: Mapping[str, Any], indices: Indices, matrix: Mapping[str, Any]
) -> Iterator[FieldViolation]:
    if content.get("name") is None:
        yield FieldViolation("name", "is missing; the members of an array are called NAME-0, NAME-1, ...")
    if matrix and indices.numbers:
        yield FieldViolation(
            ARRAY, "has members of its own beside matrix; write only how many run at a time, such as '%3'"
        )
    if not matrix and not indices.numbers:
        yield FieldViolation(ARRAY, "has no members; write 10, 0-9 or 0-9%3")
    total = 1
    for values in matrix.values():
        total *= len(values)
    if total > MAX_MEMBERS:
        yield FieldViolation(MATRIX, f"has {total} combinations; at most {MAX_MEMBERS}")
    environment = content.get("environment")
    for name in matrix.keys() & (environment.keys() if isinstance(environment, dict) else set()):
        yield FieldViolation(f"{MATRIX}.{name}", "is set in environment, too; say it once")


def content_of(content: Mapping[str, Any], member: Member) -> Fields:
    """The file as the member's own: without array and matrix, its variables in the environment, marks replaced."""
    own = Fields({key: value for key, value in content.items() if key not in (ARRAY, MATRIX)})
    own.lines, own.written = dict(getattr(content, "lines", {})), dict(getattr(content, "written", {}))
    if member.variables:
        environment = own.get("environment") or Fields()
        if isinstance(environment, dict):
            own["environment"] = environment = _copy(environment, environment)
            environment.update({k: _text(v) for k, v in member.variables.items()})
    known = {ARRAY: {"index": member.index}, MATRIX: member.variables}
    replaced = _replaced(own, known)
    assert isinstance(replaced, Fields)
    replaced["name"] = f"{own.get('name')}-{member.index}"
    return replaced


def unknown_marks(content: object) -> Iterator[FieldViolation]:
    """The `${{ ... }}` in a file's values that stand for nothing: a shell would be given them as they are."""
    own = content if isinstance(content, dict) else {}
    matrix = own.get(MATRIX)
    there = [f"{MATRIX}.{name}" for name in matrix] if isinstance(matrix, dict) else []
    there += [f"{ARRAY}.index"] if {ARRAY, MATRIX} & own.keys() else []
    what = f"there are {', '.join(there)}" if there else f"it needs {ARRAY} or {MATRIX} in the file"
    for at, text, line in _texts(own):
        for mark in _ANY_MARK.finditer(text):
            if mark[1] not in there:
                where = f" (line {line})" if line else ""
                yield FieldViolation(at, f"{mark[0][:80]} is not known; {what}{where}")


def _texts(value: Any, at: str = "", line: int = 0) -> Iterator[tuple[str, str, int]]:
    """Every text below a value, with its field and line (0: not known)."""
    if isinstance(value, dict):
        lines = getattr(value, "lines", {})
        for key, inner in value.items():
            yield from _texts(inner, f"{at}.{key}".lstrip("."), lines.get(key, line))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, at, line)
    elif isinstance(value, str):
        yield at, value, line


def _replaced(value: Any, known: Mapping[str, Mapping[str, Any]]) -> Any:
    if isinstance(value, dict):
        return _copy({key: _replaced(inner, known) for key, inner in value.items()}, value)
    if isinstance(value, list):
        return [_replaced(inner, known) for inner in value]
    if not isinstance(value, str) or "${{" not in value:
        return value
    if whole := _MARK.fullmatch(value.strip()):
        return known[whole[1]][whole[2]]  # a number stays a number
    return _MARK.sub(lambda mark: _text(known[mark[1]][mark[2]]), value)


def _copy(content: Mapping[str, Any], original: Mapping[str, Any]) -> Fields:
    """Fields with what is known of the original: the lines, and how values are written that are still the same."""
    made = Fields(content)
    made.lines = dict(getattr(original, "lines", {}))
    written = getattr(original, "written", {})
    made.written = {k: w if made[k] is original[k] else _text(made[k]) for k, w in written.items() if k in made}
    return made


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "written", value))
