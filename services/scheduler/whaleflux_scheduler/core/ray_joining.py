"""When a Ray cluster gets more workers after some ended before their nodes had joined: each such try holds GPUs for nothing. Pure."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

FIRST_S, LONGEST_S = 5.0, 300.0


@dataclass(slots=True)
class Joining:
    """`failed`: jobs of workers that ended badly without having joined; `joined`: jobs whose nodes were there. Both as they were looked at last.

    Tries that fail together count once. Who joins makes an end of it, so that one bad node among good ones costs a try now and then.
    """

    failures: int = 0
    not_before_s: float = float("-inf")
    failed: Set[str] = frozenset()
    joined: Set[str] = frozenset()

    def look(self, failed: Set[str], joined: Set[str], now_s: float) -> None:
        """Takes in what is to be seen now."""
        if joined - self.joined:
            self.failures, self.not_before_s = 0, float("-inf")
        if failed - self.failed:
            self.failures += 1
            self.not_before_s = now_s + min(LONGEST_S, FIRST_S * 2.0 ** min(self.failures - 1, 20))
        self.failed, self.joined = failed, joined
