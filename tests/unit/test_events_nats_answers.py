"""What JetStream's answers mean: which pass with time, and which never."""

import pytest
from nats.aio.client import Client
from nats.js.errors import APIError

from whaleflux.errors import FailedPrecondition, Unavailable
from whaleflux.events.nats import NatsBus, NatsOptions


async def answered(code, err_code):
    async def refuse():
        raise APIError(code=code, err_code=err_code, description="as the server says")

    bus = NatsBus(Client(), NatsOptions(servers=()))
    await bus.call(refuse())


@pytest.mark.parametrize(
    ("code", "err_code"), [(429, 10167), (408, 0), (503, 10008), (503, 10023), (500, 10047)], ids=str
)
async def test_a_server_that_cannot_do_it_now_is_waited_for(code, err_code):
    with pytest.raises(Unavailable):
        await answered(code, err_code)


@pytest.mark.parametrize(("code", "err_code"), [(404, 10059), (400, 10058), (400, 10054), (403, 0)], ids=str)
async def test_what_the_server_never_takes_is_told_as_such(code, err_code):
    with pytest.raises(FailedPrecondition) as refused:
        await answered(code, err_code)
    assert refused.value.metadata["err_code"] == str(err_code)
