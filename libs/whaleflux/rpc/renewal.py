"""Keeps the identity on disk fresh: a new key and certificate when a third of the old one's life is left."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from whaleflux.clock import Clock
from whaleflux.errors import Refusal
from whaleflux.rpc.pki import Tls, TlsFiles, new_key_and_request, renewal_in_s

Sign = Callable[[bytes], Awaitable[bytes]]
_LONGEST_SLEEP_S = 3600.0  # the wall clock may be corrected while we sleep
_RETRY_S = 15.0


async def keep_renewed(
    files: TlsFiles, sign: Sign, clock: Clock, *, chance: Callable[[], float] = random.random
) -> None:
    """Runs until cancelled. `sign` takes a PEM signing request to the authority and returns the new chain.

    A refusal is tried again every 7-15 s for as long as the old certificate lasts and beyond: the caller's identity
    is known to the authority by other means or not at all.
    """
    while True:
        tls = files.load()
        if (wait_s := renewal_in_s(tls.chain, clock.now())) > 0:
            await clock.sleep(min(wait_s, _LONGEST_SLEEP_S))
            continue
        key, request = new_key_and_request()
        try:
            chain = await sign(request)
        except Refusal:
            await clock.sleep(_RETRY_S * (0.5 + chance() / 2))
            continue
        files.save(Tls(key, chain, tls.roots))
