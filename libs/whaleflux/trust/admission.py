"""What the boundary asks of each caller whose certificate is good: whether it is admitted now, and with which groups."""

from __future__ import annotations

import asyncio
from typing import Protocol

from whaleflux.rpc.auth import Identity, Principal


class Admission(Protocol):
    """`trust.view.TrustView` in services."""

    def admit(self, identity: Identity) -> Principal:
        """The caller with its groups. Raises Unauthenticated for who was revoked, Unavailable while nothing is known."""

    async def changed(self) -> None:
        """Returns when answers may be others than before."""


class Everybody:
    """Admits each certificate as it is: servers without a store."""

    def admit(self, identity: Identity) -> Principal:
        """See `Admission`."""
        return Principal(identity)

    async def changed(self) -> None:
        """Never."""
        await asyncio.Event().wait()
