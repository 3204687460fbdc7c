"""How inventory's parts fit together, over whatever store and clock it is given."""

from __future__ import annotations

from whaleflux.clock import Clock
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store.api import Store
from whaleflux_inventory.datasets import Datasets
from whaleflux_inventory.joining import Joining
from whaleflux_inventory.nodes import Nodes, Surroundings
from whaleflux_inventory.servicer import InventoryServicer
from whaleflux_inventory.sites import Sites


def assemble(
    store: Store, clock: Clock, authority: CertificateAuthority | None, around: Surroundings
) -> InventoryServicer:
    """The servicer of one inventory."""
    sites = Sites(store, clock)
    nodes = Nodes(store, clock, sites, around)
    return InventoryServicer(store, sites, nodes, Joining(store, clock, sites, authority), Datasets(store, clock))
