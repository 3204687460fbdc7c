"""Costs in the words of people: classes, shares, bars, and until when usage is known."""

from __future__ import annotations

from datetime import UTC
from typing import Any

from whaleflux.cli import output
from whaleflux.cli.price_commands import usd

_WIDTH = 30  # characters of a bar
_CLASSES = {  # of the contract, in its order, in the words of people
    "USEFUL": "useful",
    "RECOMPUTE": "recompute",
    "BUBBLE": "pipeline bubble",
    "COMM_IN_NODE": "communication in a node",
    "COMM_AVOIDABLE": "cross-node, avoidable",
    "COMM_STRUCTURAL": "cross-node, structural",
    "HOST": "waiting for the host",
    "DATA": "waiting for data",
    "SAVE": "waiting for saves",
    "STARTUP": "starting",
    "ALLOCATED_IDLE": "held and idle",
    "IDLE": "free",
    "FRAGMENTED": "free, of no use to those waiting",
    "UNAVAILABLE": "out of service",
    "LOST": "lost in failures",
    "UNKNOWN": "unknown",
}
_NO_WASTE = ("USEFUL", "COMM_STRUCTURAL", "UNKNOWN")


def _classes(one: Any) -> dict[str, int]:
    from whaleflux.v1 import console_pb2 as pb

    return {pb.CostClass.Name(part.cost_class).removeprefix("COST_CLASS_"): part.micros for part in one.classes}


def wasted(one: Any) -> int:
    """Micro-dollars of a group that did nothing."""
    return sum(micros for name, micros in _classes(one).items() if name not in _NO_WASTE)


def most_of_it(one: Any) -> str:
    """The class that most of a group's waste is of."""
    found = {name: micros for name, micros in _classes(one).items() if name not in _NO_WASTE}
    name = max(found, key=lambda each: found[each], default="")
    return f"{_CLASSES.get(name, name.lower())} {usd(found[name])}" if name else "-"


def figures(one: Any, total: Any) -> tuple[str, ...]:
    """A group's bill, share, GPU-hours, and what of it was useful, wasted, unknown."""
    classes = _classes(one)
    unknown = classes.get("UNKNOWN", 0)
    parts = (classes.get("USEFUL", 0), wasted(one), unknown)
    share = f"{100 * one.bill_micros / total.bill_micros:.1f} %" if total.bill_micros else "-"
    return (usd(one.bill_micros), share, f"{one.gpu_hours:,.2f}", *(usd(part) for part in parts))


def rest(answer: Any) -> list[tuple[str, Any]]:
    """What is not in the groups, and all of it."""
    found = [("(all others)", answer.others)] if answer.HasField("others") else []
    found += [("(queues not yours)", answer.hidden)] if answer.HasField("hidden") else []
    return [*found, ("TOTAL", answer.total)]


def shown(key: str) -> str:
    """A group's key without what every key has."""
    if not key:
        return "(nobody)"
    for prefix in ("queues/", "models/", "sites/"):
        key = key.removeprefix(prefix)
    return key.replace("/jobs/", "/").replace("/nodes/", "/").replace("T00:00:00Z", "")


def waterfall(one: Any) -> None:
    """Every class as a bar, in order, from the bill down."""
    classes = _classes(one)
    most = max((abs(micros) for micros in classes.values()), default=0)
    rows = []
    for name, words in _CLASSES.items():
        if micros := classes.get(name, 0):
            share = f"{100 * micros / one.bill_micros:.1f} %" if one.bill_micros else "-"
            rows.append((words, usd(micros), share, "#" * max(1, round(_WIDTH * abs(micros) / most))))
    output.table(("WHAT FOR", "USD", "SHARE", ""), rows)


def expected(found: Any) -> str:
    """Of the whole month, for people."""
    if not found.HasField("expected_micros"):
        return "unknown: fewer than 3 whole days are in the ledger"
    return f"{usd(found.expected_micros)} USD"


def within(found: Any) -> str:
    """Four of five months."""
    known = found.HasField("low_micros")
    return f"{usd(found.low_micros)} to {usd(found.high_micros)} USD" if known else "unknown: too few days to try it on"


def off(found: Any) -> str:
    """How far off such forecasts were."""
    return f"; half were off by {found.error_ppm / 10_000:.1f} % or less" if found.HasField("error_ppm") else ""


def say_about(answer: Any) -> None:
    """What the sums lack."""
    if answer.unpriced_gpu_hours >= 0.005:
        hours = f"{answer.unpriced_gpu_hours:,.2f} GPU-hours have no price and count as 0"
        output.note(f"{hours}; declare one with: whaleflux prices set NAME")
    if answer.damaged_files:
        output.note(f"not in it, since these files are damaged: {', '.join(answer.damaged_files)}")
    say_until(answer)


def say_until(answer: Any) -> None:
    """As of when they are."""
    if not answer.HasField("watermark"):
        output.note("nothing is in the ledger yet; see: whaleflux cost status")
        return
    still = ""
    if "open_since" in answer.DESCRIPTOR.fields_by_name and answer.HasField("open_since"):
        still = f"; hours since {at(answer, 'open_since')} are not closed and may change"
    output.note(f"usage known until {at(answer, 'watermark')}{still}")


def at(one: Any, field: str) -> str:
    """A time of a message, UTC; - where it is not set."""
    return f"{getattr(one, field).ToDatetime(tzinfo=UTC):%Y-%m-%dT%H:%MZ}" if one.HasField(field) else "-"
