"""What the keeper of leases counts on, of every provider alike."""

import time

import pytest

from tests.support.provider_worlds import FLEET, OTHER_FLEET, WORLDS
from tests.support.suite import until
from whaleflux_inventory.providers.api import (
    FLEET_TAG,
    LEASE_TAG,
    AuthFailed,
    MachineNotFound,
    NoCapacity,
    ProviderError,
    Throttled,
)

pytestmark = pytest.mark.integration


@pytest.fixture(params=list(WORLDS))
def world(request, tmp_path):
    with WORLDS[request.param](tmp_path) as made:
        yield made


async def alive(world, fleet=FLEET):
    return [machine for machine in await world.provider.machines(fleet) if not machine.ended]


async def test_a_machine_is_listed_with_what_tells_whose_it_is(world):
    asked, began_s = world.request(), time.time()
    machine = await world.provider.launch(asked)
    (listed,) = await alive(world)
    assert (listed.id, listed.lease, listed.token) == (machine, asked.lease, asked.token)
    assert began_s - 5 <= listed.created_s <= time.time() + 5 and listed.taken_s == 0.0
    assert asked.tags[FLEET_TAG] == FLEET and asked.tags[LEASE_TAG] == asked.lease


async def test_machines_of_another_fleet_are_not_ours(world):
    await world.provider.launch(world.request(fleet=OTHER_FLEET))
    assert await alive(world) == []
    assert len(await alive(world, OTHER_FLEET)) == 1


async def test_the_same_request_again_is_the_same_machine(world):
    asked = world.request()
    machine = await world.provider.launch(asked)
    assert await world.provider.launch(asked) == machine
    assert [one.id for one in await alive(world)] == [machine]
    assert await world.provider.launch(world.request()) != machine


async def test_an_end_can_be_said_again(world):
    machine = await world.provider.launch(world.request())
    for _ in range(2):
        await world.provider.terminate(machine)

        async def ended():
            return not await alive(world)

        await until(ended, "the machine has ended", 20)
    other = machine[:-1] + ("0" if machine[-1] != "0" else "1")
    try:
        await world.provider.terminate(other)
    except MachineNotFound as said:
        assert isinstance(said, ProviderError)


@pytest.mark.parametrize(
    ("fault", "refusal"), [("no_capacity", NoCapacity), ("throttled", Throttled), ("auth", AuthFailed)]
)
async def test_a_refusal_says_its_kind_and_makes_nothing(world, fault, refusal):
    with pytest.raises(refusal):
        await world.provider.launch(world.request(fault))
    assert await alive(world) == []
    await world.provider.launch(world.request())


async def test_an_answer_that_is_lost_is_no_refusal_and_the_machine_is_found(world):
    asked = world.request("lost_reply")
    with pytest.raises(Exception) as lost:
        await world.provider.launch(asked)
    assert not isinstance(lost.value, ProviderError)
    (found,) = await alive(world)
    assert found.token == asked.token
    assert await world.provider.launch(asked) == found.id


def test_what_is_wrong_with_an_offer_is_named(world):
    assert world.kind.problems(world.offer) == {}
    for field, offer in world.wrong.items():
        assert set(world.kind.problems(offer)) == {field}
