"""How often one address may show what does not admit. What admits is never held up: whoever has the right secret cannot be locked out.

Secrets have 256 random bits, so that this is about load and noise, not about guessing.
"""

from __future__ import annotations

from whaleflux.errors import ResourceExhausted
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.rate import Rate, sender

PER_S = 0.2
BURST = 20.0
MAX_ADDRESSES = 16_384


class LoginThrottle:
    """Counts what was refused, by the address that it came from. Pure: time is handed in."""

    def __init__(self) -> None:
        self._rate = Rate(PER_S, BURST, MAX_ADDRESSES)

    def refused(self, address: str, now_s: float) -> None:
        """Takes note of a refusal; from the 21st within a short time on it says to wait, whatever was shown."""
        if wait_s := self._rate.wait_s(sender(address), now_s):
            raise ResourceExhausted(
                "too many logins from this address were refused; wait, and check the code or token",
                reason=ErrorReason.TOO_OFTEN,
                metadata={"subject": "login"},
                retry_after_s=wait_s,
            )
