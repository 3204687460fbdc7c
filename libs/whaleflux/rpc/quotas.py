"""How much each caller may ask for in a second: calls by what they cost, of known callers and of addresses without a certificate."""

from __future__ import annotations

from functools import cache

from whaleflux.errors import ResourceExhausted
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.auth import NOBODY, Identity
from whaleflux.rpc.limits import CallLimits
from whaleflux.rpc.rate import Rate, sender

# What a call costs, in calls that read or change one thing; by the first word of its method. The longest word counts.
COSTS: dict[str, float] = {
    "List": 20,  # a page of up to 1,000 records
    "ListAudit": 500,  # what is searched for one page: up to 2,000 messages of the bus
    "Watch": 20,  # the listing that it begins with
    "Stream": 20,
    "Export": 500,  # a whole stream of the bus
    "Verify": 500,
    "Explain": 50,  # a question to the planner
    "Plan": 200,  # a long one
    "Find": 20,
    "Upload": 20,
    "Attach": 20,
}
_SERVICES = "/whaleflux."


class Quotas:
    """Pure: time is handed in."""

    def __init__(self, limits: CallLimits) -> None:
        self._known = Rate(limits.calls_per_s, limits.burst)
        self._address = Rate(limits.anonymous_per_s, limits.anonymous_burst)
        self._anonymous = Rate(limits.all_anonymous_per_s, limits.all_anonymous_per_s)

    def take(self, caller: Identity, address: str, method: str, now_s: float) -> None:
        """Counts one call. Raises ResourceExhausted, with when to come back.

        Whoever shows no certificate is counted by address first: one that asks too often locks out nobody else.
        """
        if caller is not NOBODY:
            wait_s, who = self._known.wait_s(caller.subject, now_s, cost_of(method)), caller.uri
        else:
            who = f"{caller.uri} at {address}"
            wait_s = self._address.wait_s(sender(address), now_s) or self._anonymous.wait_s("", now_s)
        if wait_s:
            raise ResourceExhausted(
                f"{who} calls too often; wait",
                reason=ErrorReason.TOO_OFTEN,
                metadata={"subject": who},
                retry_after_s=wait_s,
            )


@cache  # as many as there are methods
def cost_of(method: str) -> float:
    """See `COSTS`; methods that are none of the contract's, and what has no row, cost 1."""
    word = method.rpartition("/")[2]
    if not method.startswith(_SERVICES):
        return 1.0
    return max((cost for begin, cost in COSTS.items() if word.startswith(begin)), default=1.0)
