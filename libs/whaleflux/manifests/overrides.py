"""What a command line changes of a file before it is read: dotted fields as the file names them, values as YAML. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.reader import Fields, kind_of
from whaleflux.manifests.yaml_text import load, written


@dataclass(frozen=True, slots=True)
class Override:
    """One field, by its path from the top, and its new value; None takes the field away.

    `option` is where it was said, `written` how a plain value is written (1.10, yes).
    """

    option: str
    path: tuple[str, ...]
    value: Any
    written: str | None = None


def from_set(text: str) -> Override:
    """`--set checkpoint.every=100`. Raises InvalidArgument."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise InvalidArgument(
            FieldViolation("--set", f"{text[:80]!r} is not FIELD=VALUE, such as checkpoint.every=100")
        )
    try:
        return Override(f"--set {key.strip()}", path, load(value), written(value))
    except InvalidArgument as wrong:
        raise InvalidArgument(FieldViolation(f"--set {key.strip()}", wrong.violations[0].description)) from None


def from_env(text: str, caller: Mapping[str, str]) -> Override:
    """`--env LR=0.1`, or `--env HF_HOME` for the value that the caller's own environment has. Raises InvalidArgument."""
    name, equals, value = text.partition("=")
    if not name:
        raise InvalidArgument(FieldViolation("--env", f"{text[:80]!r} is neither NAME=VALUE nor NAME"))
    if not equals and name not in caller:
        raise InvalidArgument(FieldViolation("--env", f"{name[:80]} is not set here; say --env {name[:80]}=VALUE"))
    return Override(f"--env {name}", ("environment", name), value if equals else caller[name])


def applied(content: object, overrides: Iterable[Override]) -> object:
    """The file's content with the changes, one after the other; what is no mapping is left to its reader to refuse."""
    for one in overrides:
        if not isinstance(content, dict):
            return content
        content = _with(content, one, one.path)
    return content


def _with(content: Mapping[str, Any], one: Override, path: tuple[str, ...]) -> Fields:
    changed = Fields(content)
    changed.lines = dict(getattr(content, "lines", {}))
    changed.written = dict(getattr(content, "written", {}))
    key, *below = path
    changed.lines.pop(key, None)  # the file's line says nothing about it any more
    changed.written.pop(key, None)
    if not below:
        if one.written is not None:
            changed.written[key] = one.written
        changed[key] = one.value
        return changed
    inner = changed.get(key)
    if inner is not None and not isinstance(inner, dict):
        at = ".".join(one.path[: len(one.path) - len(below)])
        clash = f"{at} is {kind_of(inner)} in the file; set all of it: --set '{at}={{{below[0]}: ...}}'"
        raise InvalidArgument(FieldViolation(one.option, clash))
    changed[key] = _with(inner or Fields(), one, tuple(below))
    return changed
