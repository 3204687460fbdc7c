"""From the driver's product names to the names that jobs ask for ("H100-80GB")."""

from __future__ import annotations

import re

_GIB = 1 << 30
# Families of which several memory sizes are sold under one chip name: the size is part of the catalogue name.
_SIZED = frozenset({"A100", "H100", "V100", "A800", "H800", "GH200"})
_NOISE = re.compile(
    r"\b(NVIDIA|Tesla|Quadro|GeForce|Graphics|Device|SXM\d?|PCIe|NVL|HBM\d?e?|OEM|\d+\s?GB|\d+G)\b", re.IGNORECASE
)
_SIZE = re.compile(r"(\d+)\s?GB\b", re.IGNORECASE)


def catalogue_name(product: str, memory_bytes: int) -> str:
    """What jobs ask for: H100-80GB for "NVIDIA H100 80GB HBM3", RTX4090 for "NVIDIA GeForce RTX 4090"."""
    words = _NOISE.sub(" ", product.replace("-", " ")).split()
    family = "".join(words) or "UNKNOWN"
    if family not in _SIZED:
        return family
    named = _SIZE.search(product)
    size_gb = int(named.group(1)) if named else nominal_gb(memory_bytes)
    return f"{family}-{size_gb}GB"


def nominal_gb(memory_bytes: int) -> int:
    """The size on the box: drivers report a little less (reserved) or more (GiB) than the nominal gigabytes."""
    gib = memory_bytes / _GIB
    sizes = (8, 12, 16, 24, 32, 40, 48, 64, 80, 94, 96, 120, 141, 144, 180, 192)
    return min(sizes, key=lambda size: abs(size - gib))
