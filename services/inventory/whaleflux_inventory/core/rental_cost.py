"""What a rented machine costs: time from the call on, in whole billing units. Pure."""

from __future__ import annotations

import math
from typing import Protocol

HOUR_S = 3600.0
_ROUNDING = 1e-9  # of a unit: what floating point adds to a time that ends on one


class Priced(Protocol):
    """A price per machine and hour, US dollars, and the unit of time that is paid whole, seconds."""

    @property
    def usd_per_hour(self) -> float: ...
    @property
    def billing_unit_s(self) -> float: ...


def paid_s(used_s: float, terms: Priced) -> float:
    """Seconds that are paid for when `used_s` are used: at least one unit."""
    units = math.ceil(max(used_s, 0.0) / terms.billing_unit_s - _ROUNDING)
    return max(units, 1) * terms.billing_unit_s


def paid_usd(used_s: float, terms: Priced) -> float:
    """US dollars for `used_s` seconds of a machine."""
    return paid_s(used_s, terms) / HOUR_S * terms.usd_per_hour


def end_by_cap_s(begun_s: float, cap_usd: float, terms: Priced) -> float:
    """The last moment until which a machine begun at `begun_s` costs no more than `cap_usd`."""
    if terms.usd_per_hour <= 0:
        return math.inf
    units = math.floor(cap_usd * HOUR_S / terms.usd_per_hour / terms.billing_unit_s + _ROUNDING)
    return begun_s + max(units, 0) * terms.billing_unit_s
