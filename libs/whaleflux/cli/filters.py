"""What lists are narrowed and ordered by: the same flags with the same meaning in every command.

    listed = [j for j in listed if wanted(state, output.job_state(j)) and contains(user, j.submitter)]
    listed = ordered(listed, columns, sort)

A filter that is not given lets everything pass; several are put together with "and".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any

import typer

from whaleflux.cli.output import Column

_FIRST_S = 1.0  # Unix time: nothing is older, and the contract's times reach no farther back than the year 1

Sort = Annotated[
    str, typer.Option("--sort", metavar="COLUMN", help="Order by this column; -COLUMN: the greatest first.")
]
Since = Annotated[
    str, typer.Option("--since", metavar="TIME", help="Not older than this: 5m, 1h, or 2026-12-01T08:00Z.")
]


def words(text: str, flag: str, known: Collection[str]) -> frozenset[str]:
    """The words of a list: {"RUNNING", "QUEUED"} of "running,queued". Raises InvalidArgument naming `flag` and what is known."""
    found = frozenset(word.strip().upper().replace("-", "_") for word in text.split(",") if word.strip())
    if unknown := sorted(found - set(known)):
        raise _wrong(flag, f"{', '.join(unknown)} is not one of {', '.join(word.lower() for word in known)}")
    return found


def enum_words(enum: Any, prefix: str) -> list[str]:
    """Words of an enum of the contract: RUNNING for JOB_STATE_RUNNING; without UNSPECIFIED."""
    return [name.removeprefix(prefix) for name in enum.keys() if not name.endswith("_UNSPECIFIED")]  # noqa: SIM118


def wanted(chosen: Collection[str], value: str) -> bool:
    """Whether `value` is one of those chosen; nothing chosen: every one is."""
    return not chosen or value in chosen


def contains(part: str, *values: str) -> bool:
    """Whether one of the values contains `part`, in upper or lower case."""
    return not part or any(part.lower() in value.lower() for value in values)


def since_s(text: str, flag: str = "--since") -> float:
    """Unix time that a duration back from now, or an instant, stands for; 0 for none. Raises InvalidArgument."""
    from whaleflux import quantities

    if not text:
        return 0.0
    if text.lower() in {"today", "yesterday"}:
        midnight = time.mktime((*time.localtime()[:3], 0, 0, 0, 0, 0, -1))
        return midnight - 86_400 * (text.lower() == "yesterday")
    try:
        return max(_FIRST_S, time.time() - quantities.seconds(text))
    except ValueError:
        pass
    try:
        return max(_FIRST_S, quantities.instant(text).timestamp())
    except ValueError:
        raise _wrong(
            flag, "must be a duration such as 5m, a time such as 2026-12-01T08:00Z, today or yesterday"
        ) from None


def ordered(messages: Sequence[Any], columns: Sequence[Column], sort: str) -> list[Any]:
    """By the column whose header `sort` names (`$/gpu-h`, `in-flight`); "-" before it turns the order round."""
    if not sort:
        return list(messages)
    reverse, header = sort.startswith("-"), sort.removeprefix("-").lower().replace("_", "-")
    by_header = {column.header.lower().replace(" ", "-"): column for column in columns if column.header}
    if header not in by_header:
        raise _wrong("--sort", f"{header} is not a column; use one of {', '.join(by_header)}")
    return sorted(messages, key=_key(by_header[header]), reverse=reverse)


def _key(column: Column) -> Callable[[Any], tuple[bool, float, str]]:
    """Numbers by size and before words; what has no value is last."""

    def key(message: Any) -> tuple[bool, float, str]:
        value = column.of(message)
        is_number = isinstance(value, int | float)
        return (not is_number, float(value) if is_number else 0.0, "" if is_number else str(value))

    return key


def _wrong(flag: str, description: str) -> Exception:
    from whaleflux.errors import FieldViolation, InvalidArgument

    return InvalidArgument(FieldViolation(flag, description))
