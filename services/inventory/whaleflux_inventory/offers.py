"""Offers: declared by operators, with the provider's keys in a secret of theirs."""

from __future__ import annotations

from collections.abc import Mapping

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from whaleflux.reasons import What
from whaleflux.rpc import auth, changes
from whaleflux.rpc.etags import check_etag
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Entry, NoneCreated, Put, Store
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert, records
from whaleflux_inventory.core.facts import Findings
from whaleflux_inventory.core.offer_facts import check
from whaleflux_inventory.datasets import SecretProblem
from whaleflux_inventory.lease_records import MARKETS, core_offer, leases_in, offer_of, shown_offer
from whaleflux_inventory.providers.api import ProviderKind
from whaleflux_inventory.sites import check_site_id

_OUTPUT = (
    "refused_time", "refusals", "refusal", "last_change", "owner", "create_time", "trust", "request_fingerprint", "etag",
)  # fmt: skip


class Offers:
    """`kinds`: providers that this fleet speaks with."""

    def __init__(
        self, store: Store, clock: Clock, kinds: Mapping[str, ProviderKind], secret_problem: SecretProblem
    ) -> None:
        self._store, self._clock, self._kinds, self._secret_problem = store, clock, kinds, secret_problem

    async def create(self, request: pb.CreateOfferRequest) -> pb.Offer:
        """Declares an offer; the same request again (by its request_id) answers with what it made."""
        names.check_id("offer_id", request.offer_id)
        offer = pb.Offer()
        offer.CopyFrom(request.offer)
        for field in _OUTPUT:
            offer.ClearField(field)
        offer.name, offer.owner = names.offer(request.offer_id), auth.caller().subject
        await self._check(request, offer)
        offer.request_fingerprint = convert.fingerprint(request.request_id, request.offer_id, request.offer)
        offer.create_time.FromDatetime(self._clock.now())
        offer.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        key, value = keys.of_name(keys.OFFERS, offer.name), offer.SerializeToString(deterministic=True)
        if request.validate_only:
            there = await self._store.get(key)
            return (
                shown_offer(Entry(key, value, 0, 0), self._now_s()) if there is None else await self._made_before(offer)
            )
        try:
            revision = await self._store.commit(Put(key, value), when=[Absent(key)])
        except ConditionFailed:
            return await self._made_before(offer)
        return shown_offer(Entry(key, value, revision, revision), self._now_s())

    async def page(self, request: pb.ListOffersRequest) -> Page[pb.Offer]:
        """One page of offers."""
        return await list_page(
            self._store,
            keys.OFFERS,
            lambda entry: shown_offer(entry, self._now_s()),
            size=page_size(request.page_size),
            token=request.page_token,
        )

    async def delete(self, request: pb.DeleteOfferRequest) -> None:
        """Forgets an offer of which nothing is rented: with it goes the way to its machines."""
        names.split(request.name, "offers")
        try:
            entry = await records.read(self._store, keys.OFFERS, request.name, "offer")
        except NotFound:
            raise NotFound("offer", request.name, "see: whaleflux offers ls") from None
        check_etag(request.etag, entry)
        leases = await self._store.list(keys.LEASES)
        of_it = [one for one in leases_in(leases.entries) if request.name in one.offers]
        if of_it:
            raise FailedPrecondition(
                f"{request.name} is rented by {', '.join(one.name for one in of_it[:5])}; end that first: "
                f"whaleflux leases end {names.last(of_it[0].name)}",
                metadata={"name": request.name, "leases": str(len(of_it))},
            )
        marked = pb.Offer.FromString(entry.value)
        marked.last_change.CopyFrom(changes.deletion(self._clock.now()))
        try:
            unused = NoneCreated(keys.LEASES, leases.revision)
            await changes.delete(self._store, entry, marked.SerializeToString(), when=[unused])
        except ConditionFailed:
            raise Aborted(f"{request.name} changed or was rented while it was being deleted; read it again") from None

    async def _check(self, request: pb.CreateOfferRequest, offer: pb.Offer) -> None:
        seen = core_offer(offer)
        found = check(seen, offer.gpu_memory_bytes)
        found.text("request_id", request.request_id, 128)
        try:
            check_site_id("offer.site", *names.split(offer.site, "sites", field="offer.site"))
        except InvalidArgument as wrong:
            found.add("offer.site", wrong.violations[0].description)
        if offer.market not in MARKETS:
            found.add("offer.market", f"is not set; use {', '.join(MARKETS.values())}")
        await self._check_secret(offer, found)
        self._check_provider(offer, found)
        found.raise_if_any()

    async def _check_secret(self, offer: pb.Offer, found: Findings) -> None:
        if not offer.secret:
            return
        try:
            names.split(offer.secret, "secrets", field="offer.secret")
        except InvalidArgument as wrong:
            found.add("offer.secret", wrong.violations[0].description)
            return
        if problem := await self._secret_problem(offer.secret):
            found.add("offer.secret", problem)

    def _check_provider(self, offer: pb.Offer, found: Findings) -> None:
        kind = self._kinds.get(offer.provider)
        if kind is None:
            spoken = ", ".join(sorted(self._kinds)) or "none is set up: see the guide, rented machines"
            found.add("offer.provider", f"{offer.provider[:40]!r} is none of those this fleet speaks with: {spoken}")
            return
        for field, problem in kind.problems(core_offer(offer)).items():
            found.add(f"offer.{field}", problem)

    async def _made_before(self, offer: pb.Offer) -> pb.Offer:
        entry = await self._store.get(keys.of_name(keys.OFFERS, offer.name))
        there = offer_of(entry) if entry else pb.Offer()
        same = (there.request_fingerprint, there.owner) == (offer.request_fingerprint, offer.owner)
        if entry is None or not (offer.request_fingerprint and same):
            raise AlreadyExists("offer", offer.name, "choose another name, or forget it: whaleflux offers rm")
        return shown_offer(entry, self._now_s())

    def _now_s(self) -> float:
        return self._clock.now().timestamp()
