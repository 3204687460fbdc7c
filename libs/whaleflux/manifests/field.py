"""One field of a job or model file: where it stands in the file and in the contract, its kind, and words for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whaleflux.manifests.reader import Reader
from whaleflux.manifests.values import Value


@dataclass(frozen=True, slots=True)
class Field:
    """`file` is the path in the file ("" where another field's text sets it), `path` that in the message."""

    file: str
    path: str
    value: Value
    about: str
    example: str = ""  # YAML
    default: str = ""  # what holds when it is left out, for people
    absent: Any = None  # what is written into the message when it is left out
    required: str = ""  # a hint for whoever left it out
    unless: str = ""  # with this other field it is not
    not_yet: bool = False  # checked and kept, but nothing acts on it
    apart: bool = False  # cannot stand beside the others, so the example of all fields leaves it out
    short: bool = False  # a text or a list in place of its group stands for this field alone

    def write(self, message: Any, value: Any) -> None:
        """Puts a parsed value where it belongs."""
        *groups, name = self.path.split(".")
        for group in groups:
            message = getattr(message, group)
        self.value.write(message, name, value)


def read_into(message: Any, reader: Reader, fields: Iterable[Field], base: Path) -> None:
    """Takes `fields` out of a file and writes them into `message`; what is wrong is noted by the reader."""
    _read(message, reader, list(fields), base, 0)


def _read(message: Any, reader: Reader, fields: list[Field], base: Path, depth: int) -> None:
    for key, below in groups(fields, depth):
        field = below[0]
        if field.file.count(".") > depth:
            inner = reader.inner(key, next((f.file.split(".")[depth + 1] for f in below if f.short), ""))
            _read(message, inner, below, base, depth + 1)
            inner.done()
            continue
        value = field.value.take(reader, key, base, field.absent)
        if value is not None:
            field.write(message, value)
        if field.required and not (field.unless and reader.has(field.unless)):
            reader.require(key, field.required)


def groups(fields: Iterable[Field], depth: int) -> Iterator[tuple[str, list[Field]]]:
    """The fields by the part of their path at `depth`, in their order."""
    found: dict[str, list[Field]] = {}
    for field in fields:
        if field.file:
            found.setdefault(field.file.split(".")[depth], []).append(field)
    yield from found.items()


def name_in_file(fields: Iterable[Field], path: str) -> str:
    """What people call the field that the contract calls `path` ("gpu.any_of[0]" is "gpu.any[0]"); `path` if none does."""
    best = max((f for f in fields if f.file and _begins(path, f.path)), key=lambda f: len(f.path), default=None)
    return path if best is None else best.file + path[len(best.path) :]


def _begins(path: str, with_path: str) -> bool:
    return path == with_path or path.startswith((f"{with_path}.", f"{with_path}["))
