"""The cluster of a job on real nodes, from what inventory knows of them: wiring, NICs, place in the tree."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.fleet.links import DEFAULT_BYTES_PER_S, Fabric
from whaleflux.fleet.model import LinkKind, Node
from whaleflux.fleet.wiring import Wiring, mask_of, wiring_of
from whaleflux.planning.cluster import THROUGH_HOST, Cluster, Host
from whaleflux.planning.machine import fabric_of


def cluster_of(parts: Sequence[tuple[Node, Sequence[int]]], fabric: Fabric | None = None) -> Cluster:
    """Of nodes with the driver's indices of the GPUs that the job has there, in the order in which `Cluster.position` counts them."""
    return Cluster.of([host_of(node, gpus) for node, gpus in parts], fabric)


def host_of(node: Node, gpus: Sequence[int]) -> Host:
    """A node's NICs together are known, not each: a GPU's part is its share of them, so that a broken rail makes all a bit slower."""
    place = {gpu.index: at for at, gpu in enumerate(node.gpus)}
    positions = [place[index] for index in gpus]
    wiring = wiring_of(node)
    island_of = {
        at: number for number, mask in enumerate(wiring.islands) for at in range(wiring.size) if mask >> at & 1
    }
    network = node.network_bytes_per_s or DEFAULT_BYTES_PER_S[LinkKind.ETHERNET]
    return Host(
        path=(node.leaf, node.spine, node.zone, node.site),
        islands=tuple(island_of[at] for at in positions),
        nics_bytes_per_s=(network / max(1, wiring.size),) * len(positions),
        ring_bytes_per_s=_ring(wiring, positions, island_of),
        switch_bytes_per_s=_switch(node),
    )


def _ring(wiring: Wiring, positions: Sequence[int], island_of: dict[int, int]) -> float:
    """The slowest ring of all its islands that have several of these GPUs."""
    parts = [[at for at in positions if island_of[at] == island] for island in set(island_of.values())]
    rates = [wiring.ring_bytes_per_s(mask_of(part)) for part in parts if len(part) > 1]
    return min(rates, default=THROUGH_HOST)


def _switch(node: Node) -> float:
    """Of its GPUs' type; 0 where the catalogue does not know it."""
    known = CATALOGUE.types.get(node.gpus[0].model) if node.gpus else None
    if known is None or known.speed is None:
        return 0.0
    return float(fabric_of(known.speed).switch_bytes_per_s)
