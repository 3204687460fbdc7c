"""Leases of etcd, kept alive as long as it answers, and given up before others may start.

`grant` makes one; its keys die with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import grpc
from aetcd import rpc

from whaleflux.errors import NotFound, StatusError, Unavailable
from whaleflux.store.etcd.connection import NEXT_MEMBER_S, REQUIRE_LEADER, EtcdConnection, EtcdLink, next_beat, now_s

log = logging.getLogger(__name__)
LOST_AFTER = 0.8  # of the TTL since the last answered keepalive was sent: stop before others may start


class KeepAlive:
    """Renews leases over one stream that stays open in between; a stream for each renewal costs several times as much."""

    def __init__(self, connection: EtcdConnection) -> None:
        self._connection = connection
        self._turn = asyncio.Lock()  # one question at a time, so that an answer is to the question before it
        self._link: EtcdLink | None = None
        self._call: Any = None

    async def renew(self, lease_id: int, timeout_s: float) -> float:
        """The seconds that the lease has now, 0 when it is gone; Unavailable without an answer in time."""
        try:
            async with asyncio.timeout(timeout_s), self._turn, self._connection.link(timeout_s) as link:
                return await self._ask(link, lease_id)
        except TimeoutError:
            raise Unavailable(f"etcd did not renew the lease within {timeout_s:g} s") from None

    async def _ask(self, link: EtcdLink, lease_id: int) -> float:
        if link is not self._link:
            self.close()
            self._link, self._call = link, link.leases.LeaseKeepAlive(metadata=REQUIRE_LEADER)
        answer: Any = grpc.aio.EOF
        try:
            await self._call.write(rpc.LeaseKeepAliveRequest(ID=lease_id))
            answer = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise Unavailable(f"etcd did not renew the lease: {error}") from error
        finally:
            if answer is grpc.aio.EOF:  # also when time ran out: an answer that comes later is nobody's
                self.close()
                self._connection.leave(link)
        if answer is grpc.aio.EOF:
            raise Unavailable("etcd ended the stream instead of renewing the lease")
        return float(answer.TTL)

    def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self._link = self._call = None


class EtcdLease:
    """Renewed three times per TTL; `lost` when no renewal sent within the last 0.8 TTL was answered."""

    def __init__(
        self, connection: EtcdConnection, keepalive: KeepAlive, lease_id: int, ttl_s: float, sent_s: float
    ) -> None:
        self.id, self.ttl_s, self.lost = lease_id, ttl_s, asyncio.Event()
        self._connection, self._keepalive = connection, keepalive
        self._lost_at_s = sent_s + LOST_AFTER * ttl_s
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def revoke(self) -> None:
        self.stop()
        with contextlib.suppress(StatusError):
            await revoke(self._connection, self.id)
        self.lost.set()

    def stop(self) -> None:
        self._task.cancel()

    async def _keep(self) -> None:
        while (left_s := self._lost_at_s - now_s()) > 0:
            sent_s = now_s()
            # Short attempts: one stuck member must leave time enough to ask the others, also during an election.
            if (ttl_s := await self._renew(min(left_s, self.ttl_s / 6))) is None:
                await asyncio.sleep(min(NEXT_MEMBER_S, left_s))
            elif ttl_s <= 0:  # the server has already ended it
                break
            else:
                self._lost_at_s = sent_s + LOST_AFTER * ttl_s
                await next_beat(ttl_s / 3)
        log.warning("lease %x is lost", self.id)
        self.lost.set()

    async def _renew(self, timeout_s: float) -> float | None:
        try:
            return await self._keepalive.renew(self.id, timeout_s)
        except StatusError:
            return None


async def grant(connection: EtcdConnection, keepalive: KeepAlive, ttl_s: float) -> EtcdLease:
    """A lease of at least `ttl_s`, in whole seconds as etcd counts them."""
    sent_s = now_s()
    request = rpc.LeaseGrantRequest(TTL=max(1, -int(-ttl_s // 1)))
    answer = await connection.ask(lambda link: link.leases.LeaseGrant, request)
    return EtcdLease(connection, keepalive, answer.ID, float(answer.TTL), sent_s)


async def revoke(connection: EtcdConnection, lease_id: int) -> None:
    """Ends a lease with its keys; one that is gone already is no error."""
    with contextlib.suppress(NotFound):
        await connection.ask(lambda link: link.leases.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id))
