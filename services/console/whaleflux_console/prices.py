"""Prices as people declare them, and what invoices say beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import Aborted, FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.rpc.paging import Page
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, NoneCreated, Store
from whaleflux.store.reading import read_all
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_console.asked_times import is_instant
from whaleflux_console.core import price_rules as rules
from whaleflux_console.core.price_book import Ownership, components
from whaleflux_console.records import Records

MOST_PRICES = 1_000  # those that hours were closed by are one record of the store
MOST_ADJUSTMENTS = 5_000
_OUTPUT = ("components", "create_time", "last_change", "etag")
_NOT_SPREAD = {
    pb.ADJUSTMENT_STATE_UNSPECIFIED,
    pb.ADJUSTMENT_STATE_WAITING,
    pb.ADJUSTMENT_STATE_TOO_OLD,
}
_KINDS = "owned, on-demand, reserved or spot"


def price_name(price_id: str) -> str:
    """prices/{price}."""
    return names.join(("prices", price_id))


def adjustment_name(adjustment_id: str) -> str:
    """adjustments/{adjustment}."""
    return names.join(("adjustments", adjustment_id))


def seconds(message: Any, field: str) -> float | None:
    """A time of a message, Unix seconds; None where it is not set."""
    at = getattr(message, field)
    if not message.HasField(field):
        return None
    return float(at.seconds) + at.nanos / 1e9 if is_instant(at) else -1.0  # which no window holds


class Prices:
    """What GPUs cost, where their nodes do not say it or say it wrongly."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._records = Records(store, clock, pb.GpuPrice, keys.PRICES, "price", "whaleflux prices ls")

    async def create(self, request: pb.CreatePriceRequest) -> pb.GpuPrice:
        """Declares a price. Raises InvalidArgument naming every field that is wrong."""
        price = pb.GpuPrice()
        price.CopyFrom(request.price)
        for field in _OUTPUT:
            price.ClearField(field)
        price.name = price_name(names.check_id("price_id", request.price_id))
        now = self._clock.now()
        price.create_time.FromDatetime(now)
        price.source_date = price.source_date or f"{now:%Y-%m-%d}"
        if problems := list(_price_problems(price)):
            raise InvalidArgument(problems)
        if price.HasField("ownership"):
            _work_out(price)
        return await self._stored(price, validate_only=request.validate_only)

    async def page(self, request: pb.ListPricesRequest) -> Page[pb.GpuPrice]:
        """One page of prices."""
        return await self._records.page(request.page_size, request.page_token)

    async def end(self, request: pb.EndPriceRequest) -> pb.GpuPrice:
        """Says until when it holds."""
        names.split(request.name, "prices")
        if not request.HasField("end_time"):
            request.end_time.FromDatetime(self._clock.now())
        end_s = seconds(request, "end_time")

        def edit(there: pb.GpuPrice) -> None:
            if problems := list(rules.window(seconds(there, "start_time"), end_s, end_required=True)):
                raise InvalidArgument(problems)
            if there.HasField("end_time") and (seconds(there, "end_time") or 0.0) < (end_s or 0.0):
                said = f"{there.name} ends before that; declare another price for the time after it"
                raise InvalidArgument(FieldViolation("end_time", said))
            there.end_time.CopyFrom(request.end_time)

        return await self._records.change(request.name, request.etag, edit, "its end was set")

    async def delete(self, name: str, etag: str) -> None:
        """Forgets a price as if it had never been."""
        names.split(name, "prices")
        await self._records.delete(name, etag)

    async def _stored(self, price: pb.GpuPrice, *, validate_only: bool) -> pb.GpuPrice:
        there = await self._store.list(keys.PRICES)
        read = read_all(there.entries, self._records.shown)
        if read.unreadable:
            unread = keys.name_of(read.unreadable[0])
            raise FailedPrecondition(
                f"{unread} cannot be read here, so that it may hold for the same GPUs; update console first"
            )
        if len(there.entries) >= MOST_PRICES:
            raise FailedPrecondition(
                f"there are {MOST_PRICES} prices already; forget old ones: whaleflux prices rm PRICE"
            )
        if found := rules.clash(_validity(price), [_validity(other) for _, other in read.values]):
            raise InvalidArgument(found)
        if validate_only:
            return price
        try:
            return await self._records.create(
                price.name, price, [NoneCreated(keys.PRICES, there.revision, or_written=True)]
            )
        except ConditionFailed:
            raise Aborted("other prices changed meanwhile; repeat the request", retry_after_s=0.1) from None


class Adjustments:
    """What invoices have more, or less, than the prices."""

    def __init__(self, store: Store, clock: Clock) -> None:
        hint = "whaleflux prices adjustments"
        self._store = store
        self._records = Records(store, clock, pb.Adjustment, keys.ADJUSTMENTS, "adjustment", hint)

    async def create(self, request: pb.CreateAdjustmentRequest) -> pb.Adjustment:
        """Declares an adjustment. Raises InvalidArgument naming every field that is wrong."""
        one = pb.Adjustment()
        one.CopyFrom(request.adjustment)
        for field in ("etag", "ledger"):
            one.ClearField(field)
        one.state = pb.ADJUSTMENT_STATE_WAITING
        one.name = adjustment_name(names.check_id("adjustment_id", request.adjustment_id))
        if problems := list(_adjustment_problems(one)):
            raise InvalidArgument(problems)
        if len((await self._store.list(keys.ADJUSTMENTS)).entries) >= MOST_ADJUSTMENTS:
            raise FailedPrecondition(
                f"there are {MOST_ADJUSTMENTS} adjustments already; take old ones back: whaleflux prices unadjust NAME"
            )
        return one if request.validate_only else await self._records.create(one.name, one)

    async def page(self, request: pb.ListAdjustmentsRequest) -> Page[pb.Adjustment]:
        """One page of adjustments."""
        return await self._records.page(request.page_size, request.page_token)

    async def delete(self, name: str, etag: str) -> None:
        """Takes an adjustment back: what was spread is told by the ledger's keeper that it is nothing, and then the record goes."""
        names.split(name, "adjustments")
        _, there = await self._records.read(name)
        if there.state in _NOT_SPREAD:
            await self._records.delete(name, etag or there.etag)
            return

        def take_back(one: pb.Adjustment) -> None:
            one.state = pb.ADJUSTMENT_STATE_TAKING_BACK

        await self._records.change(name, etag, take_back, "it is taken back")


def _price_problems(price: pb.GpuPrice) -> Iterator[FieldViolation]:
    for field, value, *collections in (
        ("price.node", price.node, "sites", "nodes"),
        ("price.site", price.site, "sites"),
    ):
        yield from rules.resource(field, value, *collections)
    if price.node and price.site:
        yield FieldViolation("price.site", "is set beside a node, which says the site; leave one of the two out")
    yield from rules.class_name("price.gpu_class", price.gpu_class)
    yield from rules.window(seconds(price, "start_time"), seconds(price, "end_time"), end_required=False)
    yield from rules.text("price.source", price.source, required=True)
    yield from rules.day("price.source_date", price.source_date)
    if price.kind == types_pb2.PRICE_KIND_UNSPECIFIED:
        yield FieldViolation("price.kind", f"is not set; use {_KINDS}")
    if not price.HasField("ownership"):
        yield from rules.number(
            "price.micros_per_gpu_hour", price.micros_per_gpu_hour, 0, rules.MOST_MICROS_PER_GPU_HOUR
        )
        return
    if price.kind != types_pb2.PRICE_KIND_OWNED:
        yield FieldViolation("price.ownership", "is for kind owned alone; give a price per GPU and hour instead")
    if price.micros_per_gpu_hour:
        yield FieldViolation("price.micros_per_gpu_hour", "is worked out of what owning costs; give one of the two")
    yield from rules.ownership_problems(ownership(price.ownership), "price.ownership")


def _work_out(price: pb.GpuPrice) -> None:
    """An owned GPU's price, part by part."""
    parts = components(ownership(price.ownership))
    price.micros_per_gpu_hour = sum(part.micros_per_hour for part in parts)
    for part in parts:
        if part.micros_per_hour:
            price.components.add(name=part.name, micros_per_gpu_hour=part.micros_per_hour)


def ownership(message: pb.Ownership) -> Ownership:
    """What owning a GPU costs, as the core reads it."""
    return Ownership(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})


def _adjustment_problems(one: pb.Adjustment) -> Iterator[FieldViolation]:
    yield from rules.resource("adjustment.site", one.site, "sites")
    yield from rules.class_name("adjustment.gpu_class", one.gpu_class)
    yield from rules.text("adjustment.reason", one.reason, required=True)
    yield from rules.number("adjustment.micros", one.micros, -rules.MOST_MICROS, rules.MOST_MICROS)
    if not one.micros:
        yield FieldViolation("adjustment.micros", "is 0; give what the invoice has more, or less (negative)")
    start_s, end_s = seconds(one, "start_time"), seconds(one, "end_time")
    yield from rules.window(start_s, end_s, end_required=True)
    if start_s is not None and end_s is not None and end_s - start_s > rules.LONGEST_ADJUSTMENT_S:
        yield FieldViolation(
            "adjustment.end_time", "is more than 400 days behind its beginning; declare one for each year"
        )


def _validity(price: pb.GpuPrice) -> rules.Validity:
    scope = rules.Scope(price.node, price.site, price.gpu_class)
    return rules.Validity(price.name, scope, seconds(price, "start_time") or 0.0, seconds(price, "end_time"))
