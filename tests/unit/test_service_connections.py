"""Which addresses of etcd and NATS a service takes: with certificates, or plain on its own machine where it is told so."""

import pytest

from whaleflux.clock import VirtualClock
from whaleflux.config import ServiceSettings
from whaleflux.errors import InvalidArgument
from whaleflux.service_connections import open_bus, open_store
from whaleflux.store.memory import MemoryStore


async def refused(**settings):
    told = ServiceSettings(**settings)
    with pytest.raises(InvalidArgument) as caught:
        if told.store:
            open_store(told, VirtualClock())
        else:
            await open_bus(told, VirtualClock(), "scheduler")
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.mark.parametrize("address", ["10.0.0.5", "etcd", "[2001:db8::1]", "0.0.0.0"])
async def test_plain_wires_to_another_machine_are_refused_whatever_is_set(address):
    for field, plain, right in (("store", "http", "https"), ("nats", "nats", "tls")):
        said = await refused(**{field: f"{plain}://127.0.0.1:1,{plain}://{address}:2"}, plain_loopback=True)
        assert said == {
            field: f"{plain}:// has no certificates, and {address.strip('[]')} is another machine; use {right}://"
        }


async def test_plain_wires_on_this_machine_are_asked_for_by_name():
    for field, plain, right in (("store", "http", "https"), ("nats", "nats", "tls")):
        said = await refused(**{field: f"{plain}://127.0.0.1:1"})
        assert said == {field: f"{plain}:// has no certificates; use {right}://, or for evaluation set plain_loopback"}


async def test_what_is_no_address_is_told_the_secure_form():
    for store in ("etcd:2379", "http://a:1,https://b:2", "https://a"):
        assert await refused(store=store) == {"store": "use https://host:port, comma separated"}
    assert "nats_password" in (await refused(nats="tls://u:p@h:1"))["nats"]


async def test_certificates_that_are_not_there_are_named(tmp_path):
    said = await refused(store="https://etcd:2379", store_key=tmp_path / "store.key")
    assert str(tmp_path / "store.key") in said["store_key"]
    assert isinstance(open_store(ServiceSettings(store="memory://"), VirtualClock()), MemoryStore)
