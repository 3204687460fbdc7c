"""How long to wait before the next try. Pure."""

from __future__ import annotations


def pause_s(failures: int, chance: float, *, first_s: float = 0.1, longest_s: float = 1.0) -> float:
    """Seconds before try number `failures` + 1: doubling, bounded, and spread by `chance` in [0, 1).

    A thousand agents that lost the same server come back over time, not at once.
    """
    if failures <= 0:
        return 0.0
    return float(min(longest_s, first_s * 2 ** min(failures - 1, 30)) * (0.5 + chance / 2))
