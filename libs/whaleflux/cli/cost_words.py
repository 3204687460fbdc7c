"""Costs in the words of people: classes, shares, bars, and until when usage is known."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Any

from whaleflux.cli import output
from whaleflux.cli.cost_filters import CLASS
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
NO_WASTE = ("USEFUL", "COMM_STRUCTURAL", "UNKNOWN")


def _classes(one: Any) -> dict[str, int]:
    from whaleflux.v1 import console_pb2 as pb

    return {pb.CostClass.Name(part.cost_class).removeprefix("COST_CLASS_"): part.micros for part in one.classes}


def wasted(one: Any) -> int:
    """Micro-dollars of a group that did nothing."""
    return sum(micros for name, micros in _classes(one).items() if name not in NO_WASTE)


def _most_of_it(one: Any) -> str:
    """The class that most of a group's waste is of."""
    found = {name: micros for name, micros in _classes(one).items() if name not in NO_WASTE}
    name = max(found, key=lambda each: found[each], default="")
    return f"{_CLASSES.get(name, name.lower())} {usd(found[name])}" if name else "-"


def by_group(answer: Any, groups: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headers and rows of an answer, a row a group."""
    rows = [(*map(shown, one.keys), *_figures(one, answer.total)) for one in answer.groups]
    rows += [(label, *[""] * (len(groups) - 1), *_figures(one, answer.total)) for label, one in _rest(answer)]
    return [*(name.upper() for name in groups), "USD", "SHARE", "GPU-H", "USEFUL", "WASTE", "UNKNOWN"], rows


def by_class(
    answer: Any, groups: Sequence[str], without: Sequence[str] = ()
) -> tuple[list[str], list[tuple[str, ...]]]:
    """The same, a row for each class of each group's bill but those `without`. All rows but the last sum to it."""
    others = [name for name in groups if name != CLASS]
    parts = [([*map(shown, one.keys)], one) for one in answer.groups] if others else [([], answer.total)]
    parts += [([label, *[""] * (len(others) - 1)], one) for label, one in _rest(answer)[:-1]] if others else []
    found = [(keys, name, micros) for keys, one in parts for name, micros in _dearest(one) if name not in without]
    found.append(
        (
            ["TOTAL", *[""] * (len(others) - 1)] if others else [],
            "" if others else "TOTAL",
            sum(micros for *_, micros in found),
        )
    )
    rows = [
        (*keys, _CLASSES.get(name, name), usd(micros), _share(micros, answer.total)) for keys, name, micros in found
    ]
    return [*(name.upper() for name in others), "CLASS", "USD", "SHARE"], rows


def _dearest(one: Any) -> list[tuple[str, int]]:
    return sorted(_classes(one).items(), key=lambda item: -item[1])


def waste_by_group(answer: Any, groups: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headers and rows of what did nothing, the most first; without groups the whole."""
    found = sorted(answer.groups, key=wasted, reverse=True) if groups else [answer.total]
    rows = [(*map(shown, one.keys), usd(wasted(one)), _most_of_it(one), usd(one.bill_micros)) for one in found]
    return [*(name.upper() for name in groups), "WASTE USD", "MOST OF IT", "BILL USD"], rows


def _share(micros: int, total: Any) -> str:
    return f"{100 * micros / total.bill_micros:.1f} %" if total.bill_micros else "-"


def _figures(one: Any, total: Any) -> tuple[str, ...]:
    """A group's bill, share, GPU-hours, and what of it was useful, wasted, unknown."""
    classes = _classes(one)
    unknown = classes.get("UNKNOWN", 0)
    parts = (classes.get("USEFUL", 0), wasted(one), unknown)
    return (
        usd(one.bill_micros),
        _share(one.bill_micros, total),
        f"{one.gpu_hours:,.2f}",
        *(usd(part) for part in parts),
    )


def _rest(answer: Any) -> list[tuple[str, Any]]:
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
            rows.append((words, usd(micros), _share(micros, one), "#" * max(1, round(_WIDTH * abs(micros) / most))))
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
