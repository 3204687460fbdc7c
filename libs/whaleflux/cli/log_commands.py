"""What a job prints, or all members of an array."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from whaleflux.cli.filters import Since, since_s
from whaleflux.cli.state import MAX_LINES, MAX_RANK, JobArgument, fleet, job_name

_MAX_ATTEMPT = 2**31 - 1


class LogFormat(StrEnum):
    """-o FORMAT of logs."""

    text = "text"
    json = "json"
    jsonl = "jsonl"


def logs(
    name: JobArgument,
    follow_: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on as more is written, until the job ends.")
    ] = False,
    rank: Annotated[
        int, typer.Option("--rank", help="Only this rank; default: rank 0. -1: all ranks.", min=-1, max=MAX_RANK)
    ] = 0,
    tail: Annotated[int, typer.Option("--tail", help="Only the last lines.", min=0, max=MAX_LINES)] = 0,
    attempt: Annotated[
        int, typer.Option("--attempt", help="Only this attempt, from 1; 0: the newest.", min=0, max=_MAX_ATTEMPT)
    ] = 0,
    previous: Annotated[bool, typer.Option("-p", "--previous", help="Of the attempt before the newest.")] = False,
    since: Since = "",
    timestamps: Annotated[bool, typer.Option("--timestamps", help="When each line was written, UTC.")] = False,
    fmt: Annotated[
        LogFormat, typer.Option("-o", "--output", help="text, json (a list of the lines), or jsonl (an object a line).")
    ] = LogFormat.text,
) -> None:
    """What a job's processes print, or those of all members of an array. Ctrl-C stops reading, not the job.

    \b
      whaleflux logs -f llama-70b-sft         rank 0, on and on, until the job ends
      whaleflux logs --rank -1 --tail 20 J    the last lines of every rank
      whaleflux logs --previous J             why the attempt before this one ended
      whaleflux logs --since 10m --timestamps J
      whaleflux logs --tail 1 ARRAY           the last line of each member
      whaleflux logs -o jsonl J | jq -r .text  job, attempt, rank, time and text of each line

    A node keeps the output of the last 20 tasks that ended on it (its setting kept_tasks), of each rank the newest 32 MiB or more.
    Times are exact to half a second; those of old lines of a long output to minutes. With -f, json is an object a line, too.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import log_reading
    from whaleflux.cli.screen import ObjectScreen, Screen
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2

    if previous and attempt:
        raise InvalidArgument(FieldViolation("--previous", "is one attempt, and --attempt names one; give one of them"))
    as_json = fmt is not LogFormat.text
    request = scheduler_pb2.StreamLogsRequest(
        name=job_name(name), rank=max(rank, 0), all_ranks=rank < 0, follow=follow_, tail_lines=tail, attempt=attempt,
        times=timestamps or as_json,
    )  # fmt: skip
    if since:
        request.since_time.FromNanoseconds(max(0, int(since_s(since) * 1e9)))
    as_list = fmt is LogFormat.json and not follow_  # what goes on and on is no document
    screen = ObjectScreen(document=as_list) if as_json else Screen(ranks=rank < 0, times=timestamps)
    with fleet() as client:
        try:
            complete = log_reading.read(client, request, screen, previous=previous)
        except KeyboardInterrupt:
            screen.state("stopped reading; the job goes on")
            raise typer.Exit(130) from None
        finally:
            screen.close()
    if not complete:
        raise typer.Exit(1)
