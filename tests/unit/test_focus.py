"""Charges of FOCUS 1.2: every rule holds for every ledger row, and they sum to the bill, also behind restatements."""

import csv
import io
from dataclasses import replace
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.ledger_world import BEGIN_MS, row
from whaleflux_console.core.facts import HOUR_MS, PriceKind
from whaleflux_console.core.focus import COLUMNS, charge, charges
from whaleflux_console.core.focus_rules import faults
from whaleflux_console.core.money import split
from whaleflux_console.core.rows import CLASSES
from whaleflux_console.exports import CsvFile, ParquetFile


@st.composite
def rows(draw, card="g0", version=1):
    """A row of usage, of an idle card, or of an adjustment."""
    job = draw(st.sampled_from(["", "queues/q/jobs/j", "queues/q/jobs/k"]))
    price = draw(st.integers(0, 100_000_000))
    held_ms = draw(st.integers(0, HOUR_MS))
    bill = price * held_ms // HOUR_MS
    adjustment = draw(st.sampled_from(["", "", "adjustments/a"]))
    if adjustment:
        bill, held_ms = draw(st.integers(-(10**9), 10**9)), 0
    weights = draw(st.lists(st.integers(0, 5), min_size=len(CLASSES), max_size=len(CLASSES)))
    micros = tuple(split(bill, weights if any(weights) else [1] * len(CLASSES)))
    return replace(
        row(BEGIN_MS, card, job=job, queue="queues/q" if job else "", user="user/ann" if job else ""),
        gpu_ms=held_ms,
        bill_micros=bill,
        micros=micros,
        adjustment=adjustment,
        price_kind=draw(st.sampled_from(list(PriceKind))) if price else "",
        price_source="contract" if price else "no price",
        micros_per_hour=price,
        version=version,
    )


@given(st.lists(rows(), max_size=6), st.lists(rows(version=2), max_size=6), st.lists(rows(version=3), max_size=6))
def test_every_charge_keeps_the_rules_and_all_of_them_sum_to_the_newest_version(first, second, third):
    found = list(charges([first, second, third], "acme"))
    assert [fault for one in found for fault in faults(one)] == []
    billed = sum((one["BilledCost"] for one in found), Decimal(0))
    assert billed * 1_000_000 == sum(one.bill_micros for one in third)
    assert {one["ChargeClass"] for one in found[len(first) :]} <= {"Correction"}


def usage(**fields):
    said = {"gpu_ms": HOUR_MS, "micros_per_hour": 2_500_000, "price_kind": "reserved", "price_source": "contract"}
    return replace(row(BEGIN_MS, "g0", bill=2_500_000), **(said | fields))


def test_a_reserved_gpu_that_nobody_holds_is_an_unused_commitment():
    one = charge(usage(job="", queue="", user="", uid=""), "acme")
    assert (one["CommitmentDiscountStatus"], one["CapacityReservationStatus"]) == ("Unused", "Unused")
    assert one["ConsumedQuantity"] is None and one["SubAccountId"] is None
    used = charge(usage(), "acme")
    assert (used["CommitmentDiscountStatus"], used["ConsumedQuantity"], used["PricingQuantity"]) == ("Used", 1, 1)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("BilledCost", None, "BilledCost is null"),
        ("ListUnitPrice", Decimal(3), "PricingQuantity x ListUnitPrice"),
        ("CapacityReservationStatus", None, "CapacityReservationStatus"),
        ("ChargeCategory", "Fine", "ChargeCategory is Fine"),
        ("ChargePeriodStart", "2026-12-01 10:00", "ChargePeriodStart is no time"),
        ("PricingQuantity", None, "PricingQuantity is null on usage"),
        ("ConsumedQuantity", None, "ConsumedQuantity"),
        ("x_UsefulCost", Decimal(7), "do not sum"),
        ("EffectiveCost", 2.5, "EffectiveCost is no decimal"),
    ],
)
def test_a_charge_that_breaks_a_rule_is_named(column, value, said):
    broken = charge(usage(), "acme") | {column: value}
    if column == "BilledCost":
        broken["x_UsefulCost"] = Decimal(0)
    assert any(said in fault for fault in faults(broken))


def test_a_charge_without_a_column_is_named():
    whole = charge(usage(), "acme")
    del whole["SkuId"]
    assert list(faults(whole)) == ["columns: ['SkuId']"]


def test_both_files_hold_the_same():
    found = [charge(usage(), "acme"), charge(usage(job="", queue="", user=""), "acme")]
    text, parquet = CsvFile(), ParquetFile()
    lines = list(csv.DictReader(io.StringIO((text.add(found[:1]) + text.add(found[1:]) + text.end()).decode())))
    table = pq.read_table(pa.BufferReader(parquet.add(found[:1]) + parquet.add(found[1:]) + parquet.end()))
    assert tuple(lines[0]) == tuple(table.column_names) == COLUMNS
    for line, kept, one in zip(lines, table.to_pylist(), found, strict=True):
        assert Decimal(line["BilledCost"]) == kept["BilledCost"] == one["BilledCost"]
        assert (line["SubAccountId"] or None) == kept["SubAccountId"] == one["SubAccountId"]


def test_an_empty_file_has_its_columns():
    assert CsvFile().end().decode().strip().split(",") == list(COLUMNS)
    assert pq.read_table(pa.BufferReader(ParquetFile().end())).num_rows == 0
