"""Jobs that name secrets: refused when they may not, and their values given to the agents of their tasks alone."""

from datetime import UTC, datetime

import pytest

from tests.support.scheduler_world import World, node
from tests.unit.test_secrets_service import World as Inventory
from whaleflux.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from whaleflux.rpc import auth
from whaleflux.trust import key_file
from whaleflux.v1 import agent_pb2, inventory_pb2, secrets_pb2
from whaleflux.v1 import scheduler_pb2 as pb

NOW = datetime(2026, 11, 30, tzinfo=UTC)
HF = pb.SecretUse(secret="secrets/hf-token", variable="HF_TOKEN")
N1 = auth.Identity("agent", "s/n1")
ANN = auth.Principal(auth.Identity("user", "ann"), frozenset({"provider-group"}))


class Stub:
    """Inventory's SecretService as a stub of the scheduler."""

    def __init__(self, inventory):
        self._inventory = inventory

    async def OpenSecrets(self, request, timeout):
        return await self._inventory.call("OpenSecrets", request, "embedded", "scheduler")


@pytest.fixture
def inventory(tmp_path):
    return Inventory(tmp_path)


async def submit(world, *uses, who=ANN, queue="default", on_behalf_of="", **more):
    spec = pb.JobSpec(command=["x"], gpus=1, secrets=uses, **more)
    with auth.acting_as(who):
        request = pb.CreateJobRequest(parent=f"queues/{queue}", job=pb.Job(spec=spec), on_behalf_of=on_behalf_of)
        return await world.scheduler.CreateJob(request, None)


async def opened(world, job, *, caller=N1, epoch=1, dataset=""):
    with auth.acting_as(caller):
        request = agent_pb2.OpenTaskSecretsRequest(job=job, epoch=epoch, dataset=dataset)
        return [(one.name, one.value) for one in (await world.tasks.OpenTaskSecrets(request, None)).secrets]


async def test_all_secrets_that_a_job_may_not_use_are_named_when_it_is_submitted(inventory):
    await inventory.add(queues=["queues/other"])
    await inventory.add("eves", name="eve")
    async with World(secrets=Stub(inventory)) as world:
        uses = [pb.SecretUse(secret=f"secrets/{name}", file=name) for name in ("eves", "absent", "hf-token")]
        with pytest.raises(InvalidArgument) as refused:
            await submit(world, *uses)
        found = {one.field: one.description for one in refused.value.violations}
        assert list(found) == [f"job.spec.secrets[{i}]" for i in range(3)]
        assert found["job.spec.secrets[0]"] == found["job.spec.secrets[1]"].replace("absent", "eves")
        assert "queue other" in found["job.spec.secrets[2]"]
    async with World() as world:
        with pytest.raises(FailedPrecondition, match="inventory"):
            await submit(world, HF)


async def test_an_attempt_gets_the_newest_values_on_its_own_node_while_it_is_placed(inventory):
    await inventory.add()
    async with World(secrets=Stub(inventory)) as world:
        await world.add(node("s/n1"), node("s/n2"))
        name = (await submit(world, HF)).name
        await world.reaches(name, "RUNNING")
        placed = (await world.job(name)).attempt.tasks[0].node
        mine, other = (
            auth.Identity("agent", f"s/{n}") for n in (("n1", "n2") if placed.endswith("n1") else ("n2", "n1"))
        )
        epoch = (await world.job(name)).epoch
        assert await opened(world, name, caller=mine, epoch=epoch) == [("secrets/hf-token", b"canary-1")]
        await inventory.rotate(b"canary-2")
        assert await opened(world, name, caller=mine, epoch=epoch) == [("secrets/hf-token", b"canary-2")]
        for caller, at in ((other, epoch), (mine, epoch + 1), (mine, epoch - 1), (auth.Identity("user", "ann"), epoch)):
            with pytest.raises(PermissionDenied):
                await opened(world, name, caller=caller, epoch=at)
        await inventory.call("DeleteSecret", secrets_pb2.DeleteSecretRequest(name="secrets/hf-token"))
        with pytest.raises(PermissionDenied, match="no secret 'hf-token'"):
            await opened(world, name, caller=mine, epoch=epoch)
        for agent in world.agents.values():
            agent.exit()
        await world.reaches(name, "SUCCEEDED")
        with pytest.raises(PermissionDenied, match="no task"):
            await opened(world, name, caller=mine, epoch=epoch)
        stored = b"".join(entry.value for entry in (await world.store.list("/")).entries)
        assert b"hf-token" in stored and b"canary" not in stored


async def test_a_team_of_an_identity_provider_is_remembered_with_the_job(inventory):
    inventory.known.groups = {"provider-group": {"bob"}}
    await inventory.add(team="groups/provider-group", name="bob")
    inventory.known.groups = {}
    async with World(secrets=Stub(inventory)) as world:
        await world.add(node("s/n1"))
        job = await submit(world, HF, secrets_groups=["groups/forged"])
        assert list(job.spec.secrets_groups) == ["groups/provider-group"]
        await world.reaches(job.name, "RUNNING")
        assert await opened(world, job.name, epoch=1) == [("secrets/hf-token", b"canary-1")]


async def test_replicas_use_the_secrets_of_their_models_owner(inventory):
    await inventory.add()
    router = auth.Identity("inference_router", "embedded")
    async with World(secrets=Stub(inventory)) as world:
        await world.add(node("s/n1"))
        with pytest.raises(InvalidArgument, match="no secret"):
            await submit(world, HF, who=router, on_behalf_of="user/eve")
        job = await submit(world, HF, who=router, on_behalf_of="user/ann")
        await world.reaches(job.name, "RUNNING")
        assert await opened(world, job.name) == [("secrets/hf-token", b"canary-1")]


async def test_a_dataset_is_fetched_with_the_secret_of_who_declared_it(inventory):
    await inventory.add("source", b"canary-3", name="bob")
    async with World(secrets=Stub(inventory)) as world:
        await world.add(node("s/n1"))
        credentials = inventory_pb2.DatasetCredentials(secret="secrets/source", owner="user/bob")
        world.inventory.datasets["datasets/c4"] = inventory_pb2.Dataset(name="datasets/c4", credentials=credentials)
        world.inventory.datasets["datasets/open"] = inventory_pb2.Dataset(name="datasets/open")
        job = await submit(world, datasets=["datasets/c4", "datasets/open"])
        await world.reaches(job.name, "RUNNING")
        assert await opened(world, job.name, dataset="datasets/c4") == [("secrets/source", b"canary-3")]
        assert await opened(world, job.name, dataset="datasets/open") == []
        with pytest.raises(NotFound, match="does not name it"):
            await opened(world, job.name, dataset="datasets/other")


async def test_a_key_that_is_lost_is_said_and_not_taken_for_an_absent_secret(inventory):
    await inventory.add()
    async with World(secrets=Stub(inventory)) as world:
        await world.add(node("s/n1"))
        job = await submit(world, HF)
        await world.reaches(job.name, "RUNNING")
        inventory.key_path.unlink()
        key_file.add_key(inventory.key_path, NOW)
        with pytest.raises(FailedPrecondition, match="is not in the file of keys"):
            await opened(world, job.name)
