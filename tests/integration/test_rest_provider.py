"""The adapter of services by REST, over a service that speaks as Lambda's published API does: what is there beside the common contract."""

import asyncio
import time
from dataclasses import replace

import pytest

from tests.support import lambda_service
from tests.support.provider_worlds import FLEET, REST_OFFER, ProviderWorld
from whaleflux_inventory.providers import rest
from whaleflux_inventory.providers.api import (
    AuthFailed,
    MachineNotFound,
    NoCapacity,
    ProviderError,
    Throttled,
    Unsupported,
)
from whaleflux_inventory.providers.rest_services import LAMBDA

pytestmark = pytest.mark.integration


class World:
    """An account, and the service behind it."""

    def __init__(self, service, monkeypatch):
        self.service = service
        monkeypatch.setitem(rest.SERVICES, "lambda", replace(LAMBDA, pause_s=0.0))
        self.offer = replace(REST_OFFER, options={**REST_OFFER.options, "url": service.url})
        self.kind = rest.RestKind()
        self.account = self.kind.open(self.offer, {"LAMBDA_API_KEY": lambda_service.KEY})
        self.asking = ProviderWorld(self.account, self.offer, {}, self.kind, lambda fault: None)

    def request(self):
        return self.asking.request()

    def fails(self, fault, path=""):
        """The next call of that path alone."""
        left = [fault]
        self.service.fault = lambda asked: left.pop() if left and path in asked else ""


@pytest.fixture
def world(monkeypatch):
    with lambda_service.running(lambda_service.Service()) as service:
        yield World(service, monkeypatch)


async def test_what_is_asked_for_is_one_machine_that_sets_itself_up(world):
    asked = world.request()
    await world.account.launch(asked)
    (said,) = world.service.launches
    assert (said["quantity"], said["region_name"], said["instance_type_name"]) == (1, "us-east-1", "gpu_8x_a100")
    assert said["ssh_key_names"] == ["fleet"] and "until whaleflux agent; do" in said["user_data"]
    assert len(said["name"]) == 64 and asked.lease.partition("/")[2] in said["name"]


async def test_a_machine_is_looked_for_before_a_launch_is_sent_again(world):
    asked = world.request()
    world.fails("lost_reply", "launch")
    with pytest.raises(Exception) as lost:
        await world.account.launch(asked)
    assert not isinstance(lost.value, ProviderError)
    assert await world.account.launch(asked) == next(iter(world.service.machines))
    assert len(world.service.launches) == 1


async def test_names_of_others_are_not_ours(world):
    for name in ("", "training-1", "a-b-c", f"{FLEET[-10:]}--aaaa", f"{FLEET[-10:]}-lease-notbase32"):
        world.service.machines[name] = {"id": name, "name": name, "status": "active"}
    world.service.machines["unnamed"] = {"id": "unnamed", "name": None, "status": "active"}
    assert await world.account.machines(FLEET) == []


async def test_machines_of_all_regions_are_in_one_list_of_one_account(world):
    south = replace(world.offer, region="us-south-1")
    assert south.account == world.offer.account
    other = replace(world.offer, options={**world.offer.options, "url": "https://other.example"})
    assert other.account != world.offer.account


@pytest.mark.parametrize(("fault", "kind"), [("quota", NoCapacity), ("auth", AuthFailed), ("throttled", Throttled)])
async def test_errors_say_what_came_of_a_call(world, fault, kind):
    world.fails(fault, "launch")
    with pytest.raises(kind) as refused:
        await world.account.launch(world.request())
    assert lambda_service.KEY not in str(refused.value)
    assert getattr(refused.value, "pause_s", 7.0) == 7.0
    assert world.service.machines == {}


@pytest.mark.parametrize("fault", ["broken", "garbage", "elsewhere", "lost_before"])
async def test_whatever_else_happens_leaves_it_unknown(world, fault):
    world.fails(fault, "launch")
    with pytest.raises(Exception) as unknown:
        await world.account.launch(world.request())
    assert not isinstance(unknown.value, ProviderError)
    assert "/elsewhere" not in world.service.calls, "a key goes nowhere else"


async def test_a_list_without_end_is_read_no_further_than_an_answer_may_be_long(world, monkeypatch):
    monkeypatch.setattr(rest, "MAX_ANSWER_BYTES", 1 << 20)
    world.fails("endless", "instances")
    with pytest.raises(OSError, match="more than 1048576 bytes"):
        await world.account.machines(FLEET)


async def test_a_service_that_does_not_answer_is_not_waited_for(world, monkeypatch):
    monkeypatch.setattr(rest, "ANSWER_WITHIN_S", 0.5)
    world.service.fault = lambda path: time.sleep(3) or ""
    with pytest.raises(TimeoutError):
        await world.account.machines(FLEET)


async def test_the_end_of_a_machine_that_is_not_there_is_told_as_that(world):
    with pytest.raises(MachineNotFound):
        await world.account.terminate("0" * 32)


async def test_calls_are_as_far_apart_as_the_service_wants_them(world, monkeypatch):
    monkeypatch.setitem(rest.SERVICES, "lambda", replace(LAMBDA, pause_s=0.3))
    account = world.kind.open(world.offer, {"LAMBDA_API_KEY": lambda_service.KEY})
    began_s = time.monotonic()
    await asyncio.gather(*(account.machines(FLEET) for _ in range(3)))
    assert time.monotonic() - began_s >= 0.6


async def test_a_name_that_does_not_fit_is_refused_before_anything_is_asked(world):
    with pytest.raises(Unsupported, match="64"):
        await world.account.launch(replace(world.request(), lease="leases/" + "l" * 40))
    assert world.service.calls == []


def test_without_a_key_nothing_is_opened(world):
    with pytest.raises(AuthFailed, match="LAMBDA_API_KEY"):
        world.kind.open(world.offer, {"OTHER": "x"})
