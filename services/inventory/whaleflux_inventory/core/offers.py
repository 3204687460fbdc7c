"""Offers: machines that can be rented, and how far each is believed to have one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from whaleflux_inventory.core.lease_rules import Terms

RECOVERY_S = 600.0  # after one refusal trust is whole again; twice as long after each further one in a row
MOST_DOUBLINGS = 4
_WHERE = ("command", "service", "url")  # options that say whom an account is with
TRUSTED = 0.5  # offers below are asked only when none above is left


@dataclass(frozen=True, slots=True)
class Offer:
    """One offer as its record says. `secret`: with the provider's keys, and `owner` who may use it; `refused_s`: Unix seconds, 0.0 never."""

    name: str
    provider: str
    machine_type: str
    site: str
    terms: Terms
    gpu_type: str = ""
    gpus: int = 1
    region: str = ""
    zone: str = ""
    market: str = "on_demand"
    max_machines: int = 1
    secret: str = ""
    owner: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    refused_s: float = 0.0
    refusals: int = 0

    @property
    def account(self) -> tuple[str, str, str]:
        """Offers of one account share its list of machines and its limits of calls. A key of `rest` is for all regions."""
        region = "" if self.provider == "rest" else self.region
        return self.provider, region, "|".join([self.secret, *(self.options.get(key, "") for key in _WHERE)])

    @property
    def usd_per_gpu_hour(self) -> float:
        return self.terms.usd_per_hour / max(self.gpus, 1)


def trust(offer: Offer, now_s: float) -> float:
    """How far it is believed to have a machine: 0 right after a refusal, growing evenly to 1."""
    if not offer.refusals:
        return 1.0
    recovery_s = RECOVERY_S * 2.0 ** min(offer.refusals - 1, MOST_DOUBLINGS)
    return min(1.0, max(0.0, (now_s - offer.refused_s) / recovery_s))


def choose(offers: Iterable[Offer], rented: Mapping[str, int], now_s: float) -> Offer | None:
    """The first in the given order that is trusted and has room below its `max_machines`; None: there is none."""
    for offer in offers:
        if rented.get(offer.name, 0) < offer.max_machines and trust(offer, now_s) >= TRUSTED:
            return offer
    return None
