"""Asks the machine's own metadata service whether it is taken away: EC2's, by session tokens (IMDSv2).

What does not answer says nothing: what was known stays. Nothing else of the service is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from whaleflux.clock import Clock
from whaleflux_agent.core.machine_notices import Notice, first, of_maintenance, of_rebalance, of_spot

log = logging.getLogger(__name__)
Announce = Callable[[Notice | None], None]
EVERY_S = 5.0
ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
_LINK_LOCAL = "http://169.254.169.254"
_ANSWER_WITHIN_S = 2.0
_MAX_BYTES = 64 << 10
_TOKEN_S = 21_600
_SPOT, _REBALANCE, _MAINTENANCE = (
    "spot/instance-action", "events/recommendations/rebalance", "events/maintenance/scheduled",
)  # fmt: skip


class Ec2Metadata:
    """EC2's metadata service. Calls block, with deadlines; no proxy is asked and no redirection followed."""

    def __init__(self, endpoint: str = "") -> None:
        self._base = (endpoint or os.environ.get(ENDPOINT) or _LINK_LOCAL).rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
        self._token = ""

    def notices(self) -> list[Notice]:
        """All that it announces. Raises OSError where it does not answer, ValueError where its words are not known."""
        found = [
            read(text) for path, read in ((_SPOT, of_spot), (_REBALANCE, of_rebalance)) if (text := self._read(path))
        ]
        return found + (of_maintenance(text) if (text := self._read(_MAINTENANCE)) else [])

    def _read(self, path: str) -> str:
        """Nothing of that: ""."""
        for _ in range(2):
            self._token = self._token or self._new_token()
            try:
                return self._get(path)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == HTTPStatus.NOT_FOUND:
                        return ""
                    if error.code != HTTPStatus.UNAUTHORIZED:
                        raise
                self._token = ""  # it has ended, or the service began anew
        raise OSError("it refuses the tokens that it has given")

    def _get(self, path: str) -> str:
        return self._asked("GET", f"/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})

    def _new_token(self) -> str:
        return self._asked("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)})

    def _asked(self, method: str, path: str, headers: dict[str, str]) -> str:
        asked = urllib.request.Request(f"{self._base}{path}", None, headers, method=method)  # noqa: S310 - as set
        with self._opener.open(asked, timeout=_ANSWER_WITHIN_S) as answer:
            return str(answer.read(_MAX_BYTES).decode())


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


async def begin(metadata: Ec2Metadata, announce: Announce, clock: Clock) -> Callable[[], Awaitable[None]]:
    """Looks once, so that an agent which starts anew does not register a machine that is taken away as one that stays.

    Returns the loop that goes on.
    """
    known: Notice | None = None
    with contextlib.suppress(OSError, ValueError):  # the loop says so
        known = await _look(metadata, clock)
    announce(known)
    return lambda: watch(metadata, announce, clock, known)


async def watch(metadata: Ec2Metadata, announce: Announce, clock: Clock, known: Notice | None = None) -> None:
    """For ever: tells `announce` whenever it is another one than before; None: the machine stays."""
    failures = 0
    while True:
        try:
            found = await _look(metadata, clock)
            failures = 0
            if found != known:
                log.warning("announced of this machine: %s", found.message if found else "nothing any more")
                known = found
                announce(found)
        except (OSError, ValueError) as error:
            failures += 1
            level = logging.WARNING if failures in (1, 12) else logging.DEBUG
            log.log(level, "the machine's metadata service says nothing now: %r", error)
        await clock.sleep(EVERY_S)


async def _look(metadata: Ec2Metadata, clock: Clock) -> Notice | None:
    return first(await asyncio.to_thread(metadata.notices), clock.now().timestamp())
