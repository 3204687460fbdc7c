"""What a machine's metadata service announces, and what becomes of it: agent, inventory, scheduler."""

import asyncio
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import virtual_time
from tests.support.virtual_time import LoopClock
from whaleflux.fleet.profile import Profile
from whaleflux.reasons import NodeReason
from whaleflux_agent import machine_notices
from whaleflux_agent.core.machine_notices import AHEAD_S, Notice, first, of_maintenance, of_rebalance, of_spot
from whaleflux_agent.devices.profile import ProfileSource
from whaleflux_agent.registration import NodeDescription, Registration

AT = datetime(2026, 1, 21, 9, 0, 43, tzinfo=UTC)


def maintenance(**more):
    return json.dumps([{"NotBefore": "21 Jan 2026 09:00:43 GMT", "Code": "system-reboot", "Description": "d", **more}])


def test_each_kind_says_when_and_why():
    spot = of_spot('{"action": "terminate", "time": "2026-01-21T09:00:43Z"}')
    assert (spot.reason, spot.taken_s) == (NodeReason.SPOT_TAKEN, AT.timestamp())
    risk = of_rebalance('{"noticeTime": "2026-01-21T09:00:43Z"}')
    assert (risk.reason, risk.taken_s) == (NodeReason.SPOT_AT_RISK, AT.timestamp() + 120)
    (planned,) = of_maintenance(maintenance(State="active"))
    assert (planned.reason, planned.taken_s) == (NodeReason.HOST_MAINTENANCE, AT.timestamp())
    assert "system-reboot" in planned.message


@pytest.mark.parametrize("state", ["completed", "canceled"])
def test_maintenance_that_is_over_is_none(state):
    assert of_maintenance(maintenance(State=state)) == []


def test_the_first_that_is_near_counts():
    far, near, later = (Notice(NodeReason.HOST_MAINTENANCE, at_s, "") for at_s in (AHEAD_S + 1, 500.0, 900.0))
    assert first([far, later, near], 0.0) is near
    assert first([far], 0.0) is None and first([far], 1.0) is far
    assert first([], 0.0) is None


@given(
    st.one_of(st.text(), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
)
def test_words_that_are_no_announcement_are_refused_in_one_way(text):
    for read in (of_spot, of_rebalance, of_maintenance):
        try:
            read(text)
        except ValueError:
            continue


class Service:
    """Says what its list has, one entry each time it is asked."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def notices(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_what_is_not_answered_changes_nothing_and_nothing_is_told_twice():
    taken, told = Notice(NodeReason.SPOT_TAKEN, 0.0, "m"), []

    async def go():
        service = Service([], OSError("away"), [taken], ValueError("?"), OSError("away"), [taken], [])
        clock = LoopClock()
        watching = asyncio.ensure_future(machine_notices.watch(service, told.append, clock))
        await clock.sleep(60)
        watching.cancel()

    virtual_time.run(go())
    assert told == [taken, None]


def test_an_agent_that_starts_anew_knows_it_before_it_registers_and_tells_it_once():
    taken, told = Notice(NodeReason.SPOT_TAKEN, 0.0, "m"), []

    async def go():
        clock = LoopClock()
        goes_on = await machine_notices.begin(Service([taken]), told.append, clock)
        assert told == [taken]
        watching = asyncio.ensure_future(goes_on())
        await clock.sleep(20)
        watching.cancel()
        await machine_notices.begin(Service(OSError("away")), told.append, clock)

    virtual_time.run(go())
    assert told == [taken, None]


class Inventory:
    """What agents register with."""

    def __init__(self):
        self.told = []

    async def RegisterNode(self, request, timeout):
        self.told.append(request.facts)


def test_an_announcement_is_registered_within_a_second_and_so_is_its_end():
    async def go():
        clock, inventory = LoopClock(), Inventory()
        description = NodeDescription("sites/s/nodes/n", "b", "", "h", "1", ())
        registration = Registration(ProfileSource(Profile.load("rtx4090x1")), inventory, description, clock)
        await registration.read()
        running = asyncio.ensure_future(registration.run())
        await clock.sleep(10)
        for notice in (Notice(NodeReason.SPOT_TAKEN, 5000.0, "it goes"), None):
            registration.announce(notice)
            await clock.sleep(1)
        running.cancel()
        return inventory.told

    before, taken, after = virtual_time.run(go())
    (condition,) = taken.conditions
    assert (condition.type, condition.reason, condition.message) == ("MachineStays", "SPOT_TAKEN", "it goes")
    assert taken.taken_time.seconds == 5000
    assert before == after and not after.conditions and not after.HasField("taken_time")
