"""States of the contract's messages as the words that the command line shows."""

from __future__ import annotations

from typing import Any

_FIELDS = ("state", "phase", "kind")


def state_of(message: Any) -> str:
    """SUCCEEDED for a job whose `state` is JOB_STATE_SUCCEEDED; READY for a node's health; the number for one not known here.

    Of a job, checkpoint or replica its state, of a node's health its phase, of an incident its kind. Raises TypeError for others.
    """
    for name in _FIELDS:
        field = message.DESCRIPTOR.fields_by_name.get(name)
        if field is not None and field.enum_type is not None:
            return _word(field.enum_type, getattr(message, name))
    raise TypeError(f"{message.DESCRIPTOR.full_name} has no state")


def _word(enum: Any, number: int) -> str:
    """Without the prefix that all values of the enum have, which its unset value shows."""
    value = enum.values_by_number.get(number)
    prefix = str(enum.values_by_number[0].name).removesuffix("UNSPECIFIED")
    return str(value.name).removeprefix(prefix) if value is not None else str(number)
