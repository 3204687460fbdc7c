"""Which GPUs of a fleet, or of the catalogue, serve a model: every type and number that there is, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from whaleflux.fleet.gpu_types import GpuType
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.serving import Replica, Requests, replica

FLEET, LIST = "inventory", "list price"
_MOST_TP = 64


@dataclass(frozen=True, slots=True)
class ServingOffer:
    """GPUs of a type that may serve. `usd_per_gpu_hour` None: not known.

    `node_gpus`: of its largest node, which one replica stays in (0: as many as reach one another). `free_gpus` of one node now; None: nobody asks.
    """

    gpu: GpuType
    usd_per_gpu_hour: float | None
    price_source: str = ""
    site: str = ""
    node_gpus: int = 0
    free_gpus: int | None = None

    @staticmethod
    def listed(gpu: GpuType) -> ServingOffer:
        """As it stands in the catalogue."""
        price = gpu.list_price
        return ServingOffer(gpu, price.usd_per_gpu_hour if price else None, f"{LIST}: {price.source}" if price else "")


@dataclass(frozen=True, slots=True)
class Size:
    """A replica on GPUs that there are."""

    replica: Replica
    offer: ServingOffer

    @property
    def starts_now(self) -> bool:
        """Whether one node has so many of them free."""
        return self.offer.free_gpus is None or self.offer.free_gpus >= self.replica.tp

    @property
    def usd_per_hour(self) -> float | None:
        usd = self.offer.usd_per_gpu_hour
        return None if usd is None else usd * self.replica.tp


def serve(
    shape: ModelShape,
    offers: Sequence[ServingOffer],
    asked: Requests,
    weight_bytes: float = 2.0,
    gpus: int = 0,
    constants: Constants = FITTED,
) -> list[Size]:
    """Each offer with each power of two of its GPUs that divides the heads, at most those that reach one another; `gpus`: with so many alone.

    First what meets the objective, of that what can start now, of that the cheapest; where no price is known, the fewest GPUs. `weight_bytes` of a
    parameter: 2, or 1 in 8 bit. Raises InvalidArgument where a type's speed is not known or it has no 8 bit.
    """
    found, known = list[Size](), dict[tuple[str, int], Replica]()
    types, precision = {offer.gpu.name: offer.gpu for offer in offers}, "fp8" if weight_bytes < 2 else "bf16"
    machines = {name: Machine.of(gpu, precision) for name, gpu in types.items()}
    for offer in offers:
        machine = machines[offer.gpu.name]
        most = min(int(np.asarray(machine.fabric.island)), offer.node_gpus or _MOST_TP, _MOST_TP)
        for tp in (one for one in ([gpus] if gpus else _powers(most)) if one <= most and shape.heads % one == 0):
            if (offer.gpu.name, tp) not in known:  # sites differ in price alone
                known[offer.gpu.name, tp] = replica(shape, machine, tp, asked, weight_bytes, 1.0, constants)
            found.append(Size(_priced(known[offer.gpu.name, tp], offer.usd_per_gpu_hour), offer))
    return sorted(found, key=_rank)


def _priced(at_one_dollar: Replica, usd: float | None) -> Replica:
    per_million = at_one_dollar.usd_per_million_tokens
    return replace(at_one_dollar, usd_per_million_tokens=per_million * usd if per_million and usd else None)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def _rank(one: Size) -> tuple[bool, bool, bool, float, int, str, str]:
    made = one.replica
    cost = made.usd_per_million_tokens or np.inf
    return not made.meets, not made.fits, not one.starts_now, cost, made.tp, made.gpu, one.offer.site
