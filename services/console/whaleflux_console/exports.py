"""Closed hours as a file of FOCUS charges, piece by piece: at no time is more than some hours of it in memory."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.v1 import console_pb2 as pb
from whaleflux_console.asked_times import asked_ms
from whaleflux_console.core import focus_rules
from whaleflux_console.core.facts import HOUR_MS
from whaleflux_console.core.focus import COLUMNS, DECIMALS, QUANTITIES, UNIT_PRICES, charges
from whaleflux_console.core.forecast import month_of
from whaleflux_console.core.rows import LedgerRow
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.manifest import DAY_MS, Kind, day_of
from whaleflux_console.ledger.question import MAX_WINDOW_MS, Question
from whaleflux_console.ledger.rules import open_hours

DEFAULT_ACCOUNT = "whaleflux"
MOST_ACCOUNT = 128  # characters
PIECE_BYTES = 1 << 20
_MOST_FAULTS = 20
_GROUP_ROWS = 20_000  # of a Parquet file's row group
_MICROS = 1_000_000


class _File(Protocol):
    """A file that is being written: `add` and `end` give what is ready of it."""

    def add(self, found: Sequence[Mapping[str, Any]]) -> bytes: ...

    def end(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Exports:
    """See CostService.ExportCost."""

    answers: Answers
    clock: Clock

    async def export(self, request: pb.ExportCostRequest) -> AsyncIterator[pb.ExportCostResponse]:
        """The file, then its summary. Raises InvalidArgument naming what is wrong, FailedPrecondition for an hour whose file is damaged."""
        account = request.billing_account or DEFAULT_ACCOUNT
        file = _file(request.format)
        if len(account) > MOST_ACCOUNT:
            raise InvalidArgument(
                FieldViolation("billing_account", f"is longer than {MOST_ACCOUNT}; give a shorter id")
            )
        start_ms, end_ms = self._window(request)
        seen = _Seen()
        for hour_ms in self._hours(start_ms, end_ms):
            versions = await self._versions(hour_ms)
            for piece in _pieces(await asyncio.to_thread(_written, file, versions, account, seen)):
                yield piece
        for piece in _pieces(file.end()):
            yield piece
        yield pb.ExportCostResponse(summary=await self._summary(seen, start_ms, end_ms))

    def _hours(self, start_ms: int, end_ms: int) -> list[int]:
        state = self.answers.state
        return sorted(at for kind, at in state.spans if kind is Kind.HOURS and start_ms <= at < end_ms)

    async def _versions(self, hour_ms: int) -> list[tuple[LedgerRow, ...]]:
        try:
            return await self.answers.versions(hour_ms)
        except Damaged as damage:
            raise FailedPrecondition(f"{damage}; it is made again by itself, see: whaleflux cost status") from None

    def _window(self, asked: pb.ExportCostRequest) -> tuple[int, int]:
        """Whole days, up to the first hour that is not closed."""
        now = self.clock.now()
        month_ms = round(month_of(now)[0].timestamp() * 1000)
        start_ms = day_of(asked_ms(asked, "start_time", month_ms))
        end_ms = asked_ms(asked, "end_time", round(now.timestamp() * 1000))
        if not 0 <= start_ms < end_ms:
            raise InvalidArgument(FieldViolation("start_time", "is not before the end; give an earlier one"))
        if end_ms - start_ms > MAX_WINDOW_MS:
            raise InvalidArgument(FieldViolation("start_time", "is more than five years before the end; export a part"))
        unit = DAY_MS if end_ms < self.answers.hot_from_ms else HOUR_MS
        state = self.answers.state
        return start_ms, max(min([-(-end_ms // unit) * unit, *open_hours(state)]), start_ms + HOUR_MS)

    async def _summary(self, seen: _Seen, start_ms: int, end_ms: int) -> pb.CostExport:
        bill = (await self.answers.ask(Question(start_ms, end_ms))).total.bill_micros
        if bill != seen.billed_micros:
            seen.fault(
                f"the charges sum to {seen.billed_micros} micro-dollars and the bill to {bill}: hours that are too old are "
                "kept by day alone, or were closed again meanwhile; export again, or a later window"
            )
        found = pb.CostExport(
            rows=seen.rows,
            corrections=seen.corrections,
            billed_micros=seen.billed_micros,
            bill_micros=bill,
            faults=seen.faults,
        )
        found.start_time.FromMilliseconds(start_ms)
        found.end_time.FromMilliseconds(end_ms)
        return found


@dataclass(slots=True)
class _Seen:
    """What went by."""

    rows: int = 0
    corrections: int = 0
    billed_micros: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, found: Sequence[Mapping[str, Any]]) -> None:
        self.rows += len(found)
        self.corrections += sum(one["ChargeClass"] is not None for one in found)
        self.billed_micros += int(sum(one["BilledCost"] for one in found) * _MICROS)
        for place, one in enumerate(found, self.rows - len(found) + 1):
            for said in focus_rules.faults(one):
                self.fault(f"charge {place}: {said}")

    def fault(self, said: str) -> None:
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(said)


def _written(file: _File, versions: Sequence[Sequence[LedgerRow]], account: str, seen: _Seen) -> bytes:
    found = list(charges(versions, account))
    seen.add(found)
    return file.add(found)


def _pieces(content: bytes) -> Iterator[pb.ExportCostResponse]:
    for first in range(0, len(content), PIECE_BYTES):
        yield pb.ExportCostResponse(data=content[first : first + PIECE_BYTES])


def _file(asked: int) -> _File:
    if asked not in pb.CostFormat.values():
        raise InvalidArgument(FieldViolation("format", f"{asked} is none of CSV (1) and PARQUET (2); use one of these"))
    return ParquetFile() if asked == pb.COST_FORMAT_PARQUET else CsvFile()


class CsvFile:
    """Comma-separated values with a header; null is empty, decimals have no exponent."""

    def __init__(self) -> None:
        self._begun = False

    def add(self, found: Sequence[Mapping[str, Any]]) -> bytes:
        """What these charges are in it."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        if not self._begun:
            writer.writerow(COLUMNS)
            self._begun = True
        writer.writerows([_plain(one[name]) for name in COLUMNS] for one in found)
        return text.getvalue().encode()

    def end(self) -> bytes:
        """What is left to be written: the header, where there were no charges."""
        return b"" if self._begun else self.add(())


def _plain(value: Any) -> Any:
    return "" if value is None else f"{value:f}" if isinstance(value, Decimal) else value


def _type(name: str) -> pa.DataType:
    if name in DECIMALS or name in UNIT_PRICES:
        return pa.decimal128(38, 6)
    if name in QUANTITIES:
        return pa.decimal128(38, 12)
    return pa.int64() if name in {"x_Attempt", "x_HourVersion"} else pa.string()


SCHEMA = pa.schema([(name, _type(name)) for name in COLUMNS])


class ParquetFile:
    """Row groups of some hours each."""

    def __init__(self) -> None:
        self._ready = _Ready()
        self._writer = pq.ParquetWriter(self._ready, SCHEMA, compression="zstd")
        self._waiting: list[Mapping[str, Any]] = []

    def add(self, found: Sequence[Mapping[str, Any]]) -> bytes:
        """What of the file is ready: nothing until a row group is full."""
        self._waiting += found
        if len(self._waiting) >= _GROUP_ROWS:
            self._flush()
        return self._ready.taken()

    def end(self) -> bytes:
        """The last row group, and the footer."""
        self._flush()
        self._writer.close()
        return self._ready.taken()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=SCHEMA))
            self._waiting = []


class _Ready(io.RawIOBase):
    """Bytes that were written and not taken yet."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._written

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._written += len(self._parts[-1])
        return len(self._parts[-1])

    def taken(self) -> bytes:
        found, self._parts = b"".join(self._parts), []
        return found
