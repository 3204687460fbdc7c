"""An agent whose node was retired or replaced ends its ranks, stops, and says why."""

import asyncio

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.errors import Unauthenticated, Unavailable
from whaleflux_agent.revocation import LONGEST_S, Revocation

REVOKED = Unauthenticated("sites/a/nodes/n1 was retired; join again under another --node-id", reason="REVOKED")


class Work:
    """Tasks that end some looks after they are not desired any more."""

    def __init__(self, looks):
        self.looks, self.desired = looks, None

    async def desire(self, desired):
        self.desired = list(desired.tasks)

    def running(self):
        if self.desired is not None:
            self.looks -= 1
        return ["task"] if self.looks > 0 else []


@pytest.mark.parametrize("looks", [5, 10**9])
async def test_who_is_revoked_ends_its_work_and_stops(looks):
    clock, stopping, work, revocation = VirtualClock(), asyncio.Event(), Work(looks), Revocation()
    running = asyncio.create_task(revocation.run(work, clock, stopping))
    revocation.look_at(Unavailable("away"))
    revocation.look_at(Unauthenticated("no certificate"))
    await clock.advance(60)
    assert work.desired is None and not stopping.is_set()
    revocation.look_at(REVOKED)
    await clock.advance(0.5)
    assert work.desired == [] and not stopping.is_set()
    await clock.advance(LONGEST_S)  # what cannot be ended does not keep the agent for ever
    assert stopping.is_set() and revocation.error is REVOKED
    running.cancel()
