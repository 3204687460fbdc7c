"""Which stored code may go: what no job refers to and nobody has wanted for a while. Pure.

Submitting a job keeps its code just before the job is stored, and deleting fails for what was kept since it was listed; so the
grace only has to be longer than a submission takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from whaleflux.code.api import StoredCode

SHORTEST_GRACE_S = 3600.0
CROWDED = 0.75  # of the store: from then on the shortest grace counts, so that nobody fills it for all others
ABANDONED_S = 86_400.0  # what is not whole after a day has lost its writer


def deletable(
    codes: Sequence[StoredCode], wanted: Collection[str], now: datetime, grace_s: float, max_bytes: int
) -> list[StoredCode]:
    """Of what is stored, what may be deleted; `wanted` are the digests that any kept record of a job names."""
    if sum(max(0, code.size_bytes) for code in codes) > CROWDED * max_bytes:
        grace_s = min(grace_s, SHORTEST_GRACE_S)
    return [
        code
        for code in codes
        if (now - code.kept).total_seconds() > (grace_s if code.whole else min(grace_s, ABANDONED_S))
        and not (code.whole and code.digest in wanted)
    ]
