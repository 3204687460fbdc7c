"""`dataclasses.replace` for frozen records with slots that check nothing when they are made: a third of its time. Pure.

A record of a job has some thirty fields, and each of its steps makes a new one. `replace` asks each field in Python and then calls the
constructor, which sets each by name; here all fields are read in one call, and set in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, TypeVar

Record = TypeVar("Record")
_Fields = tuple[dict[str, int], Callable[[Any], tuple[Any, ...]], tuple[Callable[[Any, Any], None], ...]]
_KNOWN: dict[type, _Fields] = {}  # by class


def changed(record: Record, **changes: Any) -> Record:
    """The record with other values of these fields. Raises KeyError for one that it does not have."""
    kind = type(record)
    known = _KNOWN.get(kind)
    if known is None:
        known = _KNOWN[kind] = _fields_of(kind)
    at, values_of, setters = known
    values = list(values_of(record))
    for name, value in changes.items():
        values[at[name]] = value
    made: Record = object.__new__(kind)
    for set_value, value in zip(setters, values, strict=True):
        set_value(made, value)
    return made


def _fields_of(kind: type) -> _Fields:
    """Positions of its fields, what reads all of them, and what sets each."""
    assert not hasattr(kind, "__post_init__"), f"{kind.__name__} checks its fields: replace it"
    names = [field.name for field in fields(kind)]
    return (
        {name: number for number, name in enumerate(names)},
        attrgetter(*names),
        tuple(getattr(kind, name).__set__ for name in names),
    )
