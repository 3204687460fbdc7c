"""Moving running jobs so that those who wait find room, or to run closer or cheaper: what would be moved, and doing it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output, Yes, confirm, fleet

rebalance = typer.Typer(no_args_is_help=True, help="Moves of running jobs: what is worth it, and doing it.")

_BY_ITSELF = {
    "off": "the scheduler proposes nothing by itself (setting rebalance: off)",
    "plan": "the scheduler tells such moves in events, and leaves them to you (setting rebalance: plan)",
    "on": "the scheduler makes such moves by itself, each minute (setting rebalance: on)",
}


@rebalance.command("plan")
def plan(fmt: Output = Format.table) -> None:
    """Which running jobs could go on elsewhere so that others start, or to run closer or cheaper. Changes nothing.

    \b
      whaleflux rebalance plan
      whaleflux rebalance plan -o json
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        found = client.scheduler.PlanRebalance(pb.PlanRebalanceRequest(), timeout=30)
    _show(found, fmt)
    if fmt is Format.table:
        output.note(_BY_ITSELF.get(found.mode, ""))


@rebalance.command("apply")
def apply(
    etag: Annotated[
        str, typer.Argument(metavar="[ETAG]", help="A plan that was looked at before; else one is made now.")
    ] = "",
    yes: Yes = False,
    fmt: Output = Format.table,
) -> None:
    """Carries out a plan: the jobs save, stop, and go on at their new places. It is refused when something changed since it was made.

    \b
      whaleflux rebalance apply                      shows a plan, and asks
      whaleflux rebalance apply 5f0c1d2e9a7b3c44 --yes
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    with fleet() as client:
        if not etag:
            found = client.scheduler.PlanRebalance(pb.PlanRebalanceRequest(), timeout=30)
            if not found.proposals:
                _show(found, fmt)
                return
            etag = found.etag
        elif not yes:
            found = client.scheduler.ApplyRebalance(pb.ApplyRebalanceRequest(etag=etag, validate_only=True), timeout=30)
        if not yes:
            with contextlib.redirect_stdout(sys.stderr):  # what is done comes after it, for programs too
                _show(found, Format.table)
        confirm("move these jobs?", yes)
        done = client.scheduler.ApplyRebalance(pb.ApplyRebalanceRequest(etag=etag), timeout=30)
    _show(done, fmt)
    movers = sum(len(proposal.moves) for proposal in done.proposals)
    output.note(f"{movers} job{'s' * (movers != 1)} will go on elsewhere; watch with: whaleflux events --what MOVED")


def _show(plan: Any, fmt: Format) -> None:
    if fmt.is_json:
        output.say_json(output.as_json(plan), fmt)
        return
    if fmt is not Format.table:
        from whaleflux.errors import FieldViolation, InvalidArgument

        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a plan; use table or json"))
    if not plan.proposals:
        output.say("no move is worth what it costs now")
        return
    headers = ("JOB", "GPUS", "FROM", "TO", "COSTS", "GAINS", "FOR")
    output.table(headers, [row for proposal in plan.proposals for row in _rows(proposal)])
    left = plan.budget_left_gpu_s / 3600
    output.say("", f"plan {plan.etag}; moves may cost {left:.3g} GPU-hours more today")


def _rows(proposal: Any) -> list[Sequence[str]]:
    gains = [f"{proposal.gain_gpu_s / 3600:.2g} GPU-h"] * (proposal.gain_gpu_s >= 1)
    gains += [f"${proposal.gain_usd:.2f}"] * (proposal.gain_usd >= 0.005)
    return [
        (
            move.job,
            str(sum(len(part.gpu_uuids) for part in move.to)),
            _places(getattr(move, "from")),
            _places(move.to),
            f"{move.cost_gpu_s / 3600:.2g} GPU-h",
            " + ".join(gains) if at == 0 else "",
            proposal.starts or "itself",
        )
        for at, move in enumerate(proposal.moves)
    ]


def _places(parts: Any) -> str:
    shown = [names.last(part.node) for part in parts]
    return ", ".join(shown[:3]) + f" and {len(shown) - 3} more" * (len(shown) > 3)
