"""Which costs: what `cost`, `waste` and budgets are narrowed and grouped by."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli.filters import since_s
from whaleflux.cli.state import fleet

CLASS = "class"  # of the bill: useful, idle and so on; every answer has them, so that the console is not asked for it
_BY = ("queue", "user", "job", "model", "site", "gpu", "node", "day", "hour", CLASS)
By = Annotated[str, typer.Option("--by", help=f"By what, up to three with commas: {', '.join(_BY)}.")]
Since = Annotated[str, typer.Option("--since", help="From when on: 7d, 24h, or a time such as 2026-11-01.")]
Until = Annotated[str, typer.Option("--until", help="Until when: a time; none: now.")]
Queue = Annotated[str, typer.Option("--queue", "-q", help="Only this queue.")]
User = Annotated[str, typer.Option("--user", help="Only this user, such as user/ann.")]
Site = Annotated[str, typer.Option("--site", help="Only this site.")]
Gpu = Annotated[str, typer.Option("--gpu", help="Only this class of GPU.")]
Model = Annotated[str, typer.Option("--model", help="Only this served model.")]
Most = Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most this many lines, the dearest.")]


def groupings(by: str) -> tuple[str, ...]:
    """Of --by. Raises InvalidArgument."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    found = tuple(word.strip() for word in by.split(",") if word.strip())
    wrong = [word for word in found if word not in _BY]
    if wrong or not 1 <= len(found) <= 3:
        said = f"{wrong[0]!r} is none of them" if wrong else "takes one to three"
        raise InvalidArgument(FieldViolation("--by", f"{said}; use up to three of {', '.join(_BY)}"))
    return found


def narrow(asked: Any, queue: str, user: str, site: str) -> None:
    """Sets them in a filter or a budget, as people write them: q, ann, onprem."""
    asked.queue = names.queue(queue.removeprefix("queues/")) if queue else ""
    asked.user = user if not user or "/" in user else f"user/{user}"
    asked.site = names.site(site.removeprefix("sites/")) if site else ""


def which(since: str, until: str, queue: str, user: str, site: str, gpu: str, model: str) -> Any:
    """As the contract's filter. Raises InvalidArgument naming the option that is wrong."""
    from whaleflux.v1 import console_pb2 as pb

    asked = pb.CostFilter(gpu_class=gpu)
    narrow(asked, queue, user, site)
    asked.model = names.model(model.removeprefix("models/")) if model else ""
    if until:
        asked.end_time.FromSeconds(int(since_s(until, "--until")))
    asked.start_time.FromSeconds(int(since_s(since)))
    return asked


def answered(asked: Any, groups: tuple[str, ...], limit: int) -> Any:
    """By the console."""
    from whaleflux.v1 import console_pb2 as pb

    by: list[Any] = [
        pb.CostGrouping.Value(f"COST_GROUPING_{'GPU_CLASS' if one == 'gpu' else one.upper()}")
        for one in groups
        if one != CLASS
    ]
    with fleet() as client:
        return client.console.GetCost(pb.GetCostRequest(filter=asked, group_by=by, limit=limit), timeout=30)
