"""What would save money: what the ledger shows, what was decided about it, and what that really saved."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Column, Format
from whaleflux.cli.price_commands import usd
from whaleflux.cli.state import NoHeaders, Output, fleet
from whaleflux.reasons import What

recommendations = typer.Typer(
    invoke_without_command=True,
    help="What would save money, by what the ledger shows of the last week, the dearest first.",
)
_KINDS = (
    "release_idle",
    "one_island",
    "defragment",
    "checkpoint_interval",
    "fewer_gpus",
    "hand_back",
    "slow_node",
    "commit",
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Recommendation.")]


@recommendations.callback()
def list_recommendations(
    context: typer.Context,
    hours: Annotated[int, typer.Option("--hours", min=1, max=840, help="Hours of the ledger, the last.")] = 168,
    kind: Annotated[str, typer.Option("--kind", help=f"Only this kind: {', '.join(_KINDS)}.")] = "",
    decided: Annotated[bool, typer.Option("--decided", help="Accepted and dismissed ones, too.")] = False,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What would save money.

    \b
      whaleflux cost recommendations
      whaleflux cost recommendations --kind release_idle --hours 24
      whaleflux cost recommendations accept release-idle-1f0c
    """  # noqa: D301 - the escape tells click to keep the lines
    if context.invoked_subcommand is not None:
        return
    answer = _asked(hours, kind, decided)
    if fmt.is_json:
        output.say_json(output.as_json(answer), fmt)
        return
    columns = [
        Column("NAME", lambda one: names.last(one.name)),
        Column("USD/MONTH", lambda one: usd(one.expected_micros_per_month)),
        Column("AT LEAST", lambda one: usd(one.low_micros_per_month)),
        Column("MONEY", lambda one: f"{one.cash_ppm / 10_000:.0f} %"),
        Column("RISK", lambda one: _word(one, "risk")),
        Column("EFFORT", lambda one: _word(one, "effort")),
        Column("ABOUT", lambda one: one.subject.removeprefix("queues/").replace("/jobs/", "/")),
        Column("WHAT", lambda one: one.change),
        Column("STATE", _state),
        Column("COMMAND", lambda one: one.command),
    ]
    empty = "the ledger shows nothing that would save money; what is wasted: whaleflux waste"
    output.show(list(answer.recommendations), columns, fmt, headers=not no_headers, empty=empty)
    _say_about(answer)


@recommendations.command("accept")
def accept(name: Name) -> None:
    """Says that it is being done, so that what it really saves is tracked. Its command does it."""
    from whaleflux.v1 import console_pb2 as pb

    with fleet() as client:
        done = client.console.AcceptRecommendation(pb.AcceptRecommendationRequest(name=_full(name)), timeout=20)
    output.note(f"{done.name} is accepted; do it with: {done.command}")
    output.note("what it saves is known a day later: whaleflux cost recommendations --decided")


@recommendations.command("dismiss")
def dismiss(
    name: Name, message: Annotated[str, typer.Option("--message", "-m", help="Why, for whoever asks later.")] = ""
) -> None:
    """Says that it will not be done; it comes again after 30 days if the ledger still shows it."""
    from whaleflux.v1 import console_pb2 as pb

    request = pb.DismissRecommendationRequest(name=_full(name), reason=message)
    with fleet() as client:
        done = client.console.DismissRecommendation(request, timeout=20)
    output.note(f"{done.name} is dismissed")
    if done.last_change.what == What.CHANGED:
        output.note(
            "it was decided before, which no longer counts: of an accepted one what it saves is not tracked any more"
        )


def _asked(hours: int, kind: str, decided: bool) -> Any:
    """All pages as one answer."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import console_pb2 as pb

    if kind and kind not in _KINDS:
        raise InvalidArgument(FieldViolation("--kind", f"{kind!r} is none of {', '.join(_KINDS)}"))
    number: Any = pb.RecommendationKind.Value(f"RECOMMENDATION_KIND_{kind.upper() or 'UNSPECIFIED'}")
    request = pb.ListRecommendationsRequest(window_hours=hours, kind=number, include_decided=decided, page_size=1000)
    with fleet() as client:
        answer = client.console.ListRecommendations(request, timeout=30)
        request.page_token = answer.next_page_token
        while request.page_token:
            more = client.console.ListRecommendations(request, timeout=30)
            answer.recommendations.extend(more.recommendations)
            request.page_token = more.next_page_token
    answer.next_page_token = ""
    return answer


def _full(name: str) -> str:
    return names.join(("recommendations", name.removeprefix("recommendations/")))


def _word(one: Any, field: str) -> str:
    from whaleflux.v1 import console_pb2 as pb

    return pb.RecommendationLevel.Name(getattr(one, field)).removeprefix("RECOMMENDATION_LEVEL_").lower()


def _state(one: Any) -> str:
    from whaleflux.v1 import console_pb2 as pb

    word = pb.RecommendationState.Name(one.state).removeprefix("RECOMMENDATION_STATE_").lower()
    return f"{word}, saves {usd(one.realised_micros_per_month)}" if one.HasField("realised_micros_per_month") else word


def _say_about(answer: Any) -> None:
    from whaleflux.v1 import console_pb2 as pb

    if answer.start_time == answer.end_time:
        output.note("no whole hour is in the ledger yet; see: whaleflux cost status")
        return
    start, end = (f"{one.ToDatetime():%Y-%m-%dT%H:%MZ}" for one in (answer.start_time, answer.end_time))
    total, targeted = usd(answer.total_micros_per_month), usd(answer.targeted_micros_per_month)
    bill = usd(answer.bill_micros_per_month)
    output.note(
        f"all open ones together save {total} of {targeted} USD that such waste costs a month, of {bill} in all"
    )
    output.note(f"made of {start} to {end}; MONEY is what of it is paid by the hour, the rest frees GPUs for others")
    for one in answer.records:
        word = pb.RecommendationKind.Name(one.kind).removeprefix("RECOMMENDATION_KIND_").lower()
        kept = f"{usd(one.realised_micros_per_month)} of {usd(one.promised_micros_per_month)} USD a month"
        output.note(f"{word}: {one.cases} accepted ones saved {kept} that they promised")
