"""The connections behind one channel: dialled afresh when our certificate is renewed, led on to the leader."""

from __future__ import annotations

import re
import time
from typing import Any, Self

import grpc

from whaleflux.errors import InvalidArgument, StatusError, Unavailable
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.retry_policy import channel_options
from whaleflux.rpc.tls_files import Tls, TlsFiles

STAMP_EVERY_S = 1.0
_ADDRESS = re.compile(r"[A-Za-z0-9._-]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}")


class Connection:
    """One gRPC channel and how many calls use it; an outdated one closes after its last call."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel, self.calls, self.outdated = channel, 0, False
        self.callables: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        self.calls += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self.calls -= 1
        if self.outdated and not self.calls:
            await self.channel.close()

    async def retire(self) -> None:
        """No new calls come; closes now or after the last one."""
        self.outdated = True
        if not self.calls:
            await self.channel.close()


class ConnectionPool:
    """One connection at a time, to `target` or to the leader that `target` named; `at` is whom it dials now."""

    def __init__(self, target: str, tls: Tls | TlsFiles, server: str, *, follow_leader: bool) -> None:
        self.target, self.at, self._follow_leader = target, target, follow_leader
        self._tls, self._options = tls, channel_options(server)
        self._stamp = tls.stamp() if isinstance(tls, TlsFiles) else None
        self._stamped_at = time.monotonic()
        self._connection = self._dial()
        self._closed = False

    def _dial(self) -> Connection:
        tls = self._tls.load() if isinstance(self._tls, TlsFiles) else self._tls
        credentials = grpc.ssl_channel_credentials(tls.roots, tls.key, tls.chain)
        return Connection(grpc.aio.secure_channel(self.at, credentials, options=self._options))

    async def current(self) -> Connection:
        """The connection for the next call."""
        if self._closed:
            raise Unavailable(f"the channel to {self.target} was closed", reason=ErrorReason.CHANNEL_CLOSED)
        if isinstance(self._tls, TlsFiles) and time.monotonic() - self._stamped_at >= STAMP_EVERY_S:
            self._stamped_at = time.monotonic()
            await self._redial_if_renewed(self._tls)
        return self._connection

    async def _redial_if_renewed(self, files: TlsFiles) -> None:
        try:
            if (stamp := files.stamp()) == self._stamp:
                return
            fresh = self._dial()
        except (OSError, InvalidArgument):
            return  # being replaced right now; the old certificate serves until the next look
        self._stamp = stamp
        await self._replace(fresh)

    async def on_error(self, error: StatusError) -> None:
        """Learns from a failed call: to whom the next one goes.

        A follower's NOT_LEADER names the leader; one that cannot be reached sends us back to where we began.
        """
        if not self._follow_leader or not isinstance(error, Unavailable) or self._closed:
            return
        leader = error.metadata.get("leader", "") if error.reason == ErrorReason.NOT_LEADER else ""
        at = leader if _ADDRESS.fullmatch(leader) else self.target
        if at != self.at:
            self.at = at
            await self._replace(self._dial())

    async def _replace(self, fresh: Connection) -> None:
        old, self._connection = self._connection, fresh
        await old.retire()

    async def close(self) -> None:
        """Ends the connection and the calls on it; streams on older ones end with their readers."""
        self._closed = True
        await self._connection.channel.close()
