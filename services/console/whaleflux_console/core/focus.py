"""Ledger rows as FOCUS 1.2 charges (FinOps Open Cost and Usage Specification): one charge per row, money exact to the micro-dollar.

An hour that was closed again gives its first version as it was, and behind it what the later ones changed, as corrections: so whoever
loaded the first adds the corrections alone, and all of it sums to the bill.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Context, Decimal
from itertools import pairwise
from typing import Any

from whaleflux_console.core.facts import HOUR_MS, PriceKind
from whaleflux_console.core.forecast import month_of
from whaleflux_console.core.rows import CLASSES, LedgerRow

VERSION = "1.2"
UNIT = "GPU-Hours"
_MICRO, _QUANTITY = Decimal(1).scaleb(-6), Decimal(1).scaleb(-12)  # of a dollar; of a GPU-hour
_EXACT = Context(prec=50, rounding=ROUND_HALF_EVEN)
X_COSTS = tuple("x_" + "".join(map(str.capitalize, kind.split("_"))) + "Cost" for kind in CLASSES)
DECIMALS = ("BilledCost", "ContractedCost", "EffectiveCost", "ListCost", *X_COSTS)
QUANTITIES = ("CommitmentDiscountQuantity", "ConsumedQuantity", "PricingQuantity")
UNIT_PRICES = ("ContractedUnitPrice", "ListUnitPrice")
COLUMNS = (
    "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd", "BillingPeriodStart",
    "CapacityReservationId", "CapacityReservationStatus", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargeFrequency",
    "ChargePeriodEnd", "ChargePeriodStart", "CommitmentDiscountCategory", "CommitmentDiscountId", "CommitmentDiscountName",
    "CommitmentDiscountQuantity", "CommitmentDiscountStatus", "CommitmentDiscountType", "CommitmentDiscountUnit", "ConsumedQuantity",
    "ConsumedUnit", "ContractedCost", "ContractedUnitPrice", "EffectiveCost", "InvoiceIssuerName", "ListCost", "ListUnitPrice",
    "PricingCategory", "PricingCurrency", "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName", "RegionId", "RegionName",
    "ResourceId", "ResourceName", "ResourceType", "ServiceCategory", "ServiceName", "ServiceSubcategory", "SkuId", "SkuMeter",
    "SkuPriceId", "SubAccountId", "SubAccountName", "SubAccountType", "Tags",
    "x_GpuClass", "x_JobId", "x_Attempt", "x_ModelName", "x_User", "x_Basis", "x_Adjustment", "x_HourVersion", *X_COSTS,
)  # fmt: skip
_CATEGORY = {
    PriceKind.ON_DEMAND: "Standard",
    PriceKind.OWNED: "Standard",
    PriceKind.SPOT: "Dynamic",
    PriceKind.RESERVED: "Committed",
}
_US = "WhaleFlux"


def charges(versions: Sequence[Sequence[LedgerRow]], account: str) -> Iterator[dict[str, Any]]:
    """The charges of one hour. `versions`: its rows as of each version that is kept, oldest first; columns are COLUMNS, null is None."""
    if not versions:
        return
    for row in versions[0]:
        yield charge(row, account)
    for before, after in pairwise(versions):
        for row in changes(before, after):
            yield charge(row, account, correction=True)


def changes(before: Iterable[LedgerRow], after: Sequence[LedgerRow]) -> Iterator[LedgerRow]:
    """What the later version has more than the one before (or less), row by row; `before` and these sum to `after`."""
    left = dict(_summed(before))
    for key, row in _summed(after):
        old = left.pop(key, None)
        yield from _unless_nothing(_minus(row, old) if old else row)
    version = max((row.version for row in after), default=0)
    for old in left.values():
        taken = replace(old, gpu_ms=0, bill_micros=0, micros=(0,) * len(CLASSES), version=version or old.version + 1)
        yield from _unless_nothing(_minus(taken, old))


def charge(row: LedgerRow, account: str, *, correction: bool = False) -> dict[str, Any]:
    """One row as a charge. `account`: whose fleet it is, as the reader's other bills name it."""
    found: dict[str, Any] = dict.fromkeys(COLUMNS)
    found |= _when(row.hour_ms) | _who(row, account) | _what(row) | _money(row)
    found["ChargeCategory"] = "Usage" if not row.adjustment else "Credit" if row.bill_micros < 0 else "Adjustment"
    found["ChargeClass"] = "Correction" if correction else None
    if not row.adjustment:
        found |= _priced(row, correction=correction) | _reserved(row, correction=correction)
    return found


def _summed(rows: Iterable[LedgerRow]) -> Iterator[tuple[tuple[Any, ...], LedgerRow]]:
    """Rows by what tells them apart within an hour; those that nothing tells apart are one."""
    found: dict[tuple[Any, ...], LedgerRow] = {}
    for row in rows:
        key: tuple[Any, ...] = (
            row.card,
            row.node,
            row.site,
            row.gpu_class,
            row.uid,
            row.job,
            row.attempt,
            row.adjustment,
        )
        key = (*key, row.price_kind, row.price_source, row.micros_per_hour)
        found[key] = _plus(found[key], row) if key in found else row
    yield from found.items()


def _plus(one: LedgerRow, other: LedgerRow, sign: int = 1) -> LedgerRow:
    return replace(
        one,
        gpu_ms=one.gpu_ms + sign * other.gpu_ms,
        bill_micros=one.bill_micros + sign * other.bill_micros,
        micros=tuple(a + sign * b for a, b in zip(one.micros, other.micros, strict=True)),
    )


def _minus(one: LedgerRow, other: LedgerRow) -> LedgerRow:
    return _plus(one, other, -1)


def _unless_nothing(row: LedgerRow) -> Iterator[LedgerRow]:
    if row.bill_micros or row.gpu_ms or any(row.micros):
        yield row


def _when(hour_ms: int) -> dict[str, str]:
    at = datetime.fromtimestamp(hour_ms / 1000, UTC)
    month, following = month_of(at)
    ends = datetime.fromtimestamp((hour_ms + HOUR_MS) / 1000, UTC)
    named = {
        "ChargePeriodStart": at,
        "ChargePeriodEnd": ends,
        "BillingPeriodStart": month,
        "BillingPeriodEnd": following,
    }
    return {name: f"{value:%Y-%m-%dT%H:%M:%SZ}" for name, value in named.items()}


def _who(row: LedgerRow, account: str) -> dict[str, Any]:
    tags = {"job": row.job, "model": row.model, "user": row.user}
    return {
        "BillingAccountId": account,
        "BillingAccountName": account,
        "InvoiceIssuerName": _US,
        "ProviderName": _US,
        "PublisherName": _US,
        "SubAccountId": row.queue or None,
        "SubAccountName": row.queue.removeprefix("queues/") or None,
        "SubAccountType": "queue" if row.queue else None,
        "Tags": json.dumps({name: value for name, value in tags.items() if value}, sort_keys=True),
    }


def _what(row: LedgerRow) -> dict[str, Any]:
    service = ("Compute", "Other (Compute)")
    if row.job:
        service = ("AI and Machine Learning", "Generative AI" if row.model else "Machine Learning")
    return {
        "ChargeDescription": f"{row.adjustment}: {row.note}" if row.adjustment else f"{row.gpu_class} on {row.node}",
        "ChargeFrequency": "One-Time" if row.adjustment else "Usage-Based",
        "RegionId": row.site or None,
        "RegionName": row.site or None,
        "ResourceId": row.card or None,
        "ResourceName": row.node or None,
        "ResourceType": "GPU" if row.card else None,
        "ServiceCategory": service[0],
        "ServiceSubcategory": service[1],
        "ServiceName": "GPU",
        "SkuId": None if row.adjustment else row.gpu_class or None,
        "x_GpuClass": row.gpu_class or None,
        "x_JobId": row.job or None,
        "x_Attempt": row.attempt or None,
        "x_ModelName": row.model or None,
        "x_User": row.user or None,
        "x_Basis": row.basis.value,
        "x_Adjustment": row.adjustment or None,
        "x_HourVersion": row.version,
    }


def _money(row: LedgerRow) -> dict[str, Any]:
    """One price is list price, contract and what counts: a fleet has no discounts beside its prices."""
    cost = dollars(row.bill_micros)
    costs = dict.fromkeys(("BilledCost", "ContractedCost", "EffectiveCost", "ListCost"), cost)
    classes = {name: dollars(micros) for name, micros in zip(X_COSTS, row.micros, strict=True)}
    return {"BillingCurrency": "USD", **costs, **classes}


def _priced(row: LedgerRow, *, correction: bool) -> dict[str, Any]:
    """Quantity and price of a usage. A correction has none: what changed is no quantity at a price."""
    category = _CATEGORY.get(PriceKind(row.price_kind), "Other") if row.price_kind else "Other"
    found: dict[str, Any] = {"PricingCategory": category, "PricingCurrency": "USD", "SkuMeter": UNIT}
    found["SkuPriceId"] = row.price_source if row.price_kind else ""
    if correction:
        return {name: value or None for name, value in found.items()}
    hours, price = Decimal(row.gpu_ms) / HOUR_MS, dollars(row.micros_per_hour)
    if row.micros_per_hour:  # what was billed, which whole micro-dollars and milliseconds tell apart from what was held
        hours = _EXACT.divide(Decimal(row.bill_micros), Decimal(row.micros_per_hour))
    held = (Decimal(row.gpu_ms) / HOUR_MS).quantize(_QUANTITY)
    prices = dict.fromkeys(UNIT_PRICES, price if row.micros_per_hour else None)
    found |= {"PricingQuantity": hours.quantize(_QUANTITY), "PricingUnit": UNIT, **prices}
    return {name: value or None for name, value in found.items()} | {
        "PricingQuantity": found["PricingQuantity"],
        "ConsumedQuantity": held,
        "ConsumedUnit": UNIT,
    }


def _reserved(row: LedgerRow, *, correction: bool) -> dict[str, Any]:
    """A node is capacity that is held whether somebody works on it or not; a reserved price is a commitment beside."""
    status = "Used" if row.job else "Unused"
    found: dict[str, Any] = {"CapacityReservationId": row.node or None}
    found["CapacityReservationStatus"] = status if row.node else None
    if row.price_kind != PriceKind.RESERVED:
        return found
    billed = _EXACT.divide(Decimal(row.bill_micros), Decimal(max(row.micros_per_hour, 1))).quantize(_QUANTITY)
    found |= {
        "CommitmentDiscountCategory": "Usage",
        "CommitmentDiscountId": row.price_source,
        "CommitmentDiscountName": row.price_source,
        "CommitmentDiscountQuantity": None if correction else billed,
        "CommitmentDiscountStatus": status,
        "CommitmentDiscountType": "Reservation",
        "CommitmentDiscountUnit": None if correction else UNIT,
    }
    return found if row.job else found | {"ConsumedQuantity": None, "ConsumedUnit": None}


def dollars(micros: int) -> Decimal:
    """Exact."""
    return Decimal(micros) * _MICRO
