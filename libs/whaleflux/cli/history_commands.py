"""What jobs and their attempts were and cost, also of jobs whose records are deleted: accounting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import arrays, output
from whaleflux.cli.event_commands import Until
from whaleflux.cli.filters import Since, Sort, enum_words, ordered, since_s, words
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import NoHeaders, Output, fleet, job_name, node_name

if TYPE_CHECKING:
    from whaleflux.sdk.client import Client
    from whaleflux.v1.scheduler_pb2 import AccountRecord, ListJobHistoryRequest

MOST = 100_000  # records that are read at once; narrow it by time for more
_PAGE = 500


def history(
    job: Annotated[
        str, typer.Argument(metavar="[JOB]", help="Job: name, queue/name or full name; none: all jobs.")
    ] = "",
    attempts: Annotated[bool, typer.Option("-a", "--attempts", help="Each attempt too; always with a JOB.")] = False,
    queue: Annotated[str, typer.Option("--queue", metavar="QUEUE", help="Of this queue.")] = "",
    state: Annotated[str, typer.Option("--state", help="In one of these states: succeeded,failed.")] = "",
    user: Annotated[str, typer.Option("--user", help="Submitted by whoever has this in the name.")] = "",
    node: Annotated[str, typer.Option("--node", help="That ran on this node.")] = "",
    since: Since = "",
    until: Until = "",
    sort: Sort = "",
    number: Annotated[
        int,
        typer.Option(
            "-n", help="The last so many jobs, or the first so many of --sort; not with --since.", min=1, max=10_000
        ),
    ] = 100,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What jobs were and cost, the last that ended first; also when their records are deleted. With totals.

    \b
      whaleflux history --since yesterday             what ran since, and what it cost
      whaleflux history llama-70b-sft                 each attempt: where, how long, why it ended, its cost
      whaleflux history --user ann --since 30d --sort -cost
      whaleflux history --since 2026-11-01 --until 2026-12-01 -o csv > november.csv

    Kept for 400 days (setting accounting_days of inventory). --since: what had not ended before, --until: what was submitted before.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2

    shown_columns = columns()
    ordered([], shown_columns, sort)  # a wrong word is told before the fleet is asked
    states = words(state, "--state", enum_words(scheduler_pb2.JobState, "JOB_STATE_"))
    request = scheduler_pb2.ListJobHistoryRequest(
        parent=names.queue(queue) if queue else "",
        job=job_name(job) if job else "",
        user=user,
        states=[f"JOB_STATE_{word}" for word in sorted(states)],
        show_attempts=attempts or bool(job),
    )
    for field, text in (("since", since), ("until", until)):
        if text:
            getattr(request, field).FromNanoseconds(int(since_s(text, f"--{field}") * 1e9))
    with fleet() as client:
        request.node = node_name(client, node) if node else ""
        found = records(client, request, MOST if since or sort else number)
        if job and not found:
            found = [
                one for member in arrays.members(client, request.job) for one in _of_member(client, request, member)
            ]
        if job and not found:
            client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=request.job), timeout=10)  # raises NotFound
    shown = ordered(found, shown_columns, sort) if sort else in_order(found)
    if sort and not (since or request.show_attempts):
        shown = shown[:number]  # the dearest of all, not of the newest
    output.show(shown, shown_columns, fmt, headers=not no_headers, empty="no such jobs are kept", name=lambda r: r.job)
    if shown and fmt in {Format.table, Format.wide}:
        (output.note if no_headers else output.say)(totals(shown))  # scripts that ask for rows alone get rows alone


def _of_member(client: Client, request: ListJobHistoryRequest, member: Any) -> list[AccountRecord]:
    """The record of one member of an array, without its attempts."""
    request.job, request.show_attempts, request.page_token = member.name, False, ""
    return records(client, request, 1)


def records(client: Client, request: ListJobHistoryRequest, most: int) -> list[AccountRecord]:
    """The last `most` jobs, with their attempts where these are asked for; each record once."""
    request.page_size = min(most, _PAGE)
    found: dict[tuple[str, str, int], AccountRecord] = {}
    while True:
        answer = client.scheduler.ListJobHistory(request, timeout=20)
        for record in answer.records:
            found.setdefault((record.job, record.uid, record.attempt), record)
        jobs = sum(not record.attempt for record in found.values())
        if not answer.next_page_token or jobs >= most or len(found) >= MOST:
            break
        request.page_token = answer.next_page_token
    if not request.show_attempts:
        return list(found.values())[:most]
    return list(found.values())


def in_order(found: Sequence[AccountRecord]) -> list[AccountRecord]:
    """Each job followed by its attempts, in the order in which jobs came; attempts whose job was not asked for come last."""
    first: dict[tuple[str, str], int] = {}
    for place, record in enumerate(found):
        if not record.attempt:
            first.setdefault((record.job, record.uid), place)
    return sorted(found, key=lambda r: (first.get((r.job, r.uid), len(found)), r.job, r.uid, r.attempt))


def totals(found: Sequence[AccountRecord]) -> str:
    """One line: what all of it held and cost. A job's own record has the sum of its attempts."""
    jobs = [record for record in found if not record.attempt]
    counted = jobs or found
    what = f"{len(jobs)} job{'s' * (len(jobs) != 1)}" if jobs else f"{len(found)} attempt{'s' * (len(found) != 1)}"
    tried = sum(record.attempts for record in jobs)
    told = f"{what}, {tried} attempt{'s' * (tried != 1)}" if jobs else what
    hours, usd = sum(r.gpu_s for r in counted) / 3600, sum(r.cost_usd for r in counted)
    return f"total: {told}, {hours:.2f} GPU-hours, ${usd:.2f}"


def columns() -> list[Column]:
    """Of a job or an attempt; spans are seconds and times Unix seconds for programs."""
    return [
        Column("JOB", lambda r: r.job),
        Column("ATTEMPT", lambda r: str(r.attempt) if r.attempt else f"of {r.attempts}", value=lambda r: int(r.attempt)),
        Column("STATE", _state),
        Column("GPUS", gpus, value=lambda r: int(r.gpus)),
        Column("SUBMITTED", lambda r: _time(r.create_time), value=lambda r: _unix(r.create_time)),
        Column("WAITED", lambda r: "-" if r.attempt else _span(r.create_time, _waited_until(r)),
               value=lambda r: "" if r.attempt else _seconds(r.create_time, _waited_until(r))),
        Column("RAN", lambda r: _span(r.start_time, r.end_time), value=lambda r: _seconds(r.start_time, r.end_time)),
        Column("EXIT", lambda r: exit_text(r.exit_code), value=lambda r: int(r.exit_code)),
        Column("STEP", lambda r: str(r.step) if r.step > 0 else "-", value=lambda r: int(r.step) if r.step > 0 else ""),
        Column("LOSS", lambda r: f"{r.loss:.4f}" if r.HasField("loss") else "-",
               value=lambda r: float(r.loss) if r.HasField("loss") else ""),
        Column("GPU-H", lambda r: f"{r.gpu_s / 3600:.2f}", value=lambda r: round(r.gpu_s / 3600, 6)),
        Column("COST", lambda r: f"${r.cost_usd:.2f}", value=lambda r: round(r.cost_usd, 6)),
        Column("USER", lambda r: r.submitter, wide=True),
        Column("STARTED", lambda r: _time(r.start_time), wide=True, value=lambda r: _unix(r.start_time)),
        Column("ENDED", lambda r: _time(r.end_time), wide=True, value=lambda r: _unix(r.end_time)),
        Column("NODES", nodes, wide=True),
        Column("WHY", lambda r: r.end_reason, wide=True),
        Column("UID", lambda r: r.uid, wide=True),
    ]  # fmt: skip


def _waited_until(record: Any) -> Any:
    """The start; of what never ran the end, if there is one."""
    return record.start_time if record.HasField("start_time") else record.end_time


def _state(record: Any) -> str:
    """Of a job its state; of an attempt the word for its end, or that it is on."""
    if not record.attempt:
        return output.job_state(record)
    return str(record.end_reason).partition(":")[0] if record.HasField("end_time") else "running"


def gpus(record: Any) -> str:
    """4 x H200; the number alone where types are not known."""
    types = [f"{count} x {model}" for model, count in sorted(record.gpus_by_model.items())]
    return " + ".join(types) or str(record.gpus)


def nodes(record: Any) -> str:
    """Names, and how many more."""
    more = record.node_count - len(record.nodes)
    return ", ".join(record.nodes) + (f" and {more} more" if more > 0 else "")


def exit_text(code: int) -> str:
    """Exit code, or the signal's name; "-" for none."""
    from whaleflux.manifests.shell_text import signal_name

    if code < 0:
        return signal_name(-code)
    return str(code) if code else "-"


def _time(stamp: Any) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(stamp.seconds)) if stamp.seconds else "-"


def _unix(stamp: Any) -> float | str:
    return float(stamp.ToNanoseconds() / 1e9) if stamp.seconds else ""


def _seconds(begin: Any, end: Any) -> float | str:
    """Seconds between; up to now while it is on; "" when it has not begun."""
    import time

    if not begin.seconds:
        return ""
    until = end.ToNanoseconds() / 1e9 if end.seconds else time.time()
    return float(round(max(0.0, until - begin.ToNanoseconds() / 1e9), 3))


def _span(begin: Any, end: Any) -> str:
    from whaleflux.quantities import shown_duration

    seconds = _seconds(begin, end)
    return shown_duration(seconds) if isinstance(seconds, float) else "-"
