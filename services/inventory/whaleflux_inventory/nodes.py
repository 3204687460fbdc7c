"""Nodes: their agents' facts and their operators' intent, in one record each."""

from __future__ import annotations

from typing import Protocol

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.convert import price_from_proto
from whaleflux.errors import WrongState
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, Put, Store
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, records
from whaleflux_inventory.core import facts, intents
from whaleflux_inventory.core.intents import Intent
from whaleflux_inventory.sites import Sites

PLACES = ("facts.zone", "facts.spine", "facts.leaf")
UPDATABLE = ("labels", "price", *PLACES)
PAGE_DEFAULT, PAGE_MOST = 500, 1000  # nodes of 64 GPUs are 40 KB each
MAX_REASON = 500


class Surroundings(Protocol):
    """What inventory asks other services before it lets a node go for good."""

    async def unreachable(self, node: str) -> bool:
        """Whether health_monitor has fenced it."""
        ...

    async def gpus_held(self, node: str) -> int:
        """How many of its GPUs jobs still hold."""
        ...


class Nodes:
    """Everything that is done to nodes."""

    def __init__(self, store: Store, clock: Clock, sites: Sites, around: Surroundings) -> None:
        self._store, self._clock, self._sites, self._around = store, clock, sites, around

    async def register(self, request: pb.RegisterNodeRequest) -> pb.Node:
        """Records the facts of a node, creating it at the first call; writes nothing when nothing changed."""
        site, _ = names.split(request.name, "sites", "nodes")
        facts.check_registration(convert.facts_of(request), convert.presence_of(request))
        key = keys.of_name(keys.NODES, request.name)
        for _ in range(records.ATTEMPTS):
            if await self._store.get(key):
                return await self._register_again(request)
            node = pb.Node(
                name=request.name,
                facts=request.facts,
                intent=pb.NODE_INTENT_ACTIVE,
                boot_id=request.boot_id,
            )
            node.create_time.FromDatetime(self._clock.now())
            node.register_time.CopyFrom(node.create_time)
            writes, when = await self._sites.implied(f"sites/{site}")
            value = node.SerializeToString(deterministic=True)
            try:
                revision = await self._store.commit(Put(key, value), *writes, when=[Absent(key), *when])
            except ConditionFailed:
                continue
            return convert.node_of(Entry(key, value, revision, revision))
        raise records.contended(request.name)

    async def _register_again(self, request: pb.RegisterNodeRequest) -> pb.Node:
        def renew(node: pb.Node) -> None:
            check_not_retired(node)
            reported = pb.NodeFacts()
            reported.CopyFrom(request.facts)
            for path in node.overridden:
                _set_fact(reported, path, node.facts)
            if node.facts == reported and node.boot_id == request.boot_id:
                return
            node.facts.CopyFrom(reported)
            node.boot_id = request.boot_id
            node.register_time.FromDatetime(self._clock.now())

        return convert.node_of(await records.change(self._store, keys.NODES, request.name, pb.Node, renew, kind="node"))

    async def get(self, name: str) -> pb.Node:
        """One node, retired ones too."""
        names.split(name, "sites", "nodes")
        return convert.node_of(await records.read(self._store, keys.NODES, name, "node"))

    async def page(self, request: pb.ListNodesRequest) -> Page[pb.Node]:
        """One page of one site's nodes, or of all."""
        scope = ""
        if request.parent and request.parent != "sites/-":
            (site,) = names.split(request.parent, "sites", field="parent")
            scope = f"{keys.NODES}{site}/"

        def keep(node: pb.Node) -> bool:
            return request.show_retired or node.intent != pb.NODE_INTENT_RETIRED

        size = page_size(request.page_size, default=PAGE_DEFAULT, most=PAGE_MOST)
        return await list_page(
            self._store,
            keys.NODES,
            convert.node_of,
            size=size,
            token=request.page_token,
            scope=scope,
            keep=keep,
        )

    async def update(self, request: pb.UpdateNodeRequest) -> pb.Node:
        """Sets what the operator may: labels, price, place in the tree. Places stay through later registrations."""
        names.split(request.node.name, "sites", "nodes", field="node.name")
        paths = _checked_mask(request)

        def set_them(node: pb.Node) -> None:
            check_not_retired(node)
            for path in paths:
                _set_path(node, path, request.node)

        entry = await records.change(
            self._store,
            keys.NODES,
            request.node.name,
            pb.Node,
            set_them,
            kind="node",
            etag=request.node.etag,
        )
        return convert.node_of(entry)

    async def set_intent(self, name: str, wanted: Intent, reason: str, etag: str) -> pb.Node:
        """Cordon, uncordon, drain or retire."""
        names.split(name, "sites", "nodes")
        found = facts.Findings()
        found.text("reason", reason, MAX_REASON)
        found.raise_if_any()
        unreachable = wanted is Intent.RETIRED and await self._may_retire(name)

        def intend(node: pb.Node) -> None:
            now = convert.intent_of(node)
            after = intents.change(name, now, wanted, unreachable=unreachable)
            node.intent = convert.intent_number(after)
            node.intent_reason = reason if after is not Intent.ACTIVE else ""

        entry = await records.change(self._store, keys.NODES, name, pb.Node, intend, kind="node", etag=etag)
        return convert.node_of(entry)

    async def _may_retire(self, name: str) -> bool:
        """Whether the node is unreachable; refuses one that is alive and at work."""
        await records.read(self._store, keys.NODES, name, "node")
        if await self._around.unreachable(name):
            return True
        if held := await self._around.gpus_held(name):
            raise WrongState(
                f"{name} still runs work on {held} GPU(s); drain it and wait until it is empty",
                reason="NODE_NOT_DRAINED",
                metadata={"name": name, "gpus_held": str(held)},
            )
        return False


def check_not_retired(node: pb.Node) -> None:
    """Refuses whatever would bring a retired node back."""
    if convert.intent_of(node) is Intent.RETIRED:
        raise WrongState(
            f"{node.name} was retired; retirement is final, join the machine again under another id",
            reason="NODE_RETIRED",
            metadata={"name": node.name},
        )


def _checked_mask(request: pb.UpdateNodeRequest) -> list[str]:
    paths = list(dict.fromkeys(request.update_mask.paths))
    found = facts.Findings()
    if not paths:
        found.add("update_mask", f"is empty; name what to change: {', '.join(UPDATABLE)}")
    for path in paths:
        if path not in UPDATABLE:
            found.add("update_mask", f"{path[:64]!r} cannot be changed; use {', '.join(UPDATABLE)}")
    if "labels" in paths:
        facts.check_labels(found, "node.labels", request.node.labels)
    if "price" in paths:
        facts.check_price(found, "node.price", price_from_proto(request.node.price))
    for path in PLACES:
        if path in paths:
            facts.check_place(found, f"node.{path}", getattr(request.node.facts, path.removeprefix("facts.")))
    found.raise_if_any()
    return paths


def _set_path(node: pb.Node, path: str, wanted: pb.Node) -> None:
    if path == "labels":
        node.labels.clear()
        node.labels.update(wanted.labels)
    elif path == "price":
        node.ClearField("price")
        if wanted.HasField("price"):  # unset: the agent's own price counts again
            node.price.CopyFrom(wanted.price)
    else:
        _set_fact(node.facts, path, wanted.facts)
        kept = (
            {*node.overridden, path}
            if getattr(node.facts, path.removeprefix("facts."))
            else {*node.overridden} - {path}
        )
        node.overridden[:] = sorted(kept)  # an empty place leaves it to the agent again


def _set_fact(into: pb.NodeFacts, path: str, source: pb.NodeFacts) -> None:
    field = path.removeprefix("facts.")
    setattr(into, field, getattr(source, field))
