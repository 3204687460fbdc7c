"""Columns of the ledger's files, as Arrow knows them, and ledger rows to and from them.

Money is int64 micro-dollars in every file (the test of the schema holds it to that), instants int64 milliseconds since 1970, shares
int64 millionths. What is not known is null.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import pyarrow as pa

from whaleflux_console.core import facts as told
from whaleflux_console.core.rows import CLASSES, Basis, LedgerRow

# Which report a row came with: `reporter` is one start of one agent, which counts its reports from 1 on.
_REPORT = [("node", pa.string()), ("reporter", pa.string()), ("sequence", pa.int64())]
_SPAN = [("start_ms", pa.int64()), ("end_ms", pa.int64())]
_COUNTERS = [
    (name, pa.int64())
    for name in (
        "tensor_ppm", "sm_active_ppm", "dram_active_ppm", "busy_ppm", "clock_ppm", "power_mw", "memory_used_bytes",
        "nvlink_sent_bytes", "nvlink_received_bytes", "pcie_sent_bytes", "pcie_received_bytes",
    )
]  # fmt: skip
_TIMES = [
    (name, pa.int64()) for name in ("data_us", "host_us", "save_us", "comm_in_node_us", "comm_cross_us", "tokens")
]
_RANK = [("uid", pa.string()), ("attempt", pa.int64()), ("rank", pa.int64()), ("device", pa.string())]
_LOSS = [
    ("loss_count", pa.int64()), ("loss_sum", pa.float64()), ("loss_min", pa.float64()), ("loss_max", pa.float64()), ("loss_not_finite", pa.int64()),
]  # fmt: skip
_STEPS = [("first_step", pa.int64()), ("last_step", pa.int64()), *_TIMES, ("flops", pa.float64()), *_LOSS]
_SEEN = [("idle_power", pa.bool_()), ("source", pa.string())]

SAMPLES = pa.schema([*_REPORT, ("device", pa.string()), *_SPAN, *_COUNTERS, *_SEEN])
STEPS = pa.schema([*_REPORT, *_RANK, *_SPAN, *_STEPS])
# What of samples the bill asks for, as Sample has it.
SAMPLES_BILLED = ("device", "start_ms", "end_ms", "tensor_ppm", "sm_active_ppm", "idle_power", "source", "busy_ppm")
# What stays of them when they are rolled up: means weighted by time, sums of bytes, times and tokens.
MINUTES = pa.schema([("node", pa.string()), ("device", pa.string()), *_SPAN, *_COUNTERS, *_SEEN])
WORK = pa.schema([*_RANK, *_SPAN, *_STEPS])

# How trainings went: steps of an hour by attempt and minute, over all ranks. `steps` are ranks' steps, and so are those beside what not every
# rank says; of losses null: none had one. `wall_ms` is what a rank took on average.
STEP_PARTS = ("data", "host", "save", "comm_in_node", "comm_cross")
PROGRESS = pa.schema(
    [
        *((name, pa.string()) for name in ("job", "user", "uid")),
        ("attempt", pa.int64()),
        *_SPAN,
        *((name, pa.int64()) for name in ("first_step", "last_step", "ranks", "steps", "took_ms", "wall_ms", "fastest_us", "slowest_us")),
        *((f"{part}_{of}", pa.int64()) for part in STEP_PARTS for of in ("us", "steps")),
        ("tokens", pa.int64()),
        ("flops", pa.float64()),
        *_LOSS,
    ]
)  # fmt: skip

MICROS = tuple(f"{kind}_micros" for kind in CLASSES)
HOURS = pa.schema(
    [
        ("hour_ms", pa.int64()),
        *((name, pa.string()) for name in ("card", "node", "site", "gpu_class", "queue", "user", "job", "uid")),
        ("attempt", pa.int64()),
        ("model", pa.string()),
        ("gpu_ms", pa.int64()),
        ("bill_micros", pa.int64()),
        *((name, pa.int64()) for name in MICROS),
        *((name, pa.string()) for name in ("basis", "price_kind", "price_source", "adjustment")),
        ("version", pa.int64()),
        ("micros_per_hour", pa.int64()),
        ("note", pa.string()),
    ]
)
# The day of the year view: everything but cards, attempts and whose figure a price is.
DAY_KEYS = ("site", "gpu_class", "node", "queue", "user", "job", "model", "basis", "price_kind", "adjustment")
DAY_SUMS = ("gpu_ms", "bill_micros", *MICROS)
DAYS = pa.schema([("day_ms", pa.int64()), *((n, pa.string()) for n in DAY_KEYS), *((n, pa.int64()) for n in DAY_SUMS)])


def of_version(rows: pa.Table, version: int) -> pa.Table:
    """The same rows, as that version of their hour."""
    place = HOURS.get_field_index("version")
    return rows.set_column(place, HOURS.field(place), pa.repeat(pa.scalar(version, pa.int64()), rows.num_rows))


def in_order(table: pa.Table) -> pa.Table:
    """The same rows in the one order that they have by all of their columns."""
    return table.combine_chunks().sort_by([(name, "ascending") for name in table.column_names])


# What runs did in an hour beside their steps: what was served, and how those ended that have.
RUNS = pa.schema(
    [("uid", pa.string()), ("input_tokens", pa.int64()), ("output_tokens", pa.int64()), ("ending", pa.string())]
)


def runs_table(hour_ms: int, facts: told.Facts) -> pa.Table:
    """RUNS of the hour, a line for each run of which anything is known."""
    found: dict[str, dict[str, Any]] = {}
    for served in facts.served:
        if served.hour_ms == hour_ms:
            tokens = {"input_tokens": served.input_tokens, "output_tokens": served.output_tokens}
            found.setdefault(served.uid, {}).update(tokens)
    for outcome in facts.outcomes:
        found.setdefault(outcome.uid, {})["ending"] = outcome.ending.value
    return pa.Table.from_pylist([{"uid": uid, **values} for uid, values in sorted(found.items())], RUNS)


def rows_table(rows: Iterable[LedgerRow]) -> pa.Table:
    """Ledger rows as HOURS, by card and then whom it worked for."""
    ordered = sorted(rows, key=lambda row: (row.card, row.job, row.attempt))
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in ordered] for name in HOURS.names if name not in MICROS and name != "basis"
    }
    columns["basis"] = [row.basis.value for row in ordered]
    columns |= {name: [row.micros[place] for row in ordered] for place, name in enumerate(MICROS)}
    return pa.table([columns[name] for name in HOURS.names], schema=HOURS)


def table_rows(table: pa.Table) -> tuple[LedgerRow, ...]:
    """HOURS as ledger rows."""
    columns = table.to_pydict()
    micros = zip(*(columns.pop(name) for name in MICROS), strict=True)
    columns["basis"] = [Basis(word) for word in columns["basis"]]
    names = [name for name in columns if name != "micros"]
    return tuple(
        LedgerRow(**dict(zip(names, values, strict=True)), micros=sums)
        for values, sums in zip(zip(*(columns[name] for name in names), strict=True), micros, strict=True)
    )


# Facts that people and owners told: one column each, of which a row has one.
TOLD: dict[str, type] = {
    "presences": told.Presence,
    "holdings": told.Holding,
    "attempts": told.Attempt,
    "fragmented": told.Fragmented,
    "prices": told.PriceSpan,
    "adjustments": told.Adjustment,
    "served": told.Served,
    "outcomes": told.Outcome,
}
# What makes one fact the same as an earlier one, of which then only the later counts.
_IDENTITY: dict[str, tuple[str, ...]] = {
    "presences": ("device", "start_ms"),
    "holdings": ("device", "uid", "attempt", "start_ms"),
    "attempts": ("uid", "attempt"),
    "fragmented": ("device", "start_ms"),
    "prices": ("card", "start_ms"),
    "adjustments": ("name",),
    "served": ("uid", "hour_ms"),
    "outcomes": ("uid",),
}


def _arrow_type(hint: Any) -> pa.DataType:
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    if dataclasses.is_dataclass(hint):
        return pa.struct(list(_fields(typing.cast("type", hint))))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return pa.string()
    return {int: pa.int64(), str: pa.string(), bool: pa.bool_(), float: pa.float64()}[hint]


def _fields(kind: type) -> Iterable[tuple[str, pa.DataType]]:
    return ((name, _arrow_type(hint)) for name, hint in typing.get_type_hints(kind).items())


FACTS = pa.schema([(name, pa.struct(list(_fields(kind)))) for name, kind in TOLD.items()])


def facts_table(facts: told.Facts) -> pa.Table:
    """Everything but samples and steps, which have files of their own."""
    before, columns, total = 0, [], sum(len(getattr(facts, name)) for name in TOLD)
    for name, kind in TOLD.items():
        found, type_ = getattr(facts, name), FACTS.field(name).type
        after = total - before - len(found)
        parts = (pa.nulls(before, type_), _structs(found, kind, type_), pa.nulls(after, type_))
        columns.append(pa.chunked_array([part for part in parts if len(part)], type_))
        before += len(found)
    return pa.table(columns, schema=FACTS).combine_chunks()


def _structs(facts: Sequence[Any], kind: type, type_: pa.StructType) -> pa.Array:
    """Column by column: as objects of their own, tens of thousands of facts take seconds."""
    if not facts:
        return pa.array([], type_)
    columns = [_column(facts, name, type_.field(name).type) for name in typing.get_type_hints(kind)]
    return pa.StructArray.from_arrays(columns, fields=list(type_))


def _column(facts: Sequence[Any], name: str, type_: pa.DataType) -> pa.Array:
    values = [getattr(fact, name) for fact in facts]
    if pa.types.is_struct(type_):
        values = [None if value is None else dataclasses.asdict(value) for value in values]
    return pa.array(values, type_)


def facts_of(tables: Sequence[pa.Table], samples: pa.Table | None = None, steps: pa.Table | None = None) -> told.Facts:
    """What FACTS say together; of one fact told twice the later table's counts. `samples` are MINUTES, `steps` WORK."""
    found = {name: _newest(name, kind, tables) for name, kind in TOLD.items()}
    if samples is not None:
        found["samples"] = _samples(samples)
    if steps is not None:
        found["steps"] = _steps(steps)
    return told.Facts(**found)


def of_runs(tables: Sequence[pa.Table]) -> told.Facts:
    """Of FACTS what was served and how runs ended, without making anything of the rest, which is most of them."""
    return facts_of(
        [table.select([name for name in ("served", "outcomes") if name in table.column_names]) for table in tables]
    )


def _newest(name: str, kind: type, tables: Sequence[pa.Table]) -> tuple[Any, ...]:
    identity, found = _IDENTITY[name], {}
    for table in tables:
        column = table.column(name) if name in table.column_names else None
        for values in column.drop_null().to_pylist() if column is not None else ():
            found[tuple(values[part] for part in identity)] = values
    return tuple(_made(kind, values) for values in found.values())


def _made(kind: type, values: dict[str, Any]) -> Any:
    if kind is told.Attempt and values["plan"] is not None:
        values = values | {"plan": told.Plan(**values["plan"])}
    if kind is told.PriceSpan:
        values = values | {"kind": told.PriceKind(values["kind"])}
    if kind is told.Outcome:
        values = values | {"ending": told.Ending(values["ending"])}
    return kind(**values)


def _samples(minutes: pa.Table) -> tuple[told.Sample, ...]:
    return tuple(told.Sample(*values) for values in _values(minutes, SAMPLES_BILLED))


def _steps(work: pa.Table) -> tuple[told.Steps, ...]:
    # whole milliseconds
    names = tuple(field[0] for field in [*_RANK, *_SPAN, *_STEPS] if field not in _LOSS)
    return tuple(
        told.Steps(*values[:8], *(_ms(value) for value in values[8:13]), *values[13:])
        for values in _values(work, names)
    )


def _ms(us: int | None) -> int | None:
    return None if us is None else us // 1000


def _values(table: pa.Table, names: tuple[str, ...]) -> Any:
    return zip(*(table.column(name).to_pylist() for name in names), strict=True)
