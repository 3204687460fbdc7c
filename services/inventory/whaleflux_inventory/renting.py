"""What inventory's settings say of renting: the kinds of providers, and the keeper of leases with all that it needs."""

from __future__ import annotations

from collections.abc import Mapping

from whaleflux import hostport
from whaleflux.clock import Clock
from whaleflux.rpc.pki import CertificateAuthority
from whaleflux.store.api import Store
from whaleflux.store.election import Leader
from whaleflux_inventory.lease_keeper import LeaseKeeper, Pace
from whaleflux_inventory.lease_launch import FrontDoor, Launching
from whaleflux_inventory.nodes import Dependencies
from whaleflux_inventory.provider_accounts import Accounts, Keys
from whaleflux_inventory.providers.api import ProviderKind
from whaleflux_inventory.providers.aws import AwsKind
from whaleflux_inventory.providers.command import CommandKind
from whaleflux_inventory.providers.rest import RestKind
from whaleflux_inventory.providers.simulated import SimulatedKind
from whaleflux_inventory.rented_nodes import InventoryNodes
from whaleflux_inventory.service import Renting, nodes_of
from whaleflux_inventory.settings import Settings


def renting_of(settings: Settings, authority: CertificateAuthority | None) -> Renting:
    """With whom it rents."""
    if not settings.rent_server:
        return Renting(_kinds(settings))
    if authority is None:
        return Renting(
            _kinds(settings),
            "this fleet rents nothing: its certificates are not made here, so that no machine could join",
        )
    return Renting(_kinds(settings), "")


def keeper_of(
    store: Store,
    clock: Clock,
    leader: Leader,
    settings: Settings,
    authority: CertificateAuthority | None,
    dependencies: Dependencies,
    keys: Keys,
) -> LeaseKeeper | None:
    """The keeper of leases while this process leads; None where nothing is rented."""
    if not settings.rent_server or authority is None:
        return None
    nodes = nodes_of(store, clock, dependencies, own_certificates=True)
    door = FrontDoor(str(hostport.parse(settings.rent_server, "rent_server")), settings.rent_server_name)
    return LeaseKeeper(
        store,
        clock,
        leader,
        Accounts(_kinds(settings), keys, clock),
        InventoryNodes(store, nodes, dependencies, leader.held),
        Launching(door, authority, settings.rent_silent_s),
        Pace(settings.rent_poll_s),
    )


def _kinds(settings: Settings) -> Mapping[str, ProviderKind]:
    kinds: dict[str, ProviderKind] = {"aws": AwsKind(), "rest": RestKind()}
    if settings.rent_commands is not None:
        kinds["command"] = CommandKind(settings.rent_commands)
    if settings.rent_simulated is not None:
        folder = settings.rent_simulated
        shared = {"WHALEFLUX_CHECKPOINT_ROOT": str(settings.rent_checkpoint_root or "")}
        kinds["simulated"] = SimulatedKind(folder, {key: value for key, value in shared.items() if value})
    return kinds
