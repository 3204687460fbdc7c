"""How long to wait before the next try: one answer for every loop that waits out an outage. Pure.

    failures = 0
    while True:
        try:
            await work()
            failures = 0
        except Unavailable:
            failures += 1
            await clock.sleep(RETRY.pause_s(failures))

Which calls between services are repeated at all is for `rpc/retry_policy.py` to say.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from whaleflux.errors import DeadlineExceeded, StatusError, Unavailable

_PROVE_NOTHING = frozenset({Unavailable.code, DeadlineExceeded.code, StatusError.code})
_MOST_DOUBLINGS = 30  # 2.0 ** 1100 is an error


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses that double from `first_s` to `longest_s`, each shortened by chance to between half and all of it.

    A thousand agents that lost the same server come back over time, not at once.
    """

    first_s: float = 0.1
    longest_s: float = 1.0

    def pause_s(self, failures: int, chance: float | None = None, *, asked_s: float = 0.0) -> float:
        """Seconds to wait after `failures` failures in a row; never 0, a server may end what has just begun.

        `chance` in [0, 1) decides where between half and all; None draws it. `asked_s` is what a server asked for.
        """
        doublings = min(max(failures, 1) - 1, _MOST_DOUBLINGS)
        share = random.random() if chance is None else chance
        return float(min(self.longest_s, max(asked_s, self.first_s * 2.0**doublings)) * (0.5 + share / 2))


def worth_repeating(error: StatusError) -> bool:
    """Whether the same request may be taken later; by what the answer says, not by its class.

    It says when to come again, or that nobody answered, or not in time, or it is a bug's: that proves nothing.
    """
    return error.retry_after_s is not None or error.code in _PROVE_NOTHING
