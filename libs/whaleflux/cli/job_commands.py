"""Jobs: plan and submit, follow, explain, logs, cancel; and what they saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from whaleflux.cli import output
from whaleflux.cli.fleet_commands import confirm
from whaleflux.cli.output import Column, Format
from whaleflux.cli.state import JobArgument, NoHeaders, Output, Yes, fleet, job_name, pages

File = Annotated[str, typer.Argument(help="Job file, or - for stdin.")]
_SHOWN = 10


def _read(file: str) -> tuple[str, Path]:
    """Text of a file and the folder that its relative paths are below."""
    from whaleflux.errors import FieldViolation, Invalid

    try:
        if file == "-":
            return sys.stdin.read(2 << 20), Path.cwd()
        with Path(file).open(encoding="utf-8") as stream:
            return stream.read(2 << 20), Path(file).resolve().parent
    except OSError as error:
        raise Invalid(FieldViolation("file", f"cannot read {file}: {error.strerror}")) from None
    except UnicodeDecodeError:
        raise Invalid(FieldViolation("file", f"{file} is not UTF-8 text")) from None


def _state(job: Any) -> str:
    from whaleflux.v1 import scheduler_pb2

    return output.enum_name(scheduler_pb2.JobState, job.state, "JOB_STATE_")


def show_plan(decision: Any, stream: TextIO) -> None:
    """What would happen now."""
    lines = [f"PLAN  {decision.summary}"]
    if decision.placed:
        lines.append(f"  cost       ${decision.usd_per_hour:.2f}/h")
    lines += [f"  why here   {reason}" for reason in decision.reasons[:4]]
    for other in decision.alternatives[:2]:
        more = f" ({other.relative_communication:.1f}x the communication)" if other.relative_communication else ""
        lines.append(f"  next best  {other.summary}{more}")
    lines += [f"  excluded   {e.nodes} node(s): {e.constraint}" for e in decision.exclusions[:_SHOWN]]
    if decision.smallest_change:
        lines.append(f"  to admit   {decision.smallest_change}")
    if decision.ahead:
        lines.append(f"  ahead      {len(decision.ahead)} job(s), first {decision.ahead[0]}")
    lines.append("  preempts   " + (", ".join(decision.preempts[:_SHOWN]) or "nothing"))
    print("\n".join(lines), file=stream)


def submit(
    file: File,
    yes: Yes = False,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Do not follow.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the plan.")] = False,
    fmt: Output = Format.table,
) -> None:
    """Plans a job file, asks, submits it, and follows it. Ctrl-C stops following, not the job.

    \b
      whaleflux submit job.yaml             plan, ask, run, follow
      whaleflux submit job.yaml --dry-run   only the plan
      whaleflux submit job.yaml -y -d       do not ask, do not follow
      make-job | whaleflux submit - -y      from a pipe

    Exit code: 0 submitted (or, when followed, succeeded), 1 the job failed or you said no, 2 the file is wrong.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli.manifests import job_from_yaml
    from whaleflux.errors import FieldViolation, Invalid
    from whaleflux.names import ulid
    from whaleflux.v1 import scheduler_pb2

    if file == "-" and not (yes or dry_run):
        raise Invalid(FieldViolation("--yes", "a job file from stdin cannot be asked about; add -y"))
    manifest = job_from_yaml(*_read(file))
    request = scheduler_pb2.CreateJobRequest(
        parent=f"queues/{manifest.queue}",
        job_id=manifest.job_id,
        job=scheduler_pb2.Job(spec=manifest.spec),
        request_id=ulid(),
    )
    with fleet() as client:
        request.validate_only = True
        planned = client.scheduler.CreateJob(request, timeout=20)
        show_plan(planned.decision, sys.stdout if fmt is Format.table else sys.stderr)
        if dry_run:
            if fmt is not Format.table:
                output.show_one(planned, [], fmt)
            return
        confirm("submit?", yes)
        request.validate_only = False
        job = client.scheduler.CreateJob(request, timeout=20)
        if fmt is Format.table:
            output.note(f"submitted {job.name}")
        else:
            output.show_one(job, [], fmt)
        if not detach and fmt is Format.table:
            raise typer.Exit(follow(client, job.name))


def follow(client: Any, name: str) -> int:
    """Says each change of a job until it ends; 0 when it succeeded."""
    from whaleflux.v1 import scheduler_pb2

    last = ""
    try:
        for job in client.follow_job(name):
            where = ", ".join(task.node for task in job.attempt.tasks)
            line = (
                f"{_state(job)}"
                + (f" on {where}" if where else "")
                + (f": {job.state_message}" if job.state_message else "")
            )
            if line != last:
                last = line
                print(line, flush=True)
    except KeyboardInterrupt:
        output.note(f"\nstopped following; the job goes on. Follow it again with: whaleflux logs -f {name}")
        return 0
    return 0 if job.state == scheduler_pb2.JOB_STATE_SUCCEEDED else 1


def validate(file: File) -> None:
    """Checks a job or model file without a fleet."""
    from whaleflux.cli.manifests import is_model, job_from_yaml, model_from_yaml

    text, base = _read(file)
    served = is_model(text)
    (model_from_yaml if served else job_from_yaml)(text, base)
    output.note(
        f"{file} is a valid {'model' if served else 'job'} file; next: whaleflux {'serve' if served else 'submit'} {file}"
    )


def jobs(
    queue: Annotated[str, typer.Argument(help="Queue; none: all queues.")] = "",
    all_: Annotated[bool, typer.Option("-a", "--all", help="Ended jobs too.")] = False,
    number: Annotated[int, typer.Option("-n", help="At most this many.", min=1)] = 100,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Show again at each change.")] = False,
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """Unfinished jobs and the last that ended.

    \b
      whaleflux jobs                        what runs and waits
      whaleflux jobs research -a -n 20      the last 20 of a queue, ended ones too
      whaleflux jobs -o json | jq .[].name
    """  # noqa: D301 - the escape tells click to keep the lines
    import time

    from whaleflux.errors import FieldViolation, Invalid
    from whaleflux.v1 import scheduler_pb2

    if watch and fmt is not Format.table:
        raise Invalid(FieldViolation("-w", f"redraws a table; for -o {fmt.value} use WatchJobs of the SDK"))
    request = scheduler_pb2.ListJobsRequest(parent=f"queues/{queue}" if queue else "", show_ended=True, page_size=1000)
    with fleet() as client:
        while True:
            request.page_token = ""
            listed = pages(client.scheduler.ListJobs, request, "jobs")
            unfinished = [j for j in listed if not j.end_time.seconds]
            ended = sorted((j for j in listed if j.end_time.seconds), key=lambda j: -j.end_time.seconds)
            if watch:
                print("\033[2J\033[H", end="")
            output.show([*unfinished, *(ended if all_ else ended[:1])][:number], _job_columns(), fmt, headers=not no_headers,
                        empty="no jobs yet; submit one with: whaleflux submit job.yaml")  # fmt: skip
            if not watch:
                return
            time.sleep(1)


def _job_columns() -> list[Column]:
    return [
        Column("NAME", lambda j: j.name),
        Column("STATE", _state),
        Column("GPUS", lambda j: str(j.spec.gpus)),
        Column("STEP", lambda j: str(j.step) if j.step > 0 else "-"),
        Column("LOSS", lambda j: f"{j.loss:.4f}" if j.step > 0 else "-"),
        Column("AGE", lambda j: output.age(j.create_time)),
        Column("COST", lambda j: f"${j.cost_usd:.2f}"),
        Column("NODES", lambda j: ", ".join(t.node for t in j.attempt.tasks), wide=True),
        Column("EPOCH", lambda j: str(j.epoch), wide=True),
        Column("RESTARTS", lambda j: f"{j.restarts}+{j.recoveries}", wide=True),
        Column("WHY", lambda j: j.state_message, wide=True),
    ]


def job(name: JobArgument, fmt: Output = Format.table) -> None:
    """One job in full."""
    from whaleflux.v1 import scheduler_pb2

    with fleet() as client:
        found = client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=job_name(name)), timeout=10)
    task = lambda t: f"{t.node} ranks {t.first_rank}-{t.first_rank + len(t.gpu_indices) - 1}"  # noqa: E731
    lines = [
        ("name", found.name),
        ("state", _state(found) + (f": {found.state_message}" if found.state_message else "")),
        ("submitted", output.age(found.create_time) + " ago by " + (found.submitter or "unknown")),
        ("runs on", ", ".join(map(task, found.attempt.tasks))),
        ("attempt", f"{found.epoch} ({found.restarts} restarts, {found.recoveries} recoveries)"),
        ("progress", f"step {found.step}, loss {found.loss:.4f}" if found.step > 0 else ""),
        ("restored from", found.attempt.restore_checkpoint),
        ("cost", f"${found.cost_usd:.4f} so far, ${found.attempt.usd_per_hour:.2f}/h"),
        ("cause", found.cause.message),
        ("next", f"whaleflux explain {found.name} | whaleflux logs -f {found.name}"),
    ]
    output.show_one(found, lines, fmt)


def explain(name: JobArgument, fmt: Output = Format.table) -> None:
    """Why a job waits, or why it runs where it does and what else was considered.

    \b
      whaleflux explain llama-70b-sft       in queue default
      whaleflux explain research/sft-2      in queue research
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2

    with fleet() as client:
        answer = client.scheduler.ExplainJob(scheduler_pb2.ExplainJobRequest(name=job_name(name)), timeout=10)
    if fmt is Format.json:
        output.show_one(answer, [], fmt)
        return
    print(
        f"{answer.job.name} is {_state(answer.job)}"
        + (f": {answer.job.state_message}" if answer.job.state_message else "")
    )
    decision = answer.decision
    print(f"  {decision.summary}")
    for reason in decision.reasons:
        print(f"  because    {reason}")
    for other in decision.alternatives:
        print(
            f"  considered {other.summary} ({other.relative_communication:.1f}x the communication, ${other.usd_per_hour:.2f}/h)"
        )
    for exclusion in decision.exclusions:
        print(f"  excluded   {exclusion.nodes} node(s): {exclusion.constraint}")
    if decision.smallest_change:
        print(f"  to admit   {decision.smallest_change}")
    if decision.position:
        print(
            f"  position   {decision.position} in its queue"
            + (f", after {decision.ahead[0]}" if decision.ahead else "")
        )


def logs(
    name: JobArgument,
    follow_: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is written.")] = False,
    rank: Annotated[int, typer.Option("--rank", help="Only this rank; default: rank 0. -1: all ranks.", min=-1)] = 0,
    tail: Annotated[int, typer.Option("--tail", help="Only the last lines.", min=0)] = 0,
) -> None:
    """What a job's processes print. Ctrl-C stops reading, not the job.

    \b
      whaleflux logs -f llama-70b-sft       rank 0, on and on
      whaleflux logs --rank -1 --tail 20 J  the last lines of every rank
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2

    request = scheduler_pb2.StreamLogsRequest(
        name=job_name(name), rank=max(rank, 0), all_ranks=rank < 0, follow=follow_, tail_lines=tail
    )
    with fleet() as client:
        try:
            for chunk in client.scheduler.StreamLogs(request):
                _print_lines(chunk, prefix=rank < 0)
        except KeyboardInterrupt:
            output.note("\nstopped reading; the job goes on")


def _print_lines(chunk: Any, *, prefix: bool) -> None:
    if not prefix:
        sys.stdout.buffer.write(chunk.data)
    else:
        for line in chunk.data.splitlines(keepends=True):
            sys.stdout.buffer.write(f"[{chunk.rank}] ".encode() + line)
    sys.stdout.buffer.flush()


def cancel(
    name: JobArgument, message: Annotated[str, typer.Option("-m", "--message", help="Why.")] = "", yes: Yes = False
) -> None:
    """Stops a job: SIGTERM to its ranks, SIGKILL after its grace."""
    from whaleflux.v1 import scheduler_pb2

    with fleet() as client:
        confirm(f"cancel {job_name(name)}?", yes)
        ended = client.scheduler.CancelJob(
            scheduler_pb2.CancelJobRequest(name=job_name(name), reason=message), timeout=10
        )
    output.note(f"{ended.name} is {_state(ended)}")


def delete(name: JobArgument, yes: Yes = False) -> None:
    """Deletes the record of a job that has ended."""
    from whaleflux.v1 import scheduler_pb2

    with fleet() as client:
        confirm(f"delete the record of {job_name(name)}?", yes)
        client.scheduler.DeleteJob(scheduler_pb2.DeleteJobRequest(name=job_name(name)), timeout=10)
    output.note("deleted")


def checkpoints(
    job_: Annotated[str, typer.Argument(metavar="[JOB]", help="Job; none: all jobs.")] = "",
    fmt: Output = Format.table,
    no_headers: NoHeaders = False,
) -> None:
    """What can be restored."""
    from whaleflux.cli.quantities import shown_bytes
    from whaleflux.v1 import checkpoint_pb2

    parent = job_name(job_) if job_ else "queues/-/jobs/-"
    with fleet() as client:
        request = checkpoint_pb2.ListCheckpointsRequest(parent=parent, page_size=1000)
        listed = pages(client.checkpoint.ListCheckpoints, request, "checkpoints")
    columns = [
        Column("NAME", lambda c: c.name),
        Column("STATE", lambda c: output.enum_name(checkpoint_pb2.CheckpointState, c.state, "CHECKPOINT_STATE_")),
        Column("STEP", lambda c: str(c.step)),
        Column("RANKS", lambda c: str(c.world_size)),
        Column("AGE", lambda c: output.age(c.create_time)),
        Column("SIZE", lambda c: shown_bytes(c.size_bytes) if c.size_bytes else "-", wide=True),
        Column("LOCATION", lambda c: c.location, wide=True),
    ]
    output.show(listed, columns, fmt, headers=not no_headers, empty="no checkpoints yet")


def queues(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Queues."""
    from whaleflux.v1 import scheduler_pb2

    with fleet() as client:
        listed = pages(client.scheduler.ListQueues, scheduler_pb2.ListQueuesRequest(), "queues")
    columns = [
        Column("NAME", lambda q: q.name),
        Column("WEIGHT", lambda q: f"{q.weight or 1:g}"),
        Column("MAX GPUS", lambda q: str(q.max_gpus or "-")),
        Column("AGE", lambda q: output.age(q.create_time)),
    ]
    output.show(listed, columns, fmt, headers=not no_headers)
