"""Probes another node for health_monitor: whether its host answers, refuses, or stays silent."""

from __future__ import annotations

import asyncio
import time

from whaleflux import hostport
from whaleflux.errors import InvalidArgument
from whaleflux.reasons import What

_TIMEOUT_S = 1.0


async def probe(address: str) -> tuple[str, int]:
    """One of the three outcomes, and the milliseconds that it took.

    PEER_REFUSED comes from a host that lives without its agent, PEER_SILENT from a host that is gone, or a network that is.
    """
    started = time.monotonic()
    outcome = What.PEER_CONNECTED
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            _, writer = await asyncio.open_connection(*hostport.parse(address))
            writer.close()
    except ConnectionRefusedError:
        outcome = What.PEER_REFUSED
    except (TimeoutError, OSError, InvalidArgument):
        outcome = What.PEER_SILENT
    return outcome, int((time.monotonic() - started) * 1000)
