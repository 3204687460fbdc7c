"""GPUs and the tree of links between them, as the cost model sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.gpu_speed import GpuSpeed
from whaleflux.fleet.gpu_types import CATALOGUE, GpuType
from whaleflux.planning.arrays import Array, Value

# What a ring of NCCL reaches of a GPU's NVLink in one direction: 363-367 of 450 on H200, 231 of 300 on A100, 674 of 900 on B200 (measured,
# ml-engineering and vTrain); of PCIe, one direction, 26 of 31 through a switch. Facts, not fitted.
RING_SHARE_NVLINK = {3: 0.77, 4: 0.81, 5: 0.75}
_RING_SHARE_PCIE = 0.8
# NVLS (the switch adds up): from so many GPUs of an island up NCCL takes it for all-reduce, bus bandwidth against the wire's.
NVLS_FROM_GPUS, NVLS_SHARE = 5, {4: 1.05, 5: 0.93}
# FlashAttention-2, written for Ampere, reaches 225 TFLOP/s on an A100 and 335 on an H100 (Dao 2023), of 271 and 794 that any multiplication does.
_OLD_ATTENTION = (335 / 794.5) / (225 / 271.2)
_USUAL_NODE_GPUS = 8
_HOST_MEMORY_BYTES_PER_S = 13e9  # peers that cannot copy to one another directly: RTX 4090, L40S


@dataclass(frozen=True, slots=True)
class Tier:
    """A level of the tree above islands: domains of `gpus` GPUs; `bytes_per_s` is what one GPU's share of the way out of its domain carries.

    A node of 8 GPUs with 8 NICs of 400 Gb/s: Tier(8, 50e9). A leaf of 4 such nodes, oversubscribed 2:1: Tier(32, 25e9). A rail that is broken
    lowers the share; a site's link to others divided by its GPUs is the last tier.
    """

    gpus: Value
    bytes_per_s: Value
    hop_s: Value = 14e-6  # NCCL's table: one network hop, Simple protocol


@dataclass(frozen=True, slots=True)
class Fabric:
    """Islands, and the levels above them.

    An island is the GPUs that reach one another by NVLink or PCIe; `island_bytes_per_s` is a ring's bus bandwidth there, `switch_bytes_per_s`
    that of an all-reduce in the switches (0: none). `tiers` go from the node outwards.
    """

    island: Value
    island_bytes_per_s: Value
    tiers: tuple[Tier, ...]
    switch_bytes_per_s: Value = 0.0
    hop_s: Value = 3.4e-6

    def links(self, size: Array, stride: Array) -> Links:
        """Of groups of `size` ranks that are `stride` ranks apart, where ranks lie on GPUs in their order."""
        inside = _within(self.island, size, stride)
        network = np.full(np.shape(inside), np.inf)
        nodes, hop_s = np.ones(np.shape(inside)), np.zeros(np.shape(inside))
        for tier in self.tiers:
            within = _within(tier.gpus, size, stride)
            leaves = size > within
            network = np.where(leaves, np.minimum(network, within * tier.bytes_per_s), network)
            nodes = np.where(leaves & (nodes == 1), size / within, nodes)
            hop_s = np.where(leaves, np.maximum(hop_s, tier.hop_s), hop_s)
        return Links(
            size=np.asarray(size, dtype=np.float64),
            island_bytes_per_s=np.where(inside > 1, self.island_bytes_per_s, np.inf),
            network_bytes_per_s=network,
            switch_bytes_per_s=np.where((inside >= size) & (size >= NVLS_FROM_GPUS), self.switch_bytes_per_s, 0.0),
            nodes=nodes,
            inner_hop_s=np.where(inside > 1, self.hop_s, 0.0),
            outer_hop_s=hop_s,
        )


@dataclass(frozen=True, slots=True)
class Links:
    """What a communicator runs over.

    Its ranks, the rate of a ring within islands and between nodes (infinite where it does not go there; all of
    a node's ranks together), that of the switches (0: none), how many nodes it spans, what a hop costs.

    This is all that the cost model asks of a placement: whoever has a rank map of its own (a fleet that is not symmetrical) makes these of it.
    """

    size: Array
    island_bytes_per_s: Array
    network_bytes_per_s: Array
    switch_bytes_per_s: Array
    nodes: Array
    inner_hop_s: Array
    outer_hop_s: Array


def _within(domain: Value, size: Value, stride: Value) -> Array:
    """How many ranks of a group lie in one domain of so many GPUs."""
    return np.asarray(np.clip(np.floor(np.asarray(domain, dtype=np.float64) / stride), 1.0, size), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of GPU in one kind of fabric. Rates are the best that was measured of any kernel, per GPU and second.

    `flops` of the linear layers in the precision of training, `attention_flops` in 16 bit. `memory_bytes` as NVML reports them;
    `reserved_bytes` of them are the driver's, the communicators' and the allocator's.
    """

    name: str
    flops: Value
    attention_flops: Value
    memory_bytes_per_s: Value
    memory_bytes: Value
    fabric: Fabric
    reserved_bytes: Value = 6e9

    @property
    def usable_bytes(self) -> Array:
        """For weights, gradients, states and activations."""
        return np.asarray(self.memory_bytes, dtype=np.float64) - self.reserved_bytes

    @staticmethod
    def of(
        gpu: GpuType, precision: str = "bf16", fabric: Fabric | None = None, *, old_attention: bool = False
    ) -> Machine:
        """A type of the catalogue. Raises InvalidArgument where its speed is not known, or it has no such precision.

        `old_attention`: kernels as FlashAttention-2's, written for Ampere, which reach less of what came after.
        """
        speed = speed_of(gpu)
        if wrong := lacks_precision(gpu, precision):
            raise InvalidArgument(FieldViolation("--precision", wrong))
        slower = _OLD_ATTENTION if old_attention and gpu.compute_capability >= (9, 0) else 1.0
        return Machine(
            gpu.name,
            speed.best_flops(precision),
            slower * speed.best_flops("bf16"),
            speed.memory_bytes_per_s,
            speed.nvml_bytes,
            fabric or fabric_of(speed),
            reserved_bytes(speed.nvml_bytes),
        )


def reserved_bytes(nvml_bytes: float, context_bytes: float = 0.65e9) -> float:
    """What training cannot have of a GPU of so much memory.

    `context_bytes` of an idle context (as measured on H200), buffers of communicators (2 %, at most 1 GB), and 3 % that the allocator cannot use.
    """
    return context_bytes + min(1e9, 0.02 * nvml_bytes) + 0.03 * nvml_bytes


def lacks_precision(gpu: GpuType, precision: str) -> str:
    """Why it cannot train in that precision, with types that can; "" where it can."""
    if precision in speed_of(gpu).flops:
        return ""
    have = [one.name for one in CATALOGUE.types.values() if one.speed and precision in one.speed.flops]
    return f"{precision}: the {gpu.name} has none; take bf16, or a type that has it: {', '.join(have)}"


def speed_of(gpu: GpuType) -> GpuSpeed:
    """Raises InvalidArgument where the catalogue does not know it."""
    if gpu.speed is None:
        raise InvalidArgument(
            FieldViolation("gpu", f"how fast a {gpu.name} is, the catalogue does not know; take another type")
        )
    return gpu.speed


def fabric_of(speed: GpuSpeed, nic_bytes_per_s: float = 0.0, node_gpus: int = 0) -> Fabric:
    """Nodes of `node_gpus` GPUs (0: nobody said; as many as is usual) with a NIC of that rate for each (0: the usual one of its generation).

    Above them is a fabric that blocks nothing. NVLink ends at the node, but where its domain is of many trays.
    """
    nic = nic_bytes_per_s or speed.nic_bytes_per_s
    if speed.nvlink_generation and speed.nvlink_domain > 1:
        wire, generation = speed.nvlink_bytes_per_s, speed.nvlink_generation
        ring = wire * RING_SHARE_NVLINK.get(generation, 0.75)
        switch = wire * NVLS_SHARE.get(generation, 0.0)
        domain = speed.nvlink_domain
        island = min(domain, node_gpus or domain) if domain <= _USUAL_NODE_GPUS else domain
        return Fabric(island, ring, (Tier(max(island, node_gpus or _USUAL_NODE_GPUS), nic),), switch)
    ring = _RING_SHARE_PCIE * speed.pcie_bytes_per_s if speed.peer_copies else _HOST_MEMORY_BYTES_PER_S
    node = node_gpus or _USUAL_NODE_GPUS
    return Fabric(node, ring, (Tier(node, nic),), hop_s=5.7e-6)
