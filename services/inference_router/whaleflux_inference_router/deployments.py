"""What inventory knows of the sites and the weights of a model: whether it fits, what is missing where, when it is ready and why."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from whaleflux import names
from whaleflux.data import manifest, progress
from whaleflux.data.manifest import Manifest, ManifestWrong
from whaleflux.errors import (
    DeadlineExceeded,
    FieldViolation,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    StatusError,
    Unavailable,
)
from whaleflux.manifests import model_checks
from whaleflux.rpc import auth
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.v1 import inventory_pb2, scheduler_pb2
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_inference_router import convert
from whaleflux_inference_router.core import arrival
from whaleflux_inference_router.core.arrival import Card, Measured, Weights
from whaleflux_inference_router.core.rollout import UNDER_WAY
from whaleflux_inference_router.serving_sizes import Sizes, ask, refusal, why_none

CALL_S, PLAN_S = 10.0, 15.0
MOST_SIZES, MOST_LEFT_OUT = 64, 8  # of a site that are told
MOST_NODES, PAGE = 5000, 200  # of a site that are looked at; more are of the same types
_READY = inventory_pb2.DATASET_COPY_STATE_READY


@dataclass(frozen=True, slots=True)
class Facts:
    """What inventory says: the weights, and of each site that the model names its GPUs; None for a site that there is none of.

    `before`: the weights of the engine of before; `had_bytes`: what of the new ones they hold.
    """

    weights: inventory_pb2.Dataset | None
    cards: dict[str, tuple[Card, ...] | None]
    before: inventory_pb2.Dataset | None = None
    had_bytes: int = 0
    sizes: Sizes | None = None  # of a model that names its shape
    unsized: str = ""  # why there are none

    def at(self, site: str) -> Weights:
        """The weights as seen from a site; from none: anybody may have them."""
        found = self.weights
        if found is None:
            return Weights()
        had = self.had_bytes if self.before is not None and _is_at(site, self.before) else 0
        return Weights(found.name, found.size_bytes, _is_at(site, found), _origin(found), had)


class Deployments:
    """`inventory` None: nothing is known, and nothing refused."""

    def __init__(self, inventory: InventoryServiceStub | None, scheduler: SchedulerServiceStub | None = None) -> None:
        self._inventory, self._scheduler = inventory, scheduler

    async def settle(self, model: pb.Model, before: str = "") -> Facts:
        """Refuses what cannot run where the model says, and writes how much memory its GPUs need. Raises InvalidArgument naming each field."""
        facts = await self.facts(model, before)
        model.engine.gpu_memory_bytes = _least(model, facts)
        wrong = [*_gated(model, facts), *_misplaced(model, facts), *_unserved(model, facts)]
        if wrong:
            raise InvalidArgument(wrong)
        return facts

    async def facts(self, model: pb.Model, before: str = "", *, needed: bool = True) -> Facts:
        """`before`: datasets/{dataset} that it served from until now. Raises InvalidArgument for weights that are not there for the caller.

        `needed`: what the scheduler does not say now is an error, and not merely not known.
        """
        found = await self._of_inventory(model, before)
        if self._scheduler is None or not model.engine.shape:
            return found
        try:
            return replace(found, sizes=await ask(self._plan, model, model.version))
        except (Unavailable, DeadlineExceeded, ResourceExhausted) as away:
            if needed:
                raise
            return replace(found, unsized=away.message)

    async def _plan(self, request: scheduler_pb2.PlanServingRequest) -> scheduler_pb2.PlanServingResponse:
        assert self._scheduler is not None
        answer: scheduler_pb2.PlanServingResponse = await self._scheduler.PlanServing(request, timeout=PLAN_S)
        return answer

    async def _of_inventory(self, model: pb.Model, before: str) -> Facts:
        if self._inventory is None or not (model.engine.weights or model.sites):
            return Facts(None, {})
        weights = await self._weights(self._inventory, model.engine.weights) if model.engine.weights else None
        sites = [site.site for site in model.sites]
        known = await self._sites(self._inventory) if sites else frozenset()
        cards = await asyncio.gather(*(self._cards(self._inventory, site) for site in sites if site in known))
        found = iter(cards)
        by_site = {site: next(found) if site in known else None for site in sites}
        if weights is None or not before or before == weights.name:
            return Facts(weights, by_site)
        return Facts(weights, by_site, *await self._had(self._inventory, weights, before))

    async def _had(
        self, inventory: InventoryServiceStub, weights: inventory_pb2.Dataset, before: str
    ) -> tuple[inventory_pb2.Dataset | None, int]:
        """The weights of before, and how many bytes of the new ones are in them; nothing where it is not known of both what they consist of."""
        try:
            old = await inventory.GetDataset(inventory_pb2.GetDatasetRequest(name=before), timeout=CALL_S)
            if not (old.manifest_digest and weights.manifest_digest):
                return None, 0
            asked = (inventory_pb2.GetDatasetManifestRequest(name=name) for name in (before, weights.name))
            had, new = await asyncio.gather(*(inventory.GetDatasetManifest(one, timeout=CALL_S) for one in asked))
            return old, await asyncio.to_thread(shared_bytes, manifest.from_proto(had), manifest.from_proto(new))
        except (StatusError, ManifestWrong):
            return None, 0

    async def _weights(self, inventory: InventoryServiceStub, name: str) -> inventory_pb2.Dataset:
        who = auth.principal()
        try:
            found: inventory_pb2.Dataset = await inventory.GetDataset(
                inventory_pb2.GetDatasetRequest(name=name), timeout=CALL_S
            )
            access = Access(frozenset(found.members))
            if ownership.may_see(who, access) or ownership.is_owner(who, found.owner):
                return found
        except NotFound:
            pass
        unknown = f"{name!r} is not declared; declare it with: whaleflux datasets add {names.last(name)} --source PATH, or use one of: whaleflux datasets ls"
        raise InvalidArgument(FieldViolation("model.engine.weights", unknown))

    async def _sites(self, inventory: InventoryServiceStub) -> frozenset[str]:
        found, request = set[str](), inventory_pb2.ListSitesRequest(page_size=500)
        while True:
            page = await inventory.ListSites(request, timeout=CALL_S)
            found |= {site.name for site in page.sites}
            if not page.next_page_token:
                return frozenset(found)
            request.page_token = page.next_page_token

    async def _cards(self, inventory: InventoryServiceStub, site: str) -> tuple[Card, ...]:
        nodes, request = list[inventory_pb2.Node](), inventory_pb2.ListNodesRequest(parent=site, page_size=PAGE)
        while len(nodes) < MOST_NODES:
            page = await inventory.ListNodes(request, timeout=CALL_S)
            nodes += page.nodes
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        return tuple(cards_of(nodes))


def shared_bytes(had: Manifest, new: Manifest) -> int:
    """Bytes of the chunks of one that another has as well."""
    there = {chunk.sha256 for chunk in had.chunks() if chunk.sha256}
    return sum(chunk.size_bytes for chunk in new.chunks() if chunk.sha256 in there)


def _is_at(site: str, found: inventory_pb2.Dataset) -> bool:
    """Whether a node of the site has all of it."""
    return any(copy.state == _READY and copy.node.startswith(f"{site}/" if site else "") for copy in found.copies)


def cards_of(nodes: Iterable[inventory_pb2.Node]) -> Iterable[Card]:
    """GPUs by node and type."""
    for node in nodes:
        price = node.price if node.HasField("price") else node.facts.price
        for (model, memory), count in Counter((gpu.model, gpu.memory_bytes) for gpu in node.facts.gpus).items():
            yield Card(model, memory, count, price.usd_per_gpu_hour)


def order_of(model: pb.Model, facts: Facts) -> list[str]:
    """Its sites: those first that miss least bytes of its weights, of those alike the cheapest."""

    def key(site: str) -> tuple[int, float]:
        prices = [card.usd_per_gpu_hour for card in facts.cards.get(site) or ()]
        return facts.at(site).missing_bytes, min(prices, default=0.0)

    return sorted((site.site for site in model.sites), key=key)


def estimate(
    model: pb.Model, facts: Facts, replicas: Sequence[pb.Replica], others: Iterable[pb.Model]
) -> list[pb.SiteEstimate]:
    """When it is ready at each site, as far as anybody knows. `replicas`: those that it has."""
    known = list(others)
    return [
        _at_site(
            model, facts, site, count, [one for one in replicas if one.site == site], _measured(model, site, known)
        )
        for site, count in model_checks.replicas_of(model).items()
    ]


def _at_site(
    model: pb.Model, facts: Facts, site: str, count: int, there: Sequence[pb.Replica], measured: Measured
) -> pb.SiteEstimate:
    version = model.rollout.to_version if convert.stage_of(model) in UNDER_WAY else model.version or 1
    mine = [one for one in there if (one.version or 1) == version]
    ready = sum(one.state == pb.REPLICA_STATE_READY for one in mine)
    weights = facts.at(site)
    made = pb.SiteEstimate(site=site, replicas=count, ready_replicas=ready, missing_bytes=weights.missing_bytes)
    if facts.sizes is not None:
        made.sizes.extend(facts.sizes.shown(site, convert.engine_at(model, model.version, site).gpu_models, MOST_SIZES))
    if ready >= count:
        made.ready_in.FromSeconds(0)
        made.why = "all replicas answer"
        return made
    found = arrival.arrival(weights, measured)
    waiting = [one.message for one in mine if one.state == pb.REPLICA_STATE_STARTING and one.message]
    under_way = [pulled for one in waiting if (pulled := progress.read(one)) is not None]
    if under_way:
        last = min(under_way, key=lambda one: one.done_bytes)
        found = arrival.left(found, measured, *last)
    made.why = "; ".join((found.why, *waiting[:1], *_not_asked(facts, site)))
    made.problem = _problem(model, facts, site)
    if found.seconds is not None and not made.problem:
        made.ready_in.FromMilliseconds(round(1000 * found.seconds))
    return made


def _not_asked(facts: Facts, site: str) -> Iterable[str]:
    """GPUs of which it is not known whether they serve."""
    if facts.unsized:
        yield f"which GPUs serve it is not known now: {facts.unsized}"
    if facts.sizes is not None:
        yield from (f"left out: {one}" for one in facts.sizes.unable(site)[:MOST_LEFT_OUT])


def _problem(model: pb.Model, facts: Facts, site: str) -> str:
    cards = facts.cards.get(site, ())
    if cards is None:
        return "there is no such site"
    if site in facts.cards and not cards:
        return "it has no nodes with GPUs now"
    engine = convert.engine_at(model, model.version, site)
    if engine.shape:
        sizes = facts.sizes
        return why_none(model, sizes, site, engine.gpu_models, model.version) if sizes is not None else ""
    return arrival.misfit(cards, engine.gpu_models, engine.gpus or 1, _least(model, facts))


def _measured(model: pb.Model, site: str, others: Iterable[pb.Model]) -> Measured:
    """Of this model at the site; how fast bytes come there also of others."""
    mine = next((one for one in model.measures if one.site == site), pb.SiteMeasure())
    theirs = [one for other in others for one in other.measures if one.site == site]
    source = mine.source_bytes_per_s or next((one.source_bytes_per_s for one in theirs if one.source_bytes_per_s), 0)
    peer = mine.peer_bytes_per_s or next((one.peer_bytes_per_s for one in theirs if one.peer_bytes_per_s), 0)
    return Measured(source, peer, mine.engine_start_s)


def _least(model: pb.Model, facts: Facts) -> int:
    """0 where the size that is picked sees to it."""
    if model.engine.shape:
        return 0
    size = facts.weights.size_bytes if facts.weights is not None else 0
    return arrival.gpu_memory_bytes(size, model.engine.kv_memory_bytes, model.engine.gpus or 1)


def _gated(model: pb.Model, facts: Facts) -> Iterable[FieldViolation]:
    """Weights that are for some go to sites that are named, and nowhere else."""
    found = facts.weights
    if found is not None and not model.sites and (found.members or found.HasField("credentials")):
        whom = "is for some" if found.members else "is fetched with a secret"
        yield FieldViolation(
            "model.sites", f"are missing, and {found.name} {whom}: name the sites to which it may travel"
        )


def _misplaced(model: pb.Model, facts: Facts) -> Iterable[FieldViolation]:
    for i, site in enumerate(model.sites):
        if site.site not in facts.cards:
            continue
        if facts.cards[site.site] is None:
            yield FieldViolation(
                f"model.sites[{i}].site", f"{site.site} is no site of the fleet; use one of: whaleflux sites"
            )
        elif why := _problem(model, facts, site.site) if facts.cards[site.site] and not model.engine.shape else "":
            fix = "give it other GPU types there (sites: {SITE: {on: [...]}}), more `engine.gpus`, smaller weights, or leave the site out"
            yield FieldViolation(f"model.sites[{i}]", f"{site.site} {why}; {fix}")


def _unserved(model: pb.Model, facts: Facts) -> Iterable[FieldViolation]:
    """Sites, or the whole fleet, none of whose GPUs serve a model that names its shape. Where there are none yet, some may come."""
    if facts.sizes is None:
        return
    for number, site in enumerate(model.sites or (pb.ModelSite(),)):
        types = convert.engine_at(model, model.version, site.site).gpu_models
        refused = refusal(model, facts.sizes, site.site, types, model.version)
        if refused is not None:
            field = f"sites[{number}]" if site.site else refused.field
            yield FieldViolation(f"model.{field}", f"{site.site}: {refused.words}" if site.site else refused.words)


def _origin(found: inventory_pb2.Dataset) -> str:
    scheme, there, rest = found.uri.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if there else found.uri
