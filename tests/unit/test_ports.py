"""The table of ports: what services, their settings and the front door say of ports is what it says."""

from whaleflux import frontdoor, ports
from whaleflux.config import ServiceSettings
from whaleflux.ports import PORTS, Party, Proof
from whaleflux.services import POLICY_HOST, SERVICES


def test_no_listener_has_a_port_twice():
    for listener in {port.listener for port in PORTS} | {service.host for service in SERVICES}:
        numbers = [port.number for port in ports.of(listener)]
        assert len(numbers) == len(set(numbers)), listener
        names = [port.name for port in ports.of(listener)]
        assert len(names) == len(set(names)), listener


def test_every_dialer_and_listener_is_somebody():
    known = {*Party, *(service.host for service in SERVICES)}
    for port in PORTS:
        assert {port.listener, *port.dialers} <= known
        assert (port.dialers == (Party.ITSELF,)) == port.loopback


def test_what_is_reached_from_elsewhere_is_never_plain():
    assert {port.proof for port in PORTS if not port.loopback} <= {*Proof} - {Proof.LOOPBACK}
    assert all("TLS" in port.carries for port in PORTS if not port.loopback and port.listener != Party.ETCD)


def test_the_front_door_of_deployments_listens_and_dials_as_the_table_says():
    front = frontdoor.deployed()
    assert {front.grpc_port, front.http_port, front.admin_port} == {p.number for p in ports.of(Party.FRONTDOOR)}
    (policy,) = (port for port in PORTS if port.name == "policy")
    assert front.policy == f"{POLICY_HOST}:{policy.number}", (
        "a name of its own: compose binds it where the front door alone is"
    )


def test_each_setting_that_listens_has_a_port():
    listens = {"listen": "grpc", "metrics_listen": "metrics"}
    assert set(listens) == {name for name in ServiceSettings.model_fields if name.endswith("listen")}
    for service in SERVICES:
        wanted = {*listens.values(), *(setting.removesuffix("_listen") for setting in service.http)}
        assert wanted == {port.name for port in ports.of(service.host)}
