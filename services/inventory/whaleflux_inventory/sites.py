"""Sites: created by operators, or implied by the first token or node of theirs."""

from __future__ import annotations

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FieldViolation, InvalidArgument
from whaleflux.events.subjects import HUB
from whaleflux.reasons import What
from whaleflux.rpc import changes
from whaleflux.rpc.paging import Page, list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Present, Put, Store, Write
from whaleflux.v1 import inventory_pb2 as pb
from whaleflux_inventory import convert
from whaleflux_inventory.core.facts import Findings


def check_site_id(field: str, site_id: str) -> str:
    """A site's id; `hub` is taken by the control plane's own events."""
    if names.check_id(field, site_id) == HUB:
        raise InvalidArgument(FieldViolation(field, f"{HUB!r} names the control plane; choose another id"))
    return site_id


class Sites:
    """What operators do with sites."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock

    async def create(self, request: pb.CreateSiteRequest) -> pb.Site:
        """A new site; the same request again (by its request_id) answers with the site that it made."""
        site_id = check_site_id("site_id", request.site_id)
        found = Findings()
        found.text("site.display_name", request.site.display_name)
        found.text("request_id", request.request_id, 128)
        found.raise_if_any()
        site = pb.Site(
            name=names.site(site_id),
            display_name=request.site.display_name,
            request_fingerprint=convert.fingerprint(request.request_id, site_id, request.site),
        )
        site.create_time.FromDatetime(self._clock.now())
        site.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        key = keys.of_name(keys.SITES, site.name)
        try:
            await self._store.commit(Put(key, site.SerializeToString()), when=[Absent(key)])
        except ConditionFailed:
            entry = await self._store.get(key)
            there = convert.site_of(entry) if entry else pb.Site()
            if not site.request_fingerprint or there.request_fingerprint != site.request_fingerprint:
                raise AlreadyExists("site", site.name) from None
            return there
        entry = await self._store.get(key)
        return convert.site_of(entry) if entry else site

    async def page(self, request: pb.ListSitesRequest) -> Page[pb.Site]:
        """One page of sites."""
        size = page_size(request.page_size)
        return await list_page(self._store, keys.SITES, convert.site_of, size=size, token=request.page_token)

    async def implied(self, site: str) -> tuple[list[Write], list[Condition]]:
        """What a commit needs in addition so that `sites/{site}` exists after it."""
        check_site_id("site", *names.split(site, "sites", field="site"))
        key = keys.of_name(keys.SITES, site)
        if await self._store.get(key):
            return [], [Present(key)]
        record = pb.Site(name=site)
        record.create_time.FromDatetime(self._clock.now())
        record.last_change.CopyFrom(changes.asked(What.CREATED, self._clock.now()))
        return [Put(key, record.SerializeToString())], [Absent(key)]
