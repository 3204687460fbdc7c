"""How inventory's parts fit together, over whatever store and clock it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from whaleflux.clock import Clock
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store.api import Store
from whaleflux.trust.ownership import OPEN, Access
from whaleflux_inventory.data_quotas import DataQuotas, HeldBytes, nothing_held
from whaleflux_inventory.datasets import Datasets, SecretProblem
from whaleflux_inventory.joining import Joining
from whaleflux_inventory.leases import Leases
from whaleflux_inventory.node_identities import NodeIdentities
from whaleflux_inventory.nodes import Dependencies, Nodes
from whaleflux_inventory.offers import Offers
from whaleflux_inventory.providers.api import ProviderKind
from whaleflux_inventory.servicer import InventoryServicer
from whaleflux_inventory.sites import Sites


async def no_secrets(name: str) -> str:
    """What an inventory says of each secret that keeps none."""
    return "no secrets are kept here"


@dataclass(frozen=True, slots=True)
class Renting:
    """With whom this fleet rents, and why it cannot ("" where it can)."""

    kinds: Mapping[str, ProviderKind] = field(default_factory=dict)
    why_not: str = (
        "this fleet rents nothing: inventory was not told where rented machines find the front door (rent_server)"
    )


def assemble(
    store: Store,
    clock: Clock,
    authority: CertificateAuthority | None,
    dependencies: Dependencies,
    secret_problem: SecretProblem = no_secrets,
    renting: Renting = Renting(),
    *,
    queue_access: Callable[[str], Access] = lambda _: OPEN,
    data_held: HeldBytes = nothing_held,
) -> InventoryServicer:
    """The servicer of one inventory."""
    sites = Sites(store, clock)
    nodes = nodes_of(store, clock, dependencies, own_certificates=authority is not None)
    return InventoryServicer(
        store,
        sites,
        nodes,
        Joining(store, clock, sites, NodeIdentities(store, clock), authority),
        Datasets(store, clock, secret_problem, DataQuotas(store, queue_access, data_held)),
        Offers(store, clock, renting.kinds, secret_problem),
        Leases(store, clock, renting.why_not),
    )


def nodes_of(store: Store, clock: Clock, dependencies: Dependencies, *, own_certificates: bool) -> Nodes:
    """What is done to nodes, for whoever does it."""
    identities = NodeIdentities(store, clock)
    return Nodes(store, clock, Sites(store, clock), identities, dependencies, own_certificates=own_certificates)
