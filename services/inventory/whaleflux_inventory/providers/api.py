"""What the keeper of leases asks of a provider, whoever it is.

Calls end by their own deadline (`CALL_WITHIN_S`) and fail in one of the ways named here; whatever else they raise means that the
outcome is not known. No call waits for a machine to be ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer

CALL_WITHIN_S = 30.0
FLEET_TAG, LEASE_TAG, TOKEN_TAG, OFFER_TAG = (
    "whaleflux:fleet",
    "whaleflux:lease",
    "whaleflux:token",
    "whaleflux:offer",
)
MAX_MACHINES = 10_000  # that one list is read for


class ProviderError(Exception):
    """A provider said no: nothing was made or changed by this call. The text is for people, without keys."""


class NoCapacity(ProviderError):
    """It has no machine of that type there now, or the account may have no more."""


class Throttled(ProviderError):
    """Too many calls. `pause_s`: when it says to come back, 0.0 where it does not."""

    def __init__(self, message: str, pause_s: float = 0.0) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class AuthFailed(ProviderError):
    """The keys are not accepted, or do not allow it."""


class Unsupported(ProviderError):
    """It cannot be had that way at all: the type, the place or an option is wrong."""


class MachineNotFound(ProviderError):
    """No such machine."""


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """One machine. The same token asks for the same machine, letter for letter: nothing in here may differ when it is repeated.

    `environment`: the agent's settings, its single-use join token among them. `authority_pem`: whom the agent believes.
    `hard_end_s`: Unix seconds; the machine ends by itself then, and when it hears nothing of the control plane for `silent_s`.
    """

    fleet: str
    lease: str
    token: str
    offer: Offer
    hard_end_s: float
    silent_s: float
    environment: Mapping[str, str]
    authority_pem: str

    @property
    def tags(self) -> dict[str, str]:
        return {
            FLEET_TAG: self.fleet,
            LEASE_TAG: self.lease,
            TOKEN_TAG: self.token,
            OFFER_TAG: self.offer.name,
        }


class Provider(Protocol):
    """One account of a provider in one region."""

    lag_s: float
    """How long after a call began a machine may still be missing in `machines`."""

    async def launch(self, request: LaunchRequest) -> str:
        """Makes one machine and returns the provider's name of it. Raises ProviderError."""
        ...

    async def machines(self, fleet: str) -> Sequence[Machine]:
        """All machines that carry the fleet's tag, those that ended lately too. Raises ProviderError."""
        ...

    async def terminate(self, machine_id: str) -> None:
        """Begins to end a machine; one that is ending or gone is fine. Raises ProviderError."""
        ...


class ProviderKind(Protocol):
    """A kind of provider: checks offers, opens accounts."""

    def problems(self, offer: Offer) -> Mapping[str, str]:
        """What is wrong with an offer of this kind: field -> what would be right."""
        ...

    def open(self, offer: Offer, keys: Mapping[str, str]) -> Provider:
        """The account of an offer. `keys`: the parts of its secret."""
        ...
