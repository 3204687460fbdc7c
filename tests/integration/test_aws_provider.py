"""The adapter of EC2 over moto behind our shim: what AWS does beside the common contract."""

import asyncio
import threading
from dataclasses import replace

import pytest

from tests.support import ec2_shim
from tests.support.provider_worlds import AWS_OFFER, FLEET, ProviderWorld
from tests.support.suite import until
from whaleflux_inventory.providers import aws
from whaleflux_inventory.providers.api import AuthFailed, NoCapacity, ProviderError, Unsupported

pytestmark = pytest.mark.integration
BLOCK = "cr-0123456789abcdef0"


class World:
    """An account, and the shim behind it."""

    def __init__(self, shim):
        self.shim, self.kind = shim, aws.AwsKind()
        self.account = self.kind.open(AWS_OFFER, ec2_shim.KEYS)
        self.asking = ProviderWorld(self.account, AWS_OFFER, {}, self.kind)

    def request(self, market="on_demand", **options):
        self.asking.offer = replace(AWS_OFFER, market=market, options={**AWS_OFFER.options, **options})
        return self.asking.request()

    async def launch(self, market="on_demand", **options):
        return await self.account.launch(self.request(market, **options))

    async def machines(self):
        return {one.id: one for one in await self.account.machines(FLEET)}


@pytest.fixture
def world(monkeypatch):
    with ec2_shim.running(ec2_shim.Shim()) as shim:
        monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", shim.url)
        yield World(shim)


async def test_what_ec2_has_made_is_what_was_asked_for(world):
    machine = await world.launch("spot")
    (there,) = world.shim.alive()
    assert (there["InstanceId"], there["InstanceType"], there["InstanceLifecycle"]) == (machine, "p4d.24xlarge", "spot")
    (asked,) = world.shim.launches
    assert asked["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert asked["MetadataOptions.HttpTokens"] == "required"
    about = world.shim.client().describe_instance_attribute(InstanceId=machine, Attribute="userData")
    assert about["UserData"]["Value"] == asked["UserData"]


async def test_a_machine_is_listed_once_the_list_has_caught_up(world):
    now_s = [0.0]
    world.shim.now_s, world.shim.lag_s = (lambda: now_s[0]), 30.0
    machine = await world.launch()
    assert await world.machines() == {}
    now_s[0] = 30.0
    assert set(await world.machines()) == {machine}


async def test_a_list_of_many_pages_is_read_whole(world):
    made = {await world.launch() for _ in range(5)}
    world.shim.page = 2
    assert set(await world.machines()) == made
    assert world.shim.calls["DescribeInstances"] == 3


async def test_reserved_machines_come_of_their_reservation_alone(world):
    world.shim.reservations[BLOCK] = 1
    await world.launch("reserved", capacity_block=BLOCK)
    with pytest.raises(NoCapacity):
        await world.launch("reserved", capacity_reservation=BLOCK)
    with pytest.raises(Unsupported, match="does not exist"):
        await world.launch("reserved", capacity_reservation=BLOCK.replace("0", "1"))
    assert len(world.shim.alive()) == 1


async def test_what_aws_has_announced_is_listed_with_the_machine(world):
    stopped, taken, fine = [await world.launch("spot") for _ in range(3)]
    world.shim.events[stopped] = "instance-stop", 5000.0
    world.shim.interrupted[taken] = 1000.0
    seen = await world.machines()
    assert [seen[one].taken_s for one in (stopped, taken, fine)] == [5000.0, 1120.0, 0.0]
    assert "instance-stop" in seen[stopped].taken_why and "spot" in seen[taken].taken_why


async def test_keys_that_may_not_read_announcements_still_list_machines(world):
    machine = await world.launch("spot")
    world.shim.fault = lambda action: "auth" if action == "DescribeInstanceStatus" else ""
    assert set(await world.machines()) == {machine}


async def test_a_token_whose_machine_has_ended_makes_no_other_one(world):
    asked = world.request()
    world.shim.kill(await world.account.launch(asked))
    with pytest.raises(NoCapacity, match="IdempotentInstanceTerminated"):
        await world.account.launch(asked)


async def test_a_token_that_was_used_with_other_words_leaves_it_unknown(world):
    asked = world.request()
    await world.account.launch(asked)
    with pytest.raises(OSError, match="IdempotentParameterMismatch") as unknown:
        await world.account.launch(replace(asked, silent_s=120.0))
    assert not isinstance(unknown.value, ProviderError)


async def test_a_call_is_not_repeated_by_the_library(world):
    world.shim.fault = lambda action: "broken"
    with pytest.raises(OSError):
        await world.launch()
    assert world.shim.calls["RunInstances"] == 1


def test_a_secret_that_lacks_a_key_says_which():
    with pytest.raises(AuthFailed, match="secrets/cloud has no AWS_SECRET_ACCESS_KEY"):
        aws.AwsKind().open(AWS_OFFER, {"AWS_ACCESS_KEY_ID": "x"})


async def test_without_a_secret_only_a_role_counts_and_never_keys_that_lie_about(world, monkeypatch):
    for key, value in {**ec2_shim.KEYS, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(key, value)
    account = world.kind.open(replace(AWS_OFFER, secret=""), {})
    with pytest.raises(AuthFailed, match="no role"):
        await account.machines(FLEET)
    assert not world.shim.calls


async def test_a_call_that_is_given_up_before_it_has_begun_never_begins(world):
    free = threading.Event()

    def waits_for_us(action):
        free.wait(60)
        return ""

    world.shim.fault = waits_for_us
    busy = [asyncio.ensure_future(world.launch()) for _ in range(aws.THREADS)]

    async def all_threads_are_busy():
        return len([one for one in threading.enumerate() if one.name.startswith("ec2")]) == aws.THREADS

    await until(all_threads_are_busy, "all threads are busy", 20)
    later = asyncio.ensure_future(world.launch())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    later.cancel()
    await asyncio.gather(later, return_exceptions=True)
    free.set()
    await asyncio.gather(*busy)
    await world.machines()
    assert world.shim.calls["RunInstances"] == aws.THREADS == len(world.shim.alive())
