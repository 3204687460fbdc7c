"""Datasets whose server wants a secret: declared by who may use it, for a server that may be shown it."""

import pytest

from tests.unit.test_secrets_service import World as Secrets
from whaleflux.clock import VirtualClock
from whaleflux.errors import InvalidArgument
from whaleflux.rpc import auth
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory.service import assemble


@pytest.fixture
async def secrets(tmp_path):
    world = Secrets(tmp_path)
    await world.add("source")
    await world.add("ours", queues=["queues/a"])
    await world.add("blob", b"\xff")
    return world


async def declare(secrets, uri="https://data.example/c4.tar", secret="secrets/source", name="ann"):
    rpc = assemble(secrets.store, VirtualClock(), None, None, secrets.rpc.problem)
    credentials = pb.DatasetCredentials(secret=secret, owner="user/forged")
    dataset = pb.Dataset(uri=uri, credentials=credentials)
    with auth.acting_as(auth.Identity("user", name)):
        return await rpc.CreateDataset(pb.CreateDatasetRequest(dataset_id="c4", dataset=dataset), None)


async def test_it_is_opened_on_behalf_of_who_declared_it(secrets):
    made = await declare(secrets)
    assert (made.credentials.secret, made.credentials.owner) == ("secrets/source", "user/ann")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"uri": "http://data.example/c4.tar"}, "must be https"),
        ({"uri": "/mnt/c4"}, "must be https"),
        ({"secret": "source"}, "form secrets"),
        ({"secret": "secrets/absent"}, "no secret 'absent'"),
        ({"name": "eve"}, "no secret 'source'"),
        ({"secret": "secrets/ours"}, "not outside of queues"),
        ({"secret": "secrets/blob"}, "no text"),
    ],
)
async def test_what_cannot_be_is_refused(secrets, how, said):
    with pytest.raises(InvalidArgument, match=said):
        await declare(secrets, **how)


async def test_a_fleet_without_a_key_has_none(secrets):
    rpc = assemble(secrets.store, VirtualClock(), None, None)
    dataset = pb.Dataset(uri="https://data.example/c4.tar", credentials=pb.DatasetCredentials(secret="secrets/source"))
    with auth.acting_as(auth.Identity("user", "ann")), pytest.raises(InvalidArgument, match="no secrets are kept"):
        await rpc.CreateDataset(pb.CreateDatasetRequest(dataset_id="c4", dataset=dataset), None)
