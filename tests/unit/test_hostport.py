"""host:port texts: names, IPv4, IPv6 in brackets; whatever else is refused with the way out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux.hostport import HostPort, join, parse

GOOD = [
    ("10.0.0.5:7000", "10.0.0.5", 7000),
    ("[::1]:80", "::1", 80),
    ("[fe80::1%eth0]:65535", "fe80::1%eth0", 65535),
    ("gpu-1.example.org:7001", "gpu-1.example.org", 7001),
    ("front_door:1", "front_door", 1),
    ("example.org.:443", "example.org.", 443),
]
BAD = [
    ("", "no port"),
    ("localhost", "no port"),
    (":7000", "no valid host"),
    ("::1:80", "without brackets"),
    ("[::1]", "without brackets"),
    ("[1.2.3.4]:80", "between its brackets"),
    ("[]:80", "between its brackets"),
    ("256.1.1.1:80", "no valid IPv4"),
    ("1.2.3:80", "no valid IPv4"),
    ("0x7f.1:80", "no valid IPv4"),  # as resolvers read it: 127.0.0.1
    ("0x7f000001:80", "no valid IPv4"),
    ("host.7:80", "no valid IPv4"),
    ("host:", "no port from 1"),
    ("host:0", "no port from 1"),
    ("host:65536", "no port from 1"),
    ("host:+80", "no port from 1"),
    ("1.2.3.4:\u00b2", "no port from 1"),
    ("host:80/v1", "has a path"),
    ("http://host:80", "is a URL"),
    ("ho st:80", "no valid host"),
    ("-:80", "no valid host"),
    ("x" * 254 + ":80", "no valid host"),
]


@pytest.mark.parametrize(("text", "host", "port"), GOOD)
def test_an_address_is_taken_apart_and_put_together(text, host, port):
    address = parse(text)
    assert address == (host, port)
    assert str(address) == text


@pytest.mark.parametrize(("text", "why"), BAD)
def test_what_is_no_address_is_refused_with_the_reason(text, why):
    with pytest.raises(InvalidArgument) as refused:
        parse(text, "job.address")
    (violation,) = refused.value.violations
    assert violation.field == "job.address"
    assert why in violation.description
    assert len(violation.description) < 250


def test_where_one_listens_any_host_and_a_free_port_are_right():
    assert parse(":0", listening=True) == ("", 0)
    assert parse("[::]:7000", listening=True) == ("::", 7000)


def test_a_host_is_an_ip_address_or_a_name():
    assert parse("[::1]:1").ip.is_loopback
    assert parse("127.0.0.1:1").ip.is_loopback
    assert parse("localhost:1").ip is None


@given(st.ip_addresses(), st.integers(1, 65535))
def test_any_ip_address_survives(ip, port):
    assert parse(join(str(ip), port)) == HostPort(str(ip), port)


@given(st.text(max_size=300))
def test_any_text_is_an_address_or_refused(text):
    try:
        assert parse(str(parse(text))) == parse(text)
    except InvalidArgument as refused:
        assert refused.violations
