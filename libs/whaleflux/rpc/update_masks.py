"""What an update names to be changed (https://google.aip.dev/134)."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.errors import FieldViolation, InvalidArgument


def paths_of(paths: Sequence[str], updatable: Sequence[str], *, needed: bool = True) -> list[str]:
    """The paths of a mask, each once. Raises InvalidArgument for paths that cannot be changed, and for an empty mask where one is `needed`."""
    known = ", ".join(updatable)
    wrong = [
        FieldViolation("update_mask", f"{path[:64]!r} cannot be changed; use {known}")
        for path in paths
        if path not in updatable
    ]
    if needed and not paths:
        wrong = [FieldViolation("update_mask", f"is empty; name what to change: {known}")]
    if wrong:
        raise InvalidArgument(wrong)
    return list(dict.fromkeys(paths))
