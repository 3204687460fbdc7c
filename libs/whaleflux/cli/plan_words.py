"""Plans in words, the same in `submit` and in `explain`."""

from __future__ import annotations

from typing import Any

_WORTH_TELLING = 1.05  # times as much communication


def alternative(other: Any) -> str:
    """A place that was considered, and why it was not taken."""
    said = "the communication" in other.summary or other.relative_communication < _WORTH_TELLING
    return f"{other.summary}" + ("" if said else f" ({other.relative_communication:.1f}x the communication)")
