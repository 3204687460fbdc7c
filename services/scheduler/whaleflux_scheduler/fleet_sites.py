"""Which sites the fleet has: its own, and those that machines which can be rented would join. Inventory knows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.nearness import near
from whaleflux.v1 import inventory_pb2 as ipb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_scheduler.inventory_lists import all_of

_PAGE, _MOST_NAMED = 500, 20


class FleetSites:
    """`inventory` None: nobody knows, and nothing is refused."""

    def __init__(self, inventory: InventoryServiceStub | None) -> None:
        self._inventory = inventory

    async def check(self, field: str, given: Sequence[str]) -> None:
        """Raises InvalidArgument for ids of sites that the fleet has not, UNAVAILABLE where inventory does not answer."""
        if not given or self._inventory is None:
            return
        known = {names.last(one) for one in await self._known(self._inventory)}
        if wrong := [_unknown(field, one, known) for one in given if one not in known]:
            raise InvalidArgument(wrong)

    async def _known(self, inventory: InventoryServiceStub) -> Iterable[str]:
        sites, unreadable = await all_of(inventory.ListSites, ipb.ListSitesRequest(page_size=_PAGE), "sites")
        offers, _ = await all_of(inventory.ListOffers, ipb.ListOffersRequest(page_size=_PAGE), "offers")
        return [*(one.name for one in sites), *unreadable, *(one.site for one in offers)]


def _unknown(field: str, site: str, known: set[str]) -> FieldViolation:
    meant = near(site, sorted(known))
    hint = f"did you mean {meant[0]!r}?" if meant else _choices(sorted(known))
    return FieldViolation(field, f"{site[:64]!r} is no site of the fleet; {hint}")


def _choices(known: Sequence[str]) -> str:
    if not known:
        return "it has none yet: leave it out, or let a machine join first"
    more = f" and {len(known) - _MOST_NAMED} more: whaleflux sites" if len(known) > _MOST_NAMED else ""
    return f"name some of {', '.join(known[:_MOST_NAMED])}{more}"
