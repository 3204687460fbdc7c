"""From the word of a machine's metadata service to the work that has left it; the service is played (IMDSv2), the machines are too."""

import time

import pytest

from tests.support import fake_metadata
from tests.support.moving_world import Jobs, nodes
from tests.support.suite import running_suite, until
from whaleflux.demo.fleet import Machine
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_agent.machine_notices import ENDPOINT, Ec2Metadata

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
DRAINED_WITHIN_S = 30.0
SPOT, OWNED = Machine("aws", "spot", "h100x1"), Machine("aws", "other", "h100x1")


@pytest.fixture
def metadata():
    with fake_metadata.running() as made:
        yield made


def test_it_is_asked_with_a_token_that_is_fetched_once_and_again_when_it_has_ended(metadata):
    service = Ec2Metadata(metadata.url)
    assert service.notices() == [] == service.notices()
    assert (metadata.given, metadata.refused) == (1, 0)
    metadata.tokens.clear()
    metadata.take_spot(2_000_000_000.0)
    metadata.schedule(2_000_000_600.0)
    assert [one.taken_s for one in service.notices()] == [2_000_000_000.0, 2_000_000_600.0]
    assert (metadata.given, metadata.refused) == (2, 1)
    metadata.schedule(2_000_000_600.0, state="completed")
    assert len(service.notices()) == 1


def test_who_does_not_answer_is_no_service_that_announces_nothing(metadata, monkeypatch):
    monkeypatch.setenv("http_proxy", metadata.url)  # which is never asked
    with pytest.raises(OSError):
        Ec2Metadata("http://127.0.0.1:9").notices()
    assert metadata.given == 0


def test_the_variable_of_aws_libraries_says_where_it_is(metadata, monkeypatch):
    monkeypatch.setenv(ENDPOINT, metadata.url + "/")
    assert Ec2Metadata().notices() == []
    assert metadata.given == 1


async def test_from_a_notice_of_two_minutes_to_a_training_that_goes_on_elsewhere(metadata, monkeypatch, tmp_path):
    with running_suite() as suite:
        monkeypatch.setenv(ENDPOINT, metadata.url)
        monkeypatch.setenv("WHALEFLUX_MACHINE_NOTICES", "ec2")
        await suite.join([SPOT])
        monkeypatch.delenv("WHALEFLUX_MACHINE_NOTICES")
        async with suite.client() as client:
            jobs = Jobs(client, tmp_path)
            began = await jobs.train("moved", "H100-80GB")
            assert nodes(began) == {"spot"}
            await suite.join([OWNED])
            metadata.take_spot(time.time() + 120)

            async def drained():
                request = pb.ListAllocationsRequest(page_size=100)
                held = (await client.scheduler.ListAllocations(request, timeout=5)).allocations
                return SPOT.name not in {one.task.node for one in held}

            took_s = await until(drained, "the spot machine is drained", 60)
            print(f"from the notice to the drained machine: {took_s:.1f} s")
            moved = await jobs.reaches("moved", pb.JOB_STATE_RUNNING, attempt=2)
            assert (nodes(moved), moved.restarts) == ({"other"}, 0)
            await jobs.went_on("moved", moved)
            assert took_s <= DRAINED_WITHIN_S
            node = await client.inventory.GetNode(inventory_pb2.GetNodeRequest(name=SPOT.name), timeout=5)
            assert [one.reason for one in node.facts.conditions] == ["SPOT_TAKEN"]
            await jobs.cancel_all()
