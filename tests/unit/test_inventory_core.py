"""Inventory's rules: what facts are believed, how intents move, whom a token admits."""

import itertools
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaleflux.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from whaleflux.fleet import Disk, Gpu, Link, LinkKind, Node, Price
from whaleflux_inventory.core import facts, intents, tokens
from whaleflux_inventory.core.facts import Presence
from whaleflux_inventory.core.intents import Intent

GPUS = tuple(Gpu(i, f"GPU-{i}", "H200", 141 << 30, (9, 0)) for i in range(8))
LINKS = tuple(Link(a, b, LinkKind.NVLINK, 4.5e11) for a, b in itertools.combinations(range(8), 2))
NODE = Node("sites/a/nodes/n1", "a", GPUS, LINKS, leaf="leaf-1", memory_bytes=2 << 40, disks=(Disk("/nvme", 1 << 42),))
HERE = Presence("b" * 36, "10.0.0.1:7000", "10.0.0.1", "550.1", "0.1.0", ("process", "docker"))
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def refused_fields(node=NODE, presence=HERE):
    with pytest.raises(InvalidArgument) as refused:
        facts.check_registration(node, presence)
    return {v.field for v in refused.value.violations}


def test_a_real_machine_is_believed():
    facts.check_registration(NODE, HERE)
    facts.check_registration(Node("sites/a/nodes/cpu", "a"), Presence("boot"))


BAD_NODES = {
    "65 GPUs": (replace(NODE, gpus=GPUS * 9, links=()), "facts.gpus"),
    "two GPUs of one index": (replace(NODE, gpus=(GPUS[0], GPUS[0]), links=()), "facts.gpus"),
    "negative GPU memory": (replace(NODE, gpus=(replace(GPUS[0], memory_bytes=-1),), links=()), "facts.gpus[0].memory_bytes"),
    "a GPU of 10^18 bytes": (replace(NODE, gpus=(replace(GPUS[0], memory_bytes=10**18),), links=()), "facts.gpus[0].memory_bytes"),
    "a GPU without model": (replace(NODE, gpus=(replace(GPUS[0], model=""),), links=()), "facts.gpus[0].model"),
    "a 10 MB model": (replace(NODE, gpus=(replace(GPUS[0], model="x" * 10**7),), links=()), "facts.gpus[0].model"),
    "a link to nowhere": (replace(NODE, links=(Link(0, 9, LinkKind.NVLINK, 1.0),)), "facts.links[0]"),
    "a link backwards": (replace(NODE, links=(Link(1, 0, LinkKind.NVLINK, 1.0),)), "facts.links[0]"),
    "a pair twice": (replace(NODE, links=(LINKS[0], LINKS[0])), "facts.links"),
    "an infinite link": (replace(NODE, links=(Link(0, 1, LinkKind.NVLINK, float("inf")),)), "facts.links[0].bandwidth_bytes_per_s"),
    "a zone with blanks": (replace(NODE, zone="zone 1"), "facts.zone"),
    "negative CPU": (replace(NODE, cpu_millicores=-5), "facts.cpu_millicores"),
    "negative memory": (replace(NODE, memory_bytes=-5), "facts.memory_bytes"),
    "NaN network": (replace(NODE, network_bytes_per_s=float("nan")), "facts.network_bytes_per_s"),
    "a negative disk": (replace(NODE, disks=(Disk("/x", -1),)), "facts.disks[0].capacity_bytes"),
    "a negative price": (replace(NODE, price=Price(usd_per_gpu_hour=-1.0)), "facts.price.usd_per_gpu_hour"),
    "too many labels": (replace(NODE, labels=tuple((f"k{i}", "v") for i in range(65))), "facts.labels"),
    "a label key with blanks": (replace(NODE, labels=(("a b", "v"),)), "facts.labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NODES)
def test_impossible_facts_are_refused_by_field(name):
    node, field = BAD_NODES[name]
    assert field in refused_fields(node)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"boot_id": ""}, "boot_id"),
        ({"boot_id": "x" * 65}, "boot_id"),
        ({"address": "nohost"}, "facts.address"),
        ({"address": "h:99999"}, "facts.address"),
        ({"address": "h:0"}, "facts.address"),
        ({"host_address": "a b"}, "facts.host_address"),
        ({"runtimes": ("Process!",)}, "facts.runtimes"),
        ({"driver_version": "\x00"}, "facts.driver_version"),
    ],
)
def test_impossible_presence_is_refused_by_field(change, field):
    assert field in refused_fields(presence=replace(HERE, **change))


def test_a_status_error_names_a_bounded_number_of_fields():
    node = replace(NODE, gpus=tuple(replace(g, memory_bytes=-1, model="") for g in GPUS), links=())
    with pytest.raises(InvalidArgument) as refused:
        facts.check_registration(node, HERE)
    assert len(refused.value.violations) == facts.Findings.MOST


def test_addresses_with_ipv6_hosts():
    found = facts.Findings()
    for good in ("", "[::1]:80", "node-1.site:65535", "10.0.0.1:1"):
        facts.check_address(found, "address", good)
    assert not found.violations


def test_intents_move_as_the_contract_says():
    allowed = {(now, wanted) for now in Intent for wanted in Intent if now is not wanted and _changes(now, wanted)}
    A, C, D, R = Intent.ACTIVE, Intent.CORDONED, Intent.DRAINING, Intent.RETIRED
    assert allowed == {(A, C), (A, D), (C, A), (C, D), (C, R), (D, A), (D, C), (D, R)}


def _changes(now, wanted, **more):
    try:
        return intents.change("sites/a/nodes/n", now, wanted, **more) is wanted
    except FailedPrecondition:
        return False


def test_asking_for_what_is_so_changes_nothing_and_retired_is_final():
    assert all(_changes(intent, intent) for intent in Intent)
    with pytest.raises(FailedPrecondition) as refused:
        intents.change("n", Intent.RETIRED, Intent.ACTIVE)
    assert refused.value.reason == "NODE_RETIRED"


def test_only_an_unreachable_node_retires_without_being_drained():
    assert not _changes(Intent.ACTIVE, Intent.RETIRED)
    assert _changes(Intent.ACTIVE, Intent.RETIRED, unreachable=True)


SECRET = "s" * tokens.SECRET_CHARS
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
TOKEN = tokens.Token("sites/a", tokens.digest(SECRET), NOW + timedelta(hours=1))


def test_a_token_admits_once_and_repeats_only_for_the_same_node_and_key():
    assert tokens.admits(TOKEN, SECRET, "n1", KEY, NOW)
    used = replace(TOKEN, used_by="n1", key_sha256=KEY)
    assert tokens.admits(used, SECRET, "n1", KEY, NOW) is False
    for node, key in (("n2", KEY), ("n1", OTHER_KEY)):
        with pytest.raises(Unauthenticated):
            tokens.admits(used, SECRET, node, key, NOW)


def test_wrong_secrets_and_late_uses_are_refused_alike():
    told = set()
    for secret, now in (("x" * 43, NOW), (SECRET, NOW + timedelta(hours=1, minutes=5))):
        with pytest.raises(Unauthenticated) as refused:
            tokens.admits(TOKEN, secret, "n1", KEY, now)
        told.add(str(refused.value))
    assert len(told) == 1


def test_a_token_counts_where_the_clock_is_five_minutes_ahead_of_the_one_that_made_it():
    assert tokens.admits(TOKEN, SECRET, "n1", KEY, NOW + timedelta(hours=1, minutes=4, seconds=59))


@given(st.text(max_size=200))
def test_whatever_is_no_token_is_refused_without_a_crash(text):
    try:
        token_id, secret = tokens.parse(text)
    except Unauthenticated:
        return
    assert tokens.text_of(token_id, secret) == text


def test_lifetimes():
    assert tokens.lifetime(0) == timedelta(hours=1)
    for bad in (-1, 604_801, 10**12):
        with pytest.raises(InvalidArgument):
            tokens.lifetime(bad)
