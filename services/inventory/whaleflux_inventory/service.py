"""How inventory's parts fit together, over whatever store and clock it is given."""

from __future__ import annotations

from whaleflux.clock import Clock
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store.api import Store
from whaleflux_inventory.datasets import Datasets, SecretProblem
from whaleflux_inventory.joining import Joining
from whaleflux_inventory.node_identities import NodeIdentities
from whaleflux_inventory.nodes import Dependencies, Nodes
from whaleflux_inventory.servicer import InventoryServicer
from whaleflux_inventory.sites import Sites


async def no_secrets(name: str) -> str:
    """What an inventory says of each secret that keeps none."""
    return "no secrets are kept here"


def assemble(
    store: Store,
    clock: Clock,
    authority: CertificateAuthority | None,
    dependencies: Dependencies,
    secret_problem: SecretProblem = no_secrets,
) -> InventoryServicer:
    """The servicer of one inventory."""
    sites = Sites(store, clock)
    identities = NodeIdentities(store, clock)
    nodes = Nodes(store, clock, sites, identities, dependencies, own_certificates=authority is not None)
    return InventoryServicer(
        store, sites, nodes, Joining(store, clock, sites, identities, authority), Datasets(store, clock, secret_problem)
    )
