"""The accounts of providers that offers are of: opened with their keys, asked with a deadline, left alone while they are too busy."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.retry import Backoff
from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers.api import (
    CALL_WITHIN_S,
    AuthFailed,
    LaunchRequest,
    MachineNotFound,
    Provider,
    ProviderKind,
    Throttled,
    Unsupported,
)

T = TypeVar("T")
log = logging.getLogger(__name__)
Keys = Callable[[str, str], Awaitable[Mapping[str, str]]]
"""The parts of a secret, by its name, and role/name of who rents with it; "": what was rented is looked at and ended, whoever left since.

Raises StatusError where that may not be.
"""
PAUSE = Backoff(first_s=1.0, longest_s=30.0)
KEYS_KEPT_S = 60.0  # so that a rotated secret is taken up within this time


@dataclass(slots=True)
class _Account:
    provider: Provider
    opened_s: float
    owner: str  # whose use of the keys was looked at; "": nobody's, it is only to look and to end
    busy_until_s: float = 0.0
    busy: int = 0
    calling: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(4))


class Accounts:
    """`kinds`: those that this fleet speaks with, by their name in offers. Times are the clock's monotonic ones."""

    def __init__(self, kinds: Mapping[str, ProviderKind], keys: Keys, clock: Clock) -> None:
        self.kinds, self._keys, self._clock = kinds, keys, clock
        self._open: dict[tuple[str, str, str], _Account] = {}

    async def lag_s(self, offer: Offer) -> float:
        """How long its lists may lag. Raises ProviderError."""
        return (await self._account(offer)).provider.lag_s

    async def launch(self, offer: Offer, request: LaunchRequest) -> str:
        """The machine's id. Raises ProviderError; any other Exception: nobody knows whether there is one."""
        account = await self._account(offer, rents=True)
        self._check_pause(account)
        async with account.calling:
            return await self._asked(account, account.provider.launch(request))

    async def machines(self, offer: Offer, fleet: str) -> Sequence[Machine] | None:
        """What the account of an offer lists; None: it does not answer, or is left alone for a while."""
        try:
            account = await self._account(offer)
            self._check_pause(account)
            return await self._asked(account, account.provider.machines(fleet))
        except Exception as error:  # whatever it is: one account's trouble is no other's
            log.warning("machines of %s %s are not known now: %r", offer.provider, offer.region, error)
            return None

    async def terminate(self, offer: Offer, machine: str) -> bool:
        """Whether the provider took it; False: to be said again."""
        try:
            account = await self._account(offer)
            async with account.calling:
                await self._asked(account, account.provider.terminate(machine))
        except MachineNotFound:
            return True
        except Exception as error:
            log.warning("%s of %s is not ended yet: %r", machine, offer.provider, error)
            return False
        return True

    async def _asked(self, account: _Account, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(CALL_WITHIN_S):
                answer = await call
        except Throttled as busy:
            account.busy += 1
            busy.pause_s = PAUSE.pause_s(account.busy, asked_s=busy.pause_s)
            account.busy_until_s = self._clock.monotonic() + busy.pause_s
            raise
        account.busy = 0
        return answer

    def _check_pause(self, account: _Account) -> None:
        left_s = account.busy_until_s - self._clock.monotonic()
        if left_s > 0:
            raise Throttled("it was asked too often a moment ago", left_s)

    async def _account(self, offer: Offer, *, rents: bool = False) -> _Account:
        """`rents`: only for an owner of the offer who may use its keys now; to look and to end whoever has opened it is good enough."""
        now_s = self._clock.monotonic()
        known = self._open.get(offer.account)
        theirs = known is not None and (known.owner == offer.owner or not rents)
        if known is not None and theirs and now_s - known.opened_s < KEYS_KEPT_S:
            return known
        kind = self.kinds.get(offer.provider)
        if kind is None:
            raise Unsupported(f"this fleet does not speak with {offer.provider!r}")
        owner = offer.owner if rents else ""
        try:
            keys = await self._keys(offer.secret, owner) if offer.secret else {}
        except (StatusError, ValueError) as wrong:
            raise AuthFailed(f"the keys in {offer.secret} cannot be used: {wrong}") from None
        made = _Account(kind.open(offer, keys), now_s, owner)
        if known is not None:
            made.busy, made.busy_until_s = known.busy, known.busy_until_s
        self._open[offer.account] = made
        return made
