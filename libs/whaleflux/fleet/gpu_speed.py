"""How fast GPUs are, as planning needs it: data sheets, and what was measured of them.

Sources: NVIDIA's data sheets (dense rates); memory as NVML reports it (H200 measured, others as nvidia-smi shows them); the best matrix
multiplications that were measured, stas00/ml-engineering. What a GPU's type is called and which it is, stands in `gpu_types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GpuSpeed:
    """What one GPU does in a second at most, and what it holds. Rates are those of data sheets, dense (without sparsity), in one direction.

    `flops` by precision; `best` is what the best matrix multiplication was measured to reach (stas00/ml-engineering, "maximum achievable matmul
    FLOPS"); precisions without are taken for 80 % of the data sheet. `nvml_bytes` is what the driver reports, less than the label.
    `nic_bytes_per_s` is what clusters of the type usually have for each GPU.
    """

    nvml_bytes: int
    memory_bytes_per_s: float
    flops: Mapping[str, float]
    best: Mapping[str, float] = field(default_factory=dict)
    nvlink_generation: int = 0
    nvlink_bytes_per_s: float = 0.0
    nvlink_domain: int = 1  # GPUs that reach one another by it
    pcie_bytes_per_s: float = 63e9
    nic_bytes_per_s: float = 50e9
    peer_copies: bool = True  # False: copies between GPUs go through the host's memory

    def best_flops(self, precision: str) -> float:
        """In operations per second; of the next wider precision where the GPU has no faster way. Raises ValueError for one that nobody knows."""
        has = self._has(precision)
        return self.best.get(has, 0.8 * self.flops[has])

    def peak_flops(self, precision: str) -> float:
        """The data sheet's, against which the share that training uses (MFU) is counted."""
        return self.flops[self._has(precision)]

    def _has(self, precision: str) -> str:
        narrowest = PRECISIONS.index(precision)
        return next(one for one in reversed(PRECISIONS[: narrowest + 1]) if one in self.flops)


PRECISIONS = ("bf16", "fp8", "fp4")  # from wide to narrow; every GPU here has the first


def hopper(nvml_bytes: int, memory_bytes_per_s: float) -> GpuSpeed:
    """SXM cards of 700 W."""
    return GpuSpeed(
        nvml_bytes,
        memory_bytes_per_s,
        {"bf16": 989e12, "fp8": 1979e12},
        {"bf16": 794.5e12, "fp8": 1402.6e12},
        4,
        450e9,
        8,
    )


def ampere(nvml_bytes: int, memory_bytes_per_s: float) -> GpuSpeed:
    """SXM cards of 400 W."""
    return GpuSpeed(
        nvml_bytes,
        memory_bytes_per_s,
        {"bf16": 312e12},
        {"bf16": 271.2e12},
        3,
        300e9,
        8,
        pcie_bytes_per_s=31e9,
        nic_bytes_per_s=25e9,
    )


def blackwell(nvml_bytes: int, bf16: float, best_bf16: float, best_fp8: float, fp4: float, domain: int) -> GpuSpeed:
    return GpuSpeed(
        nvml_bytes,
        8e12,
        {"bf16": bf16, "fp8": 2 * bf16, "fp4": fp4},
        {"bf16": best_bf16, "fp8": best_fp8},
        5,
        900e9,
        domain,
    )


def without_nvlink(
    nvml_bytes: int, memory_bytes_per_s: float, bf16: float, fp8: float, *, pcie: float = 31e9, peers: bool
) -> GpuSpeed:
    flops = {"bf16": bf16, "fp8": fp8} if fp8 else {"bf16": bf16}
    return GpuSpeed(
        nvml_bytes, memory_bytes_per_s, flops, pcie_bytes_per_s=pcie, nic_bytes_per_s=12.5e9, peer_copies=peers
    )
