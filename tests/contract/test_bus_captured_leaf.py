"""A site's event server in the hands of somebody else: with its key, but by no rule of its own, at a hub with certificates."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nats.errors
import pytest
import pytest_asyncio

from tests.support.nats_server import NatsServer
from tests.support.raw_leaf import Heard, RawLeaf
from whaleflux.clock import SystemClock
from whaleflux.errors import StatusError, Unavailable
from whaleflux.events.nats import NatsBus, NatsOptions
from whaleflux.events.nats_code import NatsCode
from whaleflux.events.permissions import inbox
from whaleflux.events.stream_links import StreamLinks
from whaleflux.events.topology import site_api, taken_api, taken_name, taken_stream
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.rpc.store_authority import StoreHosts, identities, new_authority
from whaleflux.rpc.tls_files import TlsFiles, client_context

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
NOW = datetime.now(UTC)
STREAMS = ("EVENTS", "ACCOUNTING", "CODE", "AUDIT", "TAKEN-b")
CALLS = (
    "STREAM.DELETE.{0}", "STREAM.PURGE.{0}", "STREAM.UPDATE.{0}", "STREAM.MSG.GET.{0}", "STREAM.MSG.DELETE.{0}",
    "CONSUMER.CREATE.{0}", "CONSUMER.CREATE.{0}.c.wf.v1.b.>", "DIRECT.GET.{0}", "STREAM.INFO.{0}",
)  # fmt: skip
FLOW_CONTROL = b"NATS/1.0 100 FlowControl Request\r\n\r\n"


@dataclass
class World:
    """A hub, the server of site b, and the keys of everybody."""

    folder: Path
    hub: NatsServer
    site_b: NatsServer
    buses: dict[str, NatsBus] = field(default_factory=dict)

    def files(self, name: str) -> TlsFiles:
        return TlsFiles.under(self.folder / "store", name)

    def fleet(self, name: str) -> TlsFiles:
        """Of the fleet's authority, for links: believes the store's, as sites do."""
        files = TlsFiles.under(self.folder / "fleet", name)
        return TlsFiles(files.key, files.chain, self.files("nats").roots)

    async def bus(self, role: str) -> NatsBus:
        if role not in self.buses:
            self.buses[role] = await self.connect(client_context(self.files(role)), inbox(role))
        return self.buses[role]

    async def connect(self, tls: ssl.SSLContext, prefix: str, timeout_s: float = 30) -> NatsBus:
        options = NatsOptions((f"tls://{self.hub.address}",), tls=tls, inbox=prefix, create_streams=False)
        return await NatsBus.connect(options, timeout_s=timeout_s)

    def captured(self, who: str = "site-a"):
        """A link with the key of site a, or of somebody else."""
        return RawLeaf.link(self.hub.leaf, client_context(self.fleet(who)))

    async def kept(self, stream: str, api: str = "", by: str = "inventory") -> dict[str, int]:
        js = (await self.bus(by)).jetstream(api)
        return (await js.stream_info(stream, subjects_filter=">")).state.subjects or {}


def _issue(folder: Path) -> None:
    hosts = StoreHosts(["127.0.0.1"], ["127.0.0.1"])
    for role, tls in identities(new_authority(NOW), "1", NOW, timedelta(hours=1), hosts):
        TlsFiles.under(folder / "store", role).save(tls)
    fleet = CertificateAuthority.create(NOW)
    for name, role, whose in (
        ("site-a", "site", "a"), ("site-b", "site", "b"), ("agent", "agent", "a/n1"), ("admin", "admin", "ann"),
    ):  # fmt: skip
        TlsFiles.under(folder / "fleet", name).save(fleet.issue(role, whose, NOW, hosts=["127.0.0.1"]))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    tmp_path = folder = tmp_path_factory.mktemp("bus")
    _issue(folder)
    store, fleet = folder / "store", folder / "fleet"
    tls = TlsFiles.under(store, "nats")
    hub = NatsServer(tmp_path, sites={"a": "", "b": ""}, tls=tls, authority=fleet / "ca.crt")
    site_b = NatsServer(
        tmp_path,
        "b",
        hub_url=f"tls://{hub.leaf}",
        tls=TlsFiles.under(fleet, "site-b"),
        authority=tls.roots,
        agents=True,
    )
    world = World(folder, hub, site_b)
    try:
        await hub.start()
        await site_b.start()
        await _something_everywhere(world)
        yield world
    finally:
        await asyncio.gather(*(bus.close() for bus in world.buses.values()))
        hub.kill()
        site_b.kill()


async def _something_everywhere(world: World) -> None:
    """Each stream of the hub holds something; what site b said has come too."""
    inventory, scheduler = await world.bus("inventory"), await world.bus("scheduler")
    links = StreamLinks(inventory, ["a", "b"])
    async with asyncio.timeout(45):
        while "b" not in links.linked:
            await links.look()
            await asyncio.sleep(0.05)
        await NatsCode(scheduler, SystemClock(), 1 << 20).begin("0" * 64, 1)
        await scheduler.publish("wf.account.q.u.j.r", b"7 USD", id="1")
        await scheduler.publish("wf.v1.hub.job.q_j.running", b"secret of the hub", id="2")
        agents = NatsOptions((f"tls://{world.site_b.address}",), "b", tls=_agents(world), create_streams=False)
        at_b = await NatsBus.connect(agents)
        await at_b.publish("wf.v1.b.node.b_n1.xid", b"secret of b", id="3")
        await at_b.close()
        while len(await world.kept("EVENTS")) < 2:
            await asyncio.sleep(0.02)


def _agents(world: World) -> ssl.SSLContext:
    return client_context(TlsFiles.under(world.folder / "fleet", "agent"))


async def _everything(world: World) -> dict[str, dict[str, int]]:
    held = {stream: await world.kept(stream) for stream in ("EVENTS", "ACCOUNTING", "AUDIT")}
    held["CODE"] = await world.kept("CODE", by="scheduler")
    return {**held, "TAKEN-b": await world.kept("TAKEN-b", taken_api("b"))}


class TestWithTheKeyOfASite:
    async def test_it_hears_questions_about_its_own_streams_and_nothing_else(self, world: World) -> None:
        async with world.captured() as leaf:
            for subject in (
                ">",
                "wf.>",
                "wf.v1.b.>",
                "_INBOX.>",
                "$JS.>",
                "$JS.*.API.>",
                "taken.>",
                "from.>",
                "$SYS.>",
            ):
                leaf.subscribe(subject)
            await leaf.settled()
            inventory, scheduler = await world.bus("inventory"), await world.bus("scheduler")
            await scheduler.publish("wf.v1.hub.job.q_j.ended", b"secret", id="11")
            assert (await inventory.read(["wf.v1.>"])).events
            assert await inventory.reaches(site_api("b"))
            assert not await inventory.reaches(site_api("a"), 0.2)
            await leaf.settled()
            assert leaf.heard, "it is asked itself"
            assert all(heard.subject.startswith("$JS.a.API.") for heard in leaf.heard)

    async def test_it_can_say_nothing_in_another_s_name_and_ask_for_nothing(self, world: World) -> None:
        before = await _everything(world)
        said = [
            "wf.v1.b.node.b_n1.xid",
            "wf.v1.a.node.a_n1.xid",
            "wf.v1.hub.job.q_j.x",
            "wf.account.q.u.j.r",
            "wf.audit.x",
        ]
        said += [
            "code.x.record",
            "_INBOX.inventory.x",
            "_INBOX.scheduler.x",
            "from.b.S.x",
            "taken.a.S.x",
            "taken.b.S.x",
        ]
        said += ["$SYS.REQ.SERVER.PING", "$JS.FC.TAKEN-b.c.x"]
        apis = ("$JS.API", "$JS.hub.API", "$JS.b.API", "taken.b.API", "taken.a.API")
        asked = [f"{api}.{call.format(stream)}" for api in apis for stream in STREAMS for call in CALLS]
        for subject in [
            *said,
            *asked[::7],
            "$JS.API.STREAM.NAMES",
            "$JS.hub.API.STREAM.LIST",
            "$JS.API.STREAM.CREATE.X",
        ]:
            async with world.captured() as leaf:
                leaf.subscribe("from.a.>")
                leaf.publish(subject, b"{}", reply="from.a.answer")
                await leaf.settled()
                assert leaf.refusals, f"nobody minds {subject}"
                assert not leaf.heard, f"{subject} was answered: {leaf.heard}"
        assert await _everything(world) == before

    async def test_what_it_answers_to_the_hub_s_own_questions_stays_its_own(self, world: World) -> None:
        """The hub's JetStream believes the server that it takes events from, whatever subject or reply that names."""
        before = await _everything(world)
        async with world.captured() as leaf:
            leaf.subscribe("$JS.a.API.>")
            await (await world.bus("inventory")).nudge(taken_stream("a"), api=taken_api("a"))
            asked = await _asked_for_a_consumer(leaf)
            deliver = _take_it(leaf, asked)
            own = [
                "wf.v1.a.node.a_n1.xid",
                "wf.v1.b.node.b_n1.forged",
                "wf.v1.hub.job.q_j.forged",
                "wf.account.q.u.j.r",
            ]
            name = json.loads(asked.data)["config"]["name"]
            await leaf.until(lambda: deliver in leaf.interests)
            for n, subject in enumerate(own, 1):
                ack = f"$JS.ACK.EVENTS.{name}.1.{n}.{n}.{time.time_ns()}.{len(own) - n}"
                leaf.publish(deliver, b"forged", reply=f"{ack}@{subject}")
            await _until(world, lambda taken: set(taken) == set(own))  # it may tell lies, to its own account
            for victim in (
                "$JS.API.STREAM.DELETE.EVENTS",
                "taken.b.API.STREAM.DELETE.TAKEN-b",
                "wf.v1.b.node.b_n1.forged",
            ):
                leaf.publish(deliver, headers=FLOW_CONTROL, reply=victim)
            await leaf.settled()
            assert not leaf.refusals
        after = await _everything(world)
        assert after["EVENTS"] == before["EVENTS"] | {"wf.v1.a.node.a_n1.xid": 1}
        assert {**after, "EVENTS": {}} == {**before, "EVENTS": {}}

    async def test_nonsense_for_an_answer_is_an_outage_of_that_site_alone(self, world: World) -> None:
        inventory = await world.bus("inventory")
        async with world.captured() as leaf:
            leaf.subscribe("$JS.a.API.>")
            await leaf.settled()
            links = StreamLinks(inventory, ["a", "b"])
            looking = asyncio.create_task(links.look())
            await leaf.until(lambda: leaf.heard)
            leaf.publish(leaf.heard[0].reply, b'{"memory": [1], "limits": 7}')
            await looking
            assert links.linked == {"b"}


async def _asked_for_a_consumer(leaf: RawLeaf) -> Heard:
    def asked() -> list[Heard]:
        return [heard for heard in leaf.heard if ".CONSUMER.CREATE." in heard.subject]

    await leaf.until(asked)
    return asked()[-1]


def _take_it(leaf: RawLeaf, asked: Heard) -> str:
    """Answers as a server that made the consumer; returns where the hub waits for messages."""
    config = json.loads(asked.data)["config"]
    nothing = {"consumer_seq": 0, "stream_seq": 0}
    info = {"stream_name": "EVENTS", "name": config["name"], "config": config, "created": "2026-01-01T00:00:00Z"}
    answer = {"type": "io.nats.jetstream.api.v1.consumer_create_response", "delivered": nothing, "ack_floor": nothing}
    leaf.publish(asked.reply, json.dumps({**answer, **info}).encode())
    return str(config["deliver_subject"])


async def _until(world: World, condition) -> None:
    async with asyncio.timeout(45):
        while not condition(await world.kept(taken_name("a"), taken_api("a"))):
            await asyncio.sleep(0.02)


class TestOtherKeys:
    async def test_a_site_s_key_opens_no_client_s_port_and_an_agent_s_no_link(self, world: World) -> None:
        for who in ("agent", "admin"):
            async with world.captured(who) as leaf:
                leaf.subscribe("$JS.a.API.>")
                await leaf.until(lambda leaf=leaf: leaf.closed)
                assert not leaf.heard
        for who in ("site-a", "agent", "admin"):
            with pytest.raises(Unavailable):
                await world.connect(client_context(world.fleet(who)), "_INBOX.x", timeout_s=0.3)

    async def test_a_service_says_what_is_its_own_and_changes_no_stream(self, world: World) -> None:
        before = await _everything(world)
        router = await world.bus("inference_router")
        await router.publish("wf.v1.hub.model.m.created", b"", id="21")
        for subject in ("wf.v1.hub.job.q_j.x", "wf.v1.b.node.b_n1.x", "wf.account.q.u.j.r"):
            with pytest.raises(StatusError):
                await router.publish(subject, b"", id="22", timeout_s=0.1)
        for role, call in (
            ("inference_router", "CONSUMER.CREATE.EVENTS.c"), ("inference_router", "STREAM.MSG.GET.ACCOUNTING"),
            ("inventory", "STREAM.DELETE.EVENTS"), ("inventory", "STREAM.PURGE.AUDIT"),
        ):  # fmt: skip
            with pytest.raises((TimeoutError, nats.errors.Error)):
                await (await world.bus(role)).client.request(f"$JS.API.{call}", b"{}", timeout=0.1)
        heard: list[str] = []

        async def hear(message: Any) -> None:
            heard.append(message.subject)

        listener = await world.bus("checkpoint")
        for subject in ("wf.>", "_INBOX.inventory.>", "_INBOX.>"):
            await listener.client.subscribe(subject, cb=hear)
        assert (await (await world.bus("inventory")).read(["wf.v1.>"])).events
        await listener.client.flush()
        assert heard == []
        assert await _everything(world) == {**before, "EVENTS": {**before["EVENTS"], "wf.v1.hub.model.m.created": 1}}

    async def test_renewed_certificates_are_taken_up_while_all_runs(self, world: World) -> None:
        """The hub's when it is told to, a client's with its next connection."""
        good = {name: world.files(name).load() for name in ("nats", "checkpoint")}
        theirs = new_authority(NOW)
        shown = client_context(world.files("checkpoint"))
        for name, expected in (("nats", False), ("checkpoint", False), ("", True)):
            for restored, tls in good.items():
                world.files(restored).save(tls)
            if name:
                role = "nats" if name == "nats" else "checkpoint"
                world.files(name).save(
                    replace(theirs.issue(role, "1", NOW, hosts=["127.0.0.1"]), roots=good[name].roots)
                )
            world.hub.reload()
            async with asyncio.timeout(45):
                while await _reaches(world, shown) is not expected:
                    await asyncio.sleep(0.02)


async def _reaches(world: World, shown: ssl.SSLContext) -> bool:
    try:
        bus = await world.connect(shown, inbox("checkpoint"), timeout_s=0.3)
    except Unavailable:
        return False
    await bus.close()
    return True
