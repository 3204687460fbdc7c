"""Jobs that are there: list, show, explain; and what they saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import arrays, decision_history, output
from whaleflux.cli.filters import Since, Sort, contains, enum_words, ordered, since_s, wanted, words
from whaleflux.cli.following import attempt_number
from whaleflux.cli.output import Column, Format
from whaleflux.cli.plan_words import alternative
from whaleflux.cli.state import JobArgument, NoHeaders, Output, fleet, job_name, pages

_ENDED_SHOWN, _ENDED_WITHIN_S = 10, 86_400.0


def gpus_of(spec: Any, gpus: int) -> str:
    """8, or 2 x 20 GB and 2 x 1g.18gb where each rank has a part of a GPU."""
    from whaleflux.quantities import shown_bytes

    gpu = spec.gpu
    least = f"MIG >= {shown_bytes(gpu.mig_memory_bytes)}" if gpu.mig_memory_bytes else ""
    part = shown_bytes(gpu.share_memory_bytes) if gpu.share_memory_bytes else gpu.mig_profile or least
    return f"{gpus} x {part}" if part else str(gpus)


def gpus_now(job: Any) -> int:
    """What a job has at present that may have another number than it asks for, else that."""
    placed = sum(len(task.gpu_uuids) for task in job.attempt.tasks) if _is_placed(job) else 0
    may_differ = job.spec.elastic.min or job.spec.gpu.options
    return placed if may_differ and placed else int(job.spec.gpus)


def shown_gpus(job: Any) -> str:
    """8, or 16 (8-64) of an elastic job."""
    elastic = job.spec.elastic
    return (
        f"{gpus_now(job)} ({elastic.min}-{elastic.max or job.spec.gpus})"
        if elastic.min
        else gpus_of(job.spec, gpus_now(job))
    )


def jobs(
    queue: Annotated[str, typer.Argument(help="Queue; none: all queues.")] = "",
    all_: Annotated[bool, typer.Option("-a", "--all", help="All ended jobs too.")] = False,
    queue_option: Annotated[str, typer.Option("--queue", metavar="QUEUE", help="Of this queue.")] = "",
    state: Annotated[str, typer.Option("--state", help="In one of these states: running,queued.")] = "",
    user: Annotated[str, typer.Option("--user", help="Submitted by whoever has this in the name.")] = "",
    mine: Annotated[bool, typer.Option("--mine", help="Your own only.")] = False,
    since: Since = "",
    sort: Sort = "",
    members: Annotated[bool, typer.Option("--members", help="Each member of an array in a row of its own.")] = False,
    number: Annotated[int, typer.Option("-n", help="At most this many.", min=1, max=1_000_000)] = 100,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Show again at each change.")] = False,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Unfinished jobs, and up to ten that ended within a day.

    \b
      whaleflux jobs                        what runs and waits, and what ended lately
      whaleflux jobs research -a -n 20      20 of a queue, ended ones too
      whaleflux jobs --state failed --since 1d --user ann
      whaleflux jobs --mine                 your own, of those that you see
      whaleflux jobs --sort -cost           the most expensive first
      whaleflux jobs -o json | jq .[].name

    --since leaves out what had ended before; it and --state also find jobs that ended longer ago.
    COST is by what the nodes say that they cost; what is billed, by declared prices: whaleflux cost.
    """  # noqa: D301 - the escape tells click to keep the lines
    import time

    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2

    if watch and fmt is not Format.table:
        raise InvalidArgument(FieldViolation("-w", f"redraws a table; for -o {fmt.value} use WatchJobs of the SDK"))
    states = words(state, "--state", enum_words(scheduler_pb2.JobState, "JOB_STATE_"))
    oldest_s, columns = since_s(since), _job_columns()
    ordered([], columns, sort)  # a wrong word is told before the fleet is asked
    queue = queue or queue_option
    request = scheduler_pb2.ListJobsRequest(parent=names.queue(queue) if queue else "", show_ended=True, page_size=1000)
    with fleet() as client:
        own = _own(client) if mine else ""
        while True:
            request.page_token = ""
            listed = pages(client.scheduler.ListJobs, request, "jobs")
            if queue and not listed:  # a queue that is not there is told
                client.scheduler.GetQueue(scheduler_pb2.GetQueueRequest(name=request.parent), timeout=10)
            matching = [
                j for j in listed
                if wanted(states, output.job_state(j)) and contains(user, j.submitter) and own in ("", names.last(j.submitter))
                and (not j.end_time.seconds or j.end_time.seconds >= oldest_s)
            ]  # fmt: skip
            found = lately(matching, time.time(), all_=all_ or bool(states) or bool(since))
            if watch:
                output.clear_screen()
            rows = found if members or fmt is not Format.table else arrays.grouped(found, matching)
            output.show(ordered(rows, columns, sort)[:number], columns, fmt, headers=not no_headers,
                        empty=_no_jobs(listed))  # fmt: skip
            if not watch:
                break
            time.sleep(1)
    if len(rows) > number and fmt in {Format.table, Format.wide}:
        output.note(f"the first {number} of {len(rows)}; more with: whaleflux jobs -n {len(rows)}")
    if len(found) < len(matching) and fmt in {Format.table, Format.wide}:
        output.note(f"{len(matching) - len(found)} more have ended; see them with: whaleflux jobs -a")


def _own(client: Any) -> str:
    """The caller's name: whoever has several roles owns the same jobs in each."""
    from whaleflux.v1 import identity_pb2

    return names.last(client.identity.WhoAmI(identity_pb2.WhoAmIRequest(), timeout=10).subject)


def lately(listed: Sequence[Any], now_s: float, *, all_: bool) -> list[Any]:
    """Unfinished jobs, then those that ended, the last first: all of them, or up to ten of the last day."""
    unfinished = [j for j in listed if not j.end_time.seconds]
    ended = sorted((j for j in listed if j.end_time.seconds), key=lambda j: -j.end_time.seconds)
    recent = [j for j in ended if now_s - j.end_time.seconds <= _ENDED_WITHIN_S][:_ENDED_SHOWN]
    return [*unfinished, *(ended if all_ else recent)]


def _no_jobs(listed: Sequence[Any]) -> str:
    if listed:
        return "no such jobs; all of them: whaleflux jobs -a"
    return "no jobs yet; submit one with: whaleflux submit job.yaml"


def _job_columns() -> list[Column]:
    return [
        Column("NAME", lambda j: j.name),
        Column("STATE", lambda j: output.job_state(j) if j.state else j.state_message),  # an array's is in words
        Column("GPUS", shown_gpus, value=gpus_now),
        Column("STEP", lambda j: str(j.step) if j.step > 0 else "-", value=lambda j: int(j.step) if j.step > 0 else ""),
        Column("LOSS", lambda j: f"{j.loss:.4f}" if j.HasField("loss") else "-",
               value=lambda j: float(j.loss) if j.HasField("loss") else ""),
        Column("AGE", lambda j: output.age(j.create_time), value=lambda j: output.age_s(j.create_time)),
        Column("COST", lambda j: f"${j.cost_usd:.2f}", value=lambda j: round(j.cost_usd, 4)),
        Column("USER", lambda j: j.submitter, wide=True),
        Column("NODES", lambda j: ", ".join(t.node for t in j.attempt.tasks), wide=True),
        Column("ATTEMPT", lambda j: str(attempt_number(j) or "-"), wide=True, value=attempt_number),
        Column("RESTARTS", lambda j: f"{j.restarts}+{j.recoveries}", wide=True),
        Column("WHY", lambda j: j.state_message, wide=True),
    ]  # fmt: skip


def job(name: JobArgument, fmt: Output = Format.table) -> None:
    """One job in full."""
    from whaleflux.v1 import scheduler_pb2

    with fleet() as client:
        found = client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job_name(name)), timeout=10)
    history = f"whaleflux describe job {found.name}"
    next_ = f"whaleflux explain {found.name} | whaleflux logs -f {found.name} | {history}"
    output.show_one(found, [*job_lines(found), ("next", next_)], fmt)


def _task(task: Any) -> str:
    from whaleflux.quantities import shown_ranks

    following = range(task.first_rank, task.first_rank + (len(task.gpu_uuids) or task.ranks))
    return f"{task.node} ranks {shown_ranks(task.global_ranks or following)}"


def job_lines(found: Any) -> list[tuple[str, str]]:
    """What people want to know of a job first."""
    return [
        ("name", found.name),
        ("state", output.job_state(found) + (f": {found.state_message}" if found.state_message else "")),
        ("submitted", output.age(found.create_time) + " ago by " + (found.submitter or "unknown")),
        ("runs on" if _is_placed(found) else "ran on", ", ".join(map(_task, found.attempt.tasks))),
        ("size", _size(found)),
        ("split", "; ".join(filter(None, (found.attempt.split.words, found.attempt.split.why)))),
        ("isolation", "; ".join(dict.fromkeys(t.isolation for t in found.attempt.tasks if t.isolation))),
        ("still held", "; ".join(_stuck(found))),
        ("attempt", _attempt(found)),
        ("time limit", _time_limit(found)),
        ("priority", str(found.priority if found.HasField("priority") else found.spec.priority)),
        ("progress", _progress(found)),
        ("restored from", found.attempt.restore_checkpoint),
        ("cost", f"${found.cost_usd:.4f}" + f" so far, ${found.attempt.usd_per_hour:.2f}/h" * _is_placed(found)),
        ("cause", found.cause.message),
    ]


def _is_placed(job: Any) -> bool:
    """Whether nodes hold something for it now, rather than that they did for an attempt that is over."""
    return output.job_state(job) in ("STARTING", "RUNNING", "RECOVERING", "SUSPENDING")


def _size(job: Any) -> str:
    """Of an elastic job: how many GPUs it has, may have, and why it was resized last."""
    elastic = job.spec.elastic
    if not elastic.min:
        return ""
    step = f" in steps of {elastic.step}" if elastic.step > 1 else ""
    size = f"{gpus_now(job)} GPUs of {elastic.min} to {elastic.max or job.spec.gpus}{step}, {job.spec.gpus} wished for"
    ends = [attempt.end_reason for attempt in (*job.past_attempts, job.attempt)]
    why = next((end.removeprefix("resized: ") for end in reversed(ends) if end.startswith("resized: ")), "")
    return f"{size}; last resize: {why}" if why else size


def _attempt(job: Any) -> str:
    """Which it is, and how often the work failed, or a node was lost under it."""
    if not job.attempt.epoch:
        return ""
    counts = ((job.restarts, "restart"), (job.recoveries, "recovery"))
    told = [f"{count} {word if count == 1 else word.replace('recovery', 'recoverie') + 's'}" for count, word in counts]
    return f"{attempt_number(job)} ({', '.join(told)})"


def _stuck(job: Any) -> list[str]:
    """GPUs that stay taken since something of the job cannot be ended there."""
    tasks = [task for attempt in (*job.past_attempts, job.attempt) for task in attempt.tasks if task.stuck]
    return [f"{len(task.gpu_uuids)} GPUs of {task.node}, it cannot be ended there: {task.stuck}" for task in tasks]


def _time_limit(job: Any) -> str:
    """How long it may run in all, and what is left of that while it runs."""
    import time

    from whaleflux.quantities import shown_duration

    if not job.spec.HasField("time_limit"):
        return ""
    limit = f"{shown_duration(job.spec.time_limit.seconds)}"
    if not job.HasField("latest_end_time"):
        return f"{limit} of running, {shown_duration(job.run_s)} used by ended attempts"
    left_s = max(0.0, job.latest_end_time.seconds - time.time())
    return f"{limit} of running; ends in {shown_duration(left_s)} at the latest"


def _progress(job: Any) -> str:
    if job.step <= 0:
        return ""
    told = f"step {job.step}" + (f", loss {job.loss:.4f}" if job.HasField("loss") else "")
    silent = output.job_state(job) == "RUNNING" and job.HasField("step_time")
    return told + (f", completed {output.age(job.step_time)} ago" if silent else "")


def explain(
    name: JobArgument,
    history: Annotated[bool, typer.Option("--history", help="What was decided about it so far, and when.")] = False,
    fmt: Output = Format.table,
) -> None:
    """Why a job waits, or why it runs where it does and what else was considered.

    \b
      whaleflux explain llama-70b-sft       in queue default
      whaleflux explain research/sft-2      in queue research
      whaleflux explain sft-2 --history     each decision about it: waits and why, promises, placements, moves, preemptions
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2

    with fleet() as client:
        request = scheduler_pb2.ExplainJobRequest(name=job_name(name), history=history)
        answer = client.scheduler.ExplainJob(request, timeout=10)
    if fmt.is_json:
        output.show_one(answer, [], fmt)
        return
    if history:
        decision_history.show(answer)
        return
    output.say(
        f"{answer.job.name} is {output.job_state(answer.job)}"
        + (f": {answer.job.state_message}" if answer.job.state_message else "")
    )
    say_decision(answer.decision)


def say_decision(decision: Any) -> None:
    """Where it runs or why it waits, when it starts, what would start it sooner, and who goes first."""
    output.say(f"  {decision.summary}")
    for reason in decision.reasons:
        sooner = reason.removeprefix("sooner: ")
        output.say(f"  because    {reason}" if sooner == reason else f"  sooner     {sooner}")
    for other in decision.alternatives:
        output.say(f"  considered {alternative(other)}; ${other.usd_per_hour:.2f}/h")
    for exclusion in decision.exclusions:
        output.say(f"  excluded   {exclusion.nodes} node(s): {exclusion.constraint}")
    if decision.smallest_change:
        output.say(f"  to admit   {decision.smallest_change}")
    if decision.position:
        output.say(f"  position   {decision.position} in its queue")
    for place, other in enumerate(decision.ahead, 1):
        output.say(f"  ahead      {place}: {other}")
    if (more := decision.position - 1 - len(decision.ahead)) > 0:
        output.say(f"  ahead      and {more} more")


_READ_BY = {1: "any split", 2: "the same split", 3: "as many ranks"}  # of `Resharding`


def checkpoints(
    job_: Annotated[str, typer.Argument(metavar="[JOB]", help="Job; none: all jobs.")] = "",
    sort: Sort = "",
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What can be restored."""
    from whaleflux.quantities import shown_bytes
    from whaleflux.v1 import checkpoint_pb2, scheduler_pb2

    parent = job_name(job_) if job_ else "queues/-/jobs/-"
    with fleet() as client:
        request = checkpoint_pb2.ListCheckpointsRequest(parent=parent, page_size=1000)
        listed = pages(client.checkpoint.ListCheckpoints, request, "checkpoints")
        if job_ and not listed:  # a job that is not there is told
            client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=parent), timeout=10)
    columns = [
        Column("NAME", lambda c: c.name),
        Column("STATE", lambda c: output.enum_name(checkpoint_pb2.CheckpointState, c.state, "CHECKPOINT_STATE_")),
        Column("STEP", lambda c: str(c.step), value=lambda c: int(c.step)),
        Column("RANKS", lambda c: str(c.world_size), value=lambda c: int(c.world_size)),
        Column("AGE", lambda c: output.age(c.create_time), value=lambda c: output.age_s(c.create_time)),
        Column("SIZE", lambda c: shown_bytes(c.size_bytes) if c.size_bytes else "-", wide=True,
               value=lambda c: int(c.size_bytes)),
        Column("READ BY", lambda c: _READ_BY.get(c.resharding, "not known"), wide=True),
        Column("LOCATION", lambda c: c.location, wide=True),
    ]  # fmt: skip
    output.show(ordered(listed, columns, sort), columns, fmt, headers=not no_headers, empty="no checkpoints yet")
