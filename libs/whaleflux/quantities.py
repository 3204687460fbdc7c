"""What people write for sizes, times and money, and the numbers that the contract wants."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SECONDS = {"ms": 0.001, "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60, "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400}  # fmt: skip
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_NUMBER = re.compile(r"\s*(?:>=)?\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*")


def size_bytes(value: object) -> int:
    """80 GB, 1.5 TiB, ">= 24 GB" or a number of bytes. Raises ValueError with what would be right."""
    return int(_scaled(value, _BYTES, "a size such as 80 GB or 512 MiB"))


def seconds(value: object) -> float:
    """10 min, 500 ms, 2h or a number of seconds. Raises ValueError with what would be right."""
    return _scaled(value, _SECONDS, "a time such as 10 min, 30 s or 2 h")


def dollars(value: object) -> float:
    """12000 USD, $12000 or a number. Raises ValueError with what would be right."""
    if isinstance(value, str):
        value = value.strip().removeprefix("$")
    return _scaled(value, {"": 1, "usd": 1}, "an amount such as 12000 USD; other currencies are not converted")


def count(value: object) -> float:
    """1T, 300B, 4M, 512k or a number. Raises ValueError with what would be right."""
    return _scaled(value, _COUNTS, "a number such as 4M, 300B or 1T")


def whole_count(value: object) -> int:
    """4M, 512k or a whole number from 1 on. Raises ValueError with what would be right."""
    found = count(value)
    if found < 1 or found != int(found):
        raise ValueError("must be a whole number from 1 on, such as 4M or 512k")
    return int(found)


def instant(value: object) -> datetime:
    """2026-12-01T08:00Z, or the same with another offset; without one it is UTC. Raises ValueError."""
    if isinstance(value, datetime):
        moment = value
    elif isinstance(value, date):
        moment = datetime(value.year, value.month, value.day, tzinfo=UTC)
    elif isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        except ValueError:
            raise ValueError("must be a time such as 2026-12-01T08:00Z") from None
    else:
        raise ValueError("must be a time such as 2026-12-01T08:00Z")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _scaled(value: object, units: dict[str, float] | dict[str, int], wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"must be {wanted}")
    if isinstance(value, (int, float)):
        if not 0 <= value < 10**18 or math.isnan(value):
            raise ValueError(f"must be {wanted}, not negative")
        return value
    match = _NUMBER.fullmatch(value)
    if match is None or match[2].lower() not in units:
        raise ValueError(f"must be {wanted}")
    return float(Decimal(match[1]) * Decimal(str(units[match[2].lower()])))  # 4.1M is whole, and 4.1 * 1e6 is not


def shown_bytes(count: float) -> str:
    """1.5 TB, 141 GB: three digits are enough for people."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def exact_bytes(count: int) -> str:
    """8 GiB, 1500 MB, 5 B: the largest unit in which it is a whole number, as `size_bytes` reads it."""
    for unit in ("TiB", "TB", "GiB", "GB", "MiB", "MB", "KiB", "KB"):
        if count and not count % _BYTES[unit.lower()]:
            return f"{count // _BYTES[unit.lower()]} {unit}"
    return f"{count} B"


def shown_number(value: float) -> str:
    """19,700, 105, 34.6, 0.072: as many digits as people need, and no power of ten for what is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def shown_count(count: float) -> str:
    """1.5 T, 4.19 M, 512: three digits are enough for people."""
    for unit, factor in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g}"


def shown_ranks(ranks: Sequence[int]) -> str:
    """Rising numbers as people write them: "0-3, 8, 12-15"; the first eight runs of them."""
    runs = list[list[int]]()
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:8]]
    return ", ".join(told) + (", ..." if len(runs) > 8 else "")


def shown_duration(span: timedelta | float) -> str:
    """3d4h, 2h5m, 4m10s, 12s."""
    total = int(span.total_seconds() if isinstance(span, timedelta) else span)
    for size, big, step, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if total >= size:
            rest = total % size // step
            return f"{total // size}{big}" + (f"{rest}{small}" if rest else "")
    return f"{total}s"
