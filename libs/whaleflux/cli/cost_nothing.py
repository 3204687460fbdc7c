"""Why sums are nothing: what the ledger's window has instead of the queue, user, site, model or class of GPU that was asked for."""

from __future__ import annotations

from typing import Any

from whaleflux.cli import output
from whaleflux.cli.absent_scopes import some_of
from whaleflux.cli.cost_words import at, shown
from whaleflux.cli.state import fleet

_MOST = 1_000
_WITHIN_S = 10
_FIELDS = {  # of the filter: grouping of the contract, in words, several
    "queue": ("QUEUE", "queue", "queues"),
    "user": ("USER", "user", "users"),
    "site": ("SITE", "site", "sites"),
    "gpu_class": ("GPU_CLASS", "class of GPU", "classes of GPU"),
    "model": ("MODEL", "model", "models"),
}


def is_nothing(total: Any) -> bool:
    """Whether nothing at all is in a sum."""
    return not (total.gpu_hours or total.bill_micros or total.classes)


def note_nothing(asked: Any) -> None:
    """Says on stderr what of a filter that nothing matches is not in its window, by what the caller may see; silent where that cannot be read."""
    from whaleflux.errors import StatusError

    narrowed = [field for field in _FIELDS if getattr(asked, field)]
    if not narrowed:
        return
    try:
        with fleet() as client:
            missing = [said for field in narrowed if (said := _missing(client, asked, field))]
    except StatusError:  # advice that nobody can give now
        return
    for said in missing or ["nothing in the ledger has all of that together in this window"]:
        output.note(said)


def note_rounded(asked: Any, answer: Any) -> None:
    """Says on stderr that an answer is of more than the times that were asked for."""
    early_s = asked.start_time.seconds - answer.start_time.seconds
    until = asked.HasField("end_time")
    if early_s <= 0 and not (until and answer.end_time.seconds > asked.end_time.seconds):
        return
    unit = "days, so far back," if early_s >= 3_600 else "hours"
    output.note(f"whole {unit} count: from {at(answer, 'start_time')}" + f" until {at(answer, 'end_time')}" * until)


def _missing(client: Any, asked: Any, field: str) -> str:
    """What is said of one value; nothing where the window has it, or has so much that nobody knows."""
    from whaleflux.v1 import console_pb2 as pb

    grouping, word, several = _FIELDS[field]
    window = pb.CostFilter(start_time=asked.start_time)
    if asked.HasField("end_time"):
        window.end_time.CopyFrom(asked.end_time)
    by: list[Any] = [pb.CostGrouping.Value(f"COST_GROUPING_{grouping}")]
    answer = client.console.GetCost(pb.GetCostRequest(filter=window, group_by=by, limit=_MOST), timeout=_WITHIN_S)
    there = {shown(group.keys[0]) for group in answer.groups if group.keys[0]}
    value = shown(getattr(asked, field))
    if value in there or answer.HasField("others"):
        return ""
    return f"nothing in the ledger has {word} {value} in this window; {several} there: {some_of(value, there)}"
