"""What FOCUS 1.2 demands of a charge, as far as our columns go: which may be null, which values there are, what multiplies to what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from whaleflux_console.core.focus import COLUMNS, DECIMALS, QUANTITIES, UNIT_PRICES, X_COSTS

NEVER_NULL = (
    "BilledCost", "BillingAccountId", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart", "ChargeCategory",
    "ChargeFrequency", "ChargePeriodEnd", "ChargePeriodStart", "ContractedCost", "EffectiveCost", "InvoiceIssuerName", "ListCost",
    "ProviderName", "PublisherName", "ServiceCategory", "ServiceName", "ServiceSubcategory",
)  # fmt: skip
VALUES: Mapping[str, frozenset[str]] = {
    "BillingCurrency": frozenset({"USD"}),
    "CapacityReservationStatus": frozenset({"Used", "Unused"}),
    "ChargeCategory": frozenset({"Usage", "Purchase", "Tax", "Credit", "Adjustment"}),
    "ChargeClass": frozenset({"Correction"}),
    "ChargeFrequency": frozenset({"One-Time", "Recurring", "Usage-Based"}),
    "CommitmentDiscountCategory": frozenset({"Spend", "Usage"}),
    "CommitmentDiscountStatus": frozenset({"Used", "Unused"}),
    "PricingCategory": frozenset({"Standard", "Dynamic", "Committed", "Other"}),
    "ServiceCategory": frozenset({"Compute", "AI and Machine Learning"}),
}
_TOGETHER = (  # null in one exactly when null in the other
    ("CapacityReservationId", "CapacityReservationStatus"),
    ("CommitmentDiscountId", "CommitmentDiscountStatus"),
    ("CommitmentDiscountId", "CommitmentDiscountCategory"),
    ("CommitmentDiscountQuantity", "CommitmentDiscountUnit"),
    ("ConsumedQuantity", "ConsumedUnit"),
    ("PricingQuantity", "PricingUnit"),
    ("SubAccountId", "SubAccountType"),
)
_PAIRS = (("ListUnitPrice", "ListCost"), ("ContractedUnitPrice", "ContractedCost"))
_TIMES = ("BillingPeriodEnd", "BillingPeriodStart", "ChargePeriodEnd", "ChargePeriodStart")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_HALF_A_MICRO = Decimal(5).scaleb(-7)


def faults(charge: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong with a charge, naming its column; nothing when it is right."""
    if tuple(charge) != COLUMNS:
        yield f"columns: {sorted(set(COLUMNS) ^ set(charge)) or 'their order'}"
        return
    yield from _nulls(charge)
    yield from _values(charge)
    yield from _quantities(charge)
    yield from _arithmetic(charge)


def _nulls(charge: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name} is null" for name in NEVER_NULL if charge[name] is None)
    yield from (f"{a} and {b}: one is null" for a, b in _TOGETHER if (charge[a] is None) != (charge[b] is None))


def _values(charge: Mapping[str, Any]) -> Iterator[str]:
    for name, allowed in VALUES.items():
        if charge[name] is not None and charge[name] not in allowed:
            yield f"{name} is {charge[name]}: none of {', '.join(sorted(allowed))}"
    yield from (f"{name} is no time in UTC: {charge[name]}" for name in _TIMES if not _TIME.fullmatch(charge[name]))
    for first, second in (("BillingPeriodStart", "BillingPeriodEnd"), ("ChargePeriodStart", "ChargePeriodEnd")):
        if charge[first] >= charge[second]:
            yield f"{second} is not after {first}"
    numbers = (*DECIMALS, *QUANTITIES, *UNIT_PRICES)
    yield from (f"{name} is no decimal" for name in numbers if not isinstance(charge[name], Decimal | None))


def _quantities(charge: Mapping[str, Any]) -> Iterator[str]:
    usage, corrects = charge["ChargeCategory"] == "Usage", charge["ChargeClass"] is not None
    unused = charge["CommitmentDiscountStatus"] == "Unused"
    if usage and not corrects and charge["PricingQuantity"] is None:
        yield "PricingQuantity is null on usage"
    if usage and not corrects and charge["PricingCategory"] is None:
        yield "PricingCategory is null on usage"
    if (not usage or unused) and charge["ConsumedQuantity"] is not None:
        yield "ConsumedQuantity is not null where nothing was consumed"
    if usage and not corrects and not unused and charge["ConsumedQuantity"] is None:
        yield "ConsumedQuantity is null on usage"
    if usage and charge["ResourceId"] is not None and charge["CapacityReservationStatus"] is None:
        yield "CapacityReservationStatus is null on usage of reserved capacity"


def _arithmetic(charge: Mapping[str, Any]) -> Iterator[str]:
    for price, cost in _PAIRS:
        if charge[price] is not None and charge["PricingQuantity"] is not None:
            product = charge[price] * charge["PricingQuantity"]
            if abs(product - charge[cost]) > _HALF_A_MICRO:
                yield f"PricingQuantity x {price} is {product}, not {cost} {charge[cost]}"
    if sum(charge[name] for name in X_COSTS) != charge["BilledCost"]:
        yield "the classes' costs do not sum to BilledCost"
