"""What the registered fleet could never give is refused when it is submitted; what is not known is not impossible."""

import asyncio

import pytest

from tests.support.scheduler_world import World, node, until
from whaleflux.errors import FailedPrecondition
from whaleflux.v1 import health_pb2, inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb


@pytest.fixture
async def world():
    world = World()
    world.inventory.complete = True
    async with world:
        await until(lambda: world.node_view.complete, "inventory has told")
        yield world


def revision(world):
    return world.store.list("", limit=1)


@pytest.mark.parametrize("dry", [True, False])
async def test_more_gpus_than_there_are_are_refused_with_the_numbers(world, dry):
    await world.add(node("a/n1"), node("a/n2", model="H200"))
    before = (await revision(world)).revision
    with pytest.raises(FailedPrecondition) as refused:
        await world.create(64, dry=dry, gpu={"any_of": ["H200"]})
    said = str(refused.value)
    assert (
        "64 GPUs are asked for, and all registered nodes together, cordoned and lost ones included, have 4 that match"
        in said
    )
    assert "would fit with 4 GPUs" in said
    assert "--wait-for-capacity" in said
    assert (await revision(world)).revision == before


async def test_a_shape_that_no_node_has_is_refused(world):
    await world.add(node("a/n1"), node("a/n2"))
    with pytest.raises(FailedPrecondition, match="not 8 in the shape asked for; it would fit without max_nodes"):
        await world.create(8, nodes={"max": 1})
    await world.reaches(await world.submit(8), "RUNNING")


async def test_a_site_that_no_node_is_in_is_named_with_those_that_exist(world):
    await world.add(node("a/n1"), node("b/n1"))
    with pytest.raises(FailedPrecondition, match=r"no registered node is in nope; sites with nodes: a, b") as refused:
        await world.create(1, sites=["sites/nope"])
    assert "in the shape" not in str(refused.value)


async def test_a_share_that_no_gpu_has_is_refused_with_the_largest(world):
    await world.add(node("a/n1"))
    with pytest.raises(
        FailedPrecondition, match=r"in the shape asked for; largest free share: \d+ GB \(sites/a/nodes/n1\)"
    ):
        await world.create(1, gpu={"share_memory_bytes": 900 * 10**9})


async def test_who_waits_for_capacity_says_so_and_is_placed_when_it_comes(world):
    await world.add(node("a/n1"))
    name = (await world.create(8, wait_for_capacity=True)).name
    await world.caught_up()
    assert (await world.job(name)).state_message.startswith("waits: for capacity: ")
    await world.add(node("a/n2"))
    await world.reaches(name, "RUNNING")


async def test_nodes_that_are_full_cordoned_lost_or_sick_count(world):
    await world.add(node("a/n1"), node("a/n2"))
    await world.submit(4)
    world.intend("sites/a/nodes/n1", inventory_pb2.NODE_INTENT_CORDONED)
    world.phase("sites/a/nodes/n2", health_pb2.NODE_PHASE_UNREACHABLE, "SILENT_TOO_LONG")
    assert not (await world.create(8, dry=True)).decision.placed
    assert (await world.create(8)).state == pb.JOB_STATE_QUEUED


async def test_a_node_whose_driver_does_not_tell_its_gpus_may_have_any(world):
    await world.add(node("a/n1"), node("a/n2"))
    broken = inventory_pb2.Node()
    broken.CopyFrom(world.nodes["sites/a/nodes/n2"])
    broken.facts.ClearField("gpus")
    broken.facts.ClearField("links")
    broken.facts.conditions.add(type="DriverWorks", reason="NO_DRIVER", message="install or load the driver")
    world.node_view.set_node(broken.name, broken)
    await world.create(8)
    broken.facts.conditions[0].reason = "NO_GPU"
    world.node_view.set_node(broken.name, broken)
    with pytest.raises(FailedPrecondition, match="have 4 that match"):
        await world.create(8)


async def test_a_gpu_that_was_lost_before_it_was_read_may_be_any(world):
    await world.add(node("a/n1", 8))
    lost = inventory_pb2.Node()
    lost.CopyFrom(world.nodes["sites/a/nodes/n1"])
    lost.facts.gpus[7].memory_bytes, lost.facts.gpus[7].model, lost.facts.gpus[7].healthy = 0, "unknown", False
    world.node_view.set_node(lost.name, lost)
    await world.create(8, nodes={"max": 1})


async def test_a_node_whose_facts_cannot_be_taken_may_have_any_gpus(world):
    await world.add(node("a/n1"), node("a/n2"))
    strange = inventory_pb2.Node()
    strange.CopyFrom(world.nodes["sites/a/nodes/n2"])
    strange.name = "sites/a/nodes/n3"
    for index in range(4, 100):
        strange.facts.gpus.add(index=index, uuid=f"GPU-{index}", model="H100-80GB", memory_bytes=1 << 36)
    world.node_view.set_node(strange.name, strange)
    await world.create(12)
    world.node_view.set_node(strange.name, None)
    with pytest.raises(FailedPrecondition, match="have 8 that match"):
        await world.create(12)


async def test_nodes_that_are_retired_do_not_count_until_they_are_back(world):
    await world.add(node("a/n1"), node("a/n2"))
    await world.create(8)
    world.intend("sites/a/nodes/n2", inventory_pb2.NODE_INTENT_RETIRED)
    await world.caught_up()
    with pytest.raises(FailedPrecondition, match="have 4 that match"):
        await world.create(8)
    world.intend("sites/a/nodes/n2", inventory_pb2.NODE_INTENT_ACTIVE)
    await world.caught_up()
    await world.create(8)


async def test_a_fleet_without_nodes_says_nothing_about_what_is_possible(world):
    job = await world.create(64)
    assert job.state == pb.JOB_STATE_QUEUED
    planned = await world.create(64, dry=True)
    assert planned.decision.summary == "waits: the fleet has no nodes yet"
    assert "whaleflux token create" in planned.decision.smallest_change


async def test_a_fleet_that_is_not_known_yet_says_nothing_either():
    async with World() as world:  # inventory does not answer
        await world.add(node("a/n1"))
        assert (await world.create(64)).state == pb.JOB_STATE_QUEUED


async def test_a_queue_that_may_never_hold_so_many_is_named_with_what_to_do(world):
    await world.add(node("a/n1"))
    await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="small", queue=pb.Queue(max_gpus=2)), None)
    await world.caught_up()
    with pytest.raises(FailedPrecondition, match="whaleflux queue set small --max-gpus 4"):
        await world.create(4, queue="small")
    assert (await world.create(4, queue="small", wait_for_capacity=True)).state == pb.JOB_STATE_QUEUED


async def test_many_that_ask_for_something_else_each_are_taken_at_once(world):
    """A planner that is busy keeps nobody from submitting: what is not known is not refused."""
    await world.add(node("a/n1"))
    made = await asyncio.gather(*(world.create(1, memory_bytes_per_rank=(1 << 20) + n) for n in range(150)))
    assert len(made) == 150
