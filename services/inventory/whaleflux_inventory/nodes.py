"""Nodes: their agents' facts and their operators' intent, in one record each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.convert import price_from_proto
from whaleflux.errors import FailedPrecondition, node_runs_twice
from whaleflux.reasons import ErrorReason, What
from whaleflux.rpc import auth, changes
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.rpc.update_masks import paths_of
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, Put, Store, Write
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, records, revocations
from whaleflux_inventory.core import facts, intents
from whaleflux_inventory.core.intents import Intent
from whaleflux_inventory.core.node_identity import Claim
from whaleflux_inventory.node_identities import NodeIdentities
from whaleflux_inventory.sites import Sites

PLACES = ("facts.zone", "facts.spine", "facts.leaf")
UPDATABLE = ("labels", "price", *PLACES)
PAGE_DEFAULT, PAGE_MOST = 500, 1000  # nodes of 64 GPUs are 40 KB each


class Dependencies(Protocol):
    """What inventory asks other services before it lets a node go for good."""

    async def unreachable(self, node: str) -> bool:
        """Whether health_monitor has fenced it."""
        ...

    async def gpus_held(self, node: str) -> int:
        """How many of its GPUs jobs still hold."""
        ...

    async def connected_boot(self, node: str) -> str:
        """Boot id of the machine whose agent gives signs of life as this node; "": of none, or nobody knows."""
        ...


class Nodes:
    """Everything that is done to nodes."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        sites: Sites,
        identities: NodeIdentities,
        dependencies: Dependencies,
        *,
        own_certificates: bool,
    ) -> None:
        self._store, self._clock, self._sites, self._dependencies = store, clock, sites, dependencies
        self._identities, self._own_certificates = identities, own_certificates

    async def register(self, request: pb.RegisterNodeRequest) -> pb.Node:
        """Records the facts of a node, creating it at the first call; writes nothing when nothing changed."""
        site, _ = names.split(request.name, "sites", "nodes")
        facts.check_registration(convert.facts_of(request), convert.presence_of(request))
        claim = Claim(request.machine_id, request.facts.host_address, session=auth.caller().session)
        await self._identities.check(request.name, claim, "registration")
        key = keys.of_name(keys.NODES, request.name)
        for _ in range(records.ATTEMPTS):
            if (known := await self._store.get(key)) is not None:
                await self._check_only_one(request, convert.node_of(known))
                return await self._register_again(request)
            node = pb.Node(
                name=request.name,
                facts=request.facts,
                intent=pb.NODE_INTENT_ACTIVE,
                boot_id=request.boot_id,
            )
            node.create_time.FromDatetime(self._clock.now())
            node.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
            node.register_time.CopyFrom(node.create_time)
            writes, when = await self._sites.implied(names.site(site))
            value = node.SerializeToString(deterministic=True)
            try:
                revision = await self._store.commit(Put(key, value), *writes, when=[Absent(key), *when])
            except ConditionFailed:
                continue
            return convert.node_of(Entry(key, value, revision, revision))
        raise records.contended(request.name)

    async def _check_only_one(self, request: pb.RegisterNodeRequest, known: pb.Node) -> None:
        """Refuses a machine that booted otherwise than the one that is connected as this node: one of them is a copy."""
        if not known.boot_id or known.boot_id == request.boot_id:
            return
        connected = await self._dependencies.connected_boot(request.name)
        if connected and connected != request.boot_id:
            raise node_runs_twice(request.name, connected, request.boot_id)

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
            node.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), "its agent reports other facts"))

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
            before = node.SerializeToString(deterministic=True)
            for path in paths:
                _set_path(node, path, request.node)
            if node.SerializeToString(deterministic=True) != before:
                why = f"{', '.join(path.removeprefix('facts.') for path in paths)} set"
                node.last_change.CopyFrom(changes.asked(What.CHANGED, self._clock.now(), why))

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

    async def set_intent(
        self, name: str, wanted: Intent, reason: str, etag: str, when: Sequence[Condition] = ()
    ) -> pb.Node:
        """Cordon, uncordon, drain or retire; raises Fenced where a `Held` of `when` does not hold."""
        names.split(name, "sites", "nodes")
        found = facts.Findings()
        found.text("reason", reason, facts.MAX_REASON)
        found.raise_if_any()
        unreachable = wanted is Intent.RETIRED and await self._may_retire(name)

        def intend(node: pb.Node) -> None:
            now = convert.intent_of(node)
            after = intents.change(name, now, wanted, unreachable=unreachable)
            shown = reason if after is not Intent.ACTIVE else ""
            if after is now and node.intent_reason == shown:
                return  # asked for again
            node.intent, node.intent_reason = convert.intent_number(after), shown
            node.last_change.CopyFrom(changes.asked(after.value, self._clock.now(), reason))

        also = [self._revocation(name, reason)] if wanted is Intent.RETIRED else []
        entry = await records.change(
            self._store, keys.NODES, name, pb.Node, intend, kind="node", etag=etag, also=also, when=when
        )
        return convert.node_of(entry)

    def _revocation(self, name: str, reason: str) -> Write:
        why = f"{name} was retired{f' ({reason})' if reason else ''}, which is final; join this machine again under another --node-id"
        return revocations.of_node(name, why, self._clock.now(), own_certificates=self._own_certificates)

    async def replace(self, name: str) -> pb.Node:
        """Frees the name for another machine; the one that had it is proven gone or holds nothing, and is refused."""
        names.split(name, "sites", "nodes")
        node = await self.get(name)
        check_not_retired(node)
        if not await self._may_retire(name):
            intents.change(name, convert.intent_of(node), Intent.RETIRED)  # drained first, as when it is retired
        why = f"{name} was given to another machine by an operator; join this one under another --node-id"
        now = self._clock.now()
        await self._identities.release(name, lambda admission: revocations.of_admission(admission, why, now))
        return node

    async def retire_gone(self, name: str, reason: str, when: Sequence[Condition] = ()) -> None:
        """Retires a node whose machine was given back to its provider: nothing can run there, whoever holds it."""

        def intend(node: pb.Node) -> None:
            if convert.intent_of(node) is not Intent.RETIRED:
                node.intent, node.intent_reason = pb.NODE_INTENT_RETIRED, reason
                node.last_change.CopyFrom(changes.asked(Intent.RETIRED.value, self._clock.now(), reason))

        also = [self._revocation(name, reason)]
        await records.change(self._store, keys.NODES, name, pb.Node, intend, kind="node", also=also, when=when)

    async def _may_retire(self, name: str) -> bool:
        """Whether the node is unreachable; refuses one that is alive and at work."""
        await records.read(self._store, keys.NODES, name, "node")
        if await self._dependencies.unreachable(name):
            return True
        if held := await self._dependencies.gpus_held(name):
            raise FailedPrecondition(
                f"{name} still runs work on {held} GPU(s); drain it and wait until it is empty",
                reason=ErrorReason.NODE_NOT_DRAINED,
                metadata={"name": name, "gpus_held": str(held)},
            )
        return False


def check_not_retired(node: pb.Node) -> None:
    """Refuses whatever would bring a retired node back."""
    if convert.intent_of(node) is Intent.RETIRED:
        raise FailedPrecondition(
            f"{node.name} was retired; retirement is final, join the machine again under another id",
            reason=ErrorReason.NODE_RETIRED,
            metadata={"name": node.name},
        )


def _checked_mask(request: pb.UpdateNodeRequest) -> list[str]:
    paths, found = paths_of(request.update_mask.paths, UPDATABLE), facts.Findings()
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
