"""The fleet as plain data: GPUs, links, nodes, the topology tree, prices. Pure: no I/O, no protobuf."""

from whaleflux.fleet.model import (
    LEVELS,
    Disk,
    Gpu,
    Level,
    Link,
    LinkKind,
    Node,
    Price,
    PriceKind,
)

__all__ = ["LEVELS", "Disk", "Gpu", "Level", "Link", "LinkKind", "Node", "Price", "PriceKind"]
