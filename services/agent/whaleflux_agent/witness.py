"""Looks at another node for health_monitor: whether its host answers, refuses, or stays silent."""

from __future__ import annotations

import asyncio
import time

_TIMEOUT_S = 1.0
CONNECTED, REFUSED, SILENT = "PEER_CONNECTED", "PEER_REFUSED", "PEER_SILENT"


async def look(address: str) -> tuple[str, int]:
    """One of the three words, and the milliseconds that it took.

    REFUSED comes from a host that lives without its agent; SILENT from a host that is gone, or a network that is.
    """
    host, _, port = address.rpartition(":")
    started = time.monotonic()
    word = CONNECTED
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
    except ConnectionRefusedError:
        word = REFUSED
    except (TimeoutError, OSError, ValueError):
        word = SILENT
    return word, int((time.monotonic() - started) * 1000)
