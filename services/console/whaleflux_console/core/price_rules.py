"""What may be said of prices and invoices: every number within reason, no two prices of one scope at one time. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux_console.core.price_book import FOR_GOOD_MS, Ownership

MOST_MICROS_PER_GPU_HOUR = 10_000_000_000  # 10,000 US dollars
MOST_MICROS = 10**15  # a thousand million US dollars
MOST_TEXT = 300
LONGEST_ADJUSTMENT_S = 400 * 86_400
FIRST_S, LAST_S = 946_684_800, FOR_GOOD_MS // 1000  # 2000-01-01 and 2100-01-01


@dataclass(frozen=True, slots=True)
class Scope:
    """For which GPUs a price is; what is empty is any."""

    node: str = ""
    site: str = ""
    gpu_class: str = ""

    def __str__(self) -> str:
        said = (self.node, "" if self.node else self.site, self.gpu_class)
        return " ".join(part for part in said if part) or "every GPU"


@dataclass(frozen=True, slots=True)
class Validity:
    """A stored price, as far as others must not overlap it. Unix seconds; `end_s` None: for good."""

    name: str
    scope: Scope
    start_s: float
    end_s: float | None

    def overlaps(self, other: Validity) -> bool:
        """Whether both are for the same GPUs at some instant."""
        ends = [end if end is not None else float(LAST_S) for end in (self.end_s, other.end_s)]
        return self.scope == other.scope and self.start_s < ends[1] and other.start_s < ends[0]


_BOUNDS = {  # of what owning costs: lowest, highest
    "capex_micros": (1, 10**13),
    "months": (1, 120),
    "residual_ppm": (0, 1_000_000),
    "power_w": (0, 100_000),
    "pue_ppm": (0, 5_000_000),
    "electricity_micros_per_kwh": (0, 100_000_000),
    "colocation_micros_per_kw_month": (0, 100_000_000_000),
    "support_ppm_per_year": (0, 1_000_000),
    "gpus": (0, 1_024),
}


def ownership_problems(owned: Ownership, field: str) -> Iterator[FieldViolation]:
    """What of an owned GPU's costs is beyond reason."""
    for name, (low, high) in _BOUNDS.items():
        yield from number(f"{field}.{name}", getattr(owned, name), low, high)
    if 0 < owned.pue_ppm < 1_000_000:
        said = amount("pue_ppm", owned.pue_ppm)
        yield FieldViolation(f"{field}.pue_ppm", f"{said} is below 1: a building takes no less than it gives")


def number(field: str, value: int, low: int, high: int) -> Iterator[FieldViolation]:
    """A whole number within [low, high]; what is wrong is said in the units in which people write it, see `amount`."""
    if not low <= value <= high:
        name = field.rpartition(".")[2]
        said, least, most = (amount(name, one) for one in (value, low, high))
        yield FieldViolation(field, f"{said} is outside of {least} to {most}")


def amount(name: str, value: int) -> str:
    """The value of a field as people write it: micro-dollars as USD, parts per million as % (of PUE as a factor)."""
    if "micros" in name:
        return f"{_decimal(value, 6)} USD"
    if name == "pue_ppm":
        return _decimal(value, 6)
    return f"{_decimal(value, 4)} %" if "ppm" in name else f"{value:,}"


def _decimal(value: int, decimals: int) -> str:
    """`value` x 10^-decimals, exactly and without zeros at its end."""
    whole, rest = divmod(abs(value), 10**decimals)
    part = f".{rest:0{decimals}}".rstrip("0").rstrip(".")
    return f"{'-' if value < 0 else ''}{whole:,}{part}"


def text(field: str, value: str, *, required: bool) -> Iterator[FieldViolation]:
    """Printable, of bounded length."""
    if required and not value.strip():
        yield FieldViolation(field, "is not set; say whose figure it is, such as a contract or a price list")
    elif len(value) > MOST_TEXT or not value.isprintable():
        yield FieldViolation(field, f"use at most {MOST_TEXT} printable characters")


def day(field: str, value: str) -> Iterator[FieldViolation]:
    """YYYY-MM-DD, or nothing."""
    try:
        if value:
            date.fromisoformat(value)
    except ValueError:
        yield FieldViolation(field, f"{value[:30]!r} is no day; write it as 2026-11-30")


def window(start_s: float | None, end_s: float | None, *, end_required: bool) -> Iterator[FieldViolation]:
    """A beginning, and an end behind it where there is one."""
    if start_s is None:
        yield FieldViolation("start_time", "is not set; say from when on it holds")
        return
    if end_s is None and end_required:
        yield FieldViolation("end_time", "is not set; say until when it holds")
    for field, value in (("start_time", start_s), ("end_time", end_s)):
        if value is not None and not FIRST_S <= value <= LAST_S:
            yield FieldViolation(field, "is outside of 2000 to 2100")
    if end_s is not None and end_s <= start_s:
        yield FieldViolation(
            "end_time", "is not behind its beginning; give a later one" + ("" if end_required else ", or none for good")
        )


def class_name(field: str, value: str) -> Iterator[FieldViolation]:
    """A class of GPU as nodes report it, or nothing."""
    if len(value) > 64 or not value.isprintable():
        yield FieldViolation(field, "use the name that nodes show, at most 64 printable characters: whaleflux gpus")


def resource(field: str, value: str, *collections: str) -> Iterator[FieldViolation]:
    """A name of these collections, or nothing."""
    try:
        if value:
            names.split(value, *collections, field=field)
    except InvalidArgument as wrong:
        yield from wrong.violations


def clash(new: Validity, there: Iterable[Validity]) -> FieldViolation | None:
    """The first stored price that is for the same GPUs at some of the same time; None: there is none."""
    for other in there:
        if other.name != new.name and new.overlaps(other):
            return FieldViolation(
                "start_time",
                f"{other.name} holds for {other.scope} at that time; end it first: whaleflux prices end {other.name}",
            )
    return None
