"""What an update names to be changed (https://google.aip.dev/134)."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.errors import FieldViolation, InvalidArgument


def paths_of(paths: Sequence[str], updatable: Sequence[str]) -> list[str]:
    """The paths of a mask, each once. Raises InvalidArgument for an empty mask, and for paths that cannot be changed."""
    known = ", ".join(updatable)
    wrong = [
        FieldViolation("update_mask", f"{path[:64]!r} cannot be changed; use {known}")
        for path in paths
        if path not in updatable
    ]
    if not paths:
        wrong = [FieldViolation("update_mask", f"is empty; name what to change: {known}")]
    if wrong:
        raise InvalidArgument(wrong)
    return list(dict.fromkeys(paths))
