"""Small fleets for tests of placement."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from whaleflux.fleet import Gpu, Level, Link, LinkKind, Node, Price

GB = 10**9
__all__ = ["GB", "Level", "node", "nodes", "nvlink"]


def nvlink(*islands: Iterable[int], bandwidth: float = 347e9) -> tuple[Link, ...]:
    return tuple(
        Link(a, b, LinkKind.NVLINK, bandwidth) for island in islands for a, b in combinations(sorted(island), 2)
    )


def node(
    name: str,
    *,
    model: str = "H100-80GB",
    gpus: int = 8,
    memory: int = 80 * GB,
    links: tuple[Link, ...] | None = None,
    network: float = 400e9,
    usd: float = 2.0,
    site: str = "",
    leaf: str = "",
    spine: str = "",
    **more: object,
) -> Node:
    """`name` "s/p/l/n" is site s, spine p, leaf l, node n unless they are given."""
    parts = name.split("/")
    if len(parts) == 4:
        site, spine, leaf, name = parts
    return Node(
        name=f"sites/{site or 'a'}/nodes/{'-'.join(parts) if len(parts) == 4 else name}",
        site=site or "a",
        gpus=tuple(Gpu(i, f"{name}-{i}", model, memory, (9, 0)) for i in range(gpus)),
        links=nvlink(range(gpus)) if links is None else links,
        spine=spine,
        leaf=leaf,
        network_bytes_per_s=network,
        price=Price(usd_per_gpu_hour=usd),
        cpu_millicores=96_000,
        memory_bytes=1000 * GB,
        **more,  # type: ignore[arg-type]
    )


def nodes(sites: int = 1, spines: int = 2, leaves: int = 4, per_leaf: int = 4, **more: object) -> list[Node]:
    return [
        node(f"s{s}/p{p}/l{l}/n{n}", **more)  # type: ignore[arg-type]
        for s in range(sites)
        for p in range(spines)
        for l in range(leaves)
        for n in range(per_leaf)
    ]
