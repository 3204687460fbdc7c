"""Submitting a job: plan, ask, send, follow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer

from whaleflux.cli import creation, losses, output, submission, training_plans
from whaleflux.cli.following import follow
from whaleflux.cli.output import Format
from whaleflux.cli.plan_words import alternative
from whaleflux.cli.state import MAX_RANK, Output, Yes, confirm, fleet
from whaleflux.cli.submission import Submission

_SHOWN = 10
MOST_GPUS = 100_000  # as the field of the file


def _unshared_storage(client: Any, planned: Any) -> str:
    """What to know about where a planned job on several nodes saves; "" where there is nothing to be said."""
    from whaleflux.checkpoint_storage import STORAGE_LABEL, unshared
    from whaleflux.errors import StatusError
    from whaleflux.v1 import inventory_pb2, scheduler_pb2

    spec = planned.spec
    if spec.checkpoint.location or spec.kind == scheduler_pb2.JOB_KIND_SERVICE:
        return ""
    placed = sorted({task.node for task in planned.decision.tasks})
    try:
        nodes = [client.inventory.GetNode(inventory_pb2.GetNodeRequest(name=name), timeout=5) for name in placed[:64]]
    except StatusError:  # advice that nobody can give now keeps no job from being submitted
        return ""
    return unshared({node.name: node.facts.labels.get(STORAGE_LABEL, "") for node in nodes})


def show_plan(decision: Any, stream: TextIO, losses: Sequence[str] = ()) -> None:
    """What would happen now; `losses`: what the jobs lose that would be stopped for it."""
    lines = [f"PLAN  {decision.summary}"]
    if decision.placed:
        lines.append(f"  cost       ${decision.usd_per_hour:.2f}/h")
    lines += [f"  why here   {reason}" for reason in decision.reasons[:4]]
    for other in decision.alternatives[:2]:
        lines.append(f"  next best  {alternative(other)}")
    lines += [f"  excluded   {e.nodes} node(s): {e.constraint}" for e in decision.exclusions[:_SHOWN]]
    if decision.smallest_change:
        lines.append(f"  to admit   {decision.smallest_change}")
    if decision.ahead:
        lines.append(f"  ahead      {len(decision.ahead)} job(s), first {decision.ahead[0]}")
    lines += [f"  preempts   {line}" for line in losses or decision.preempts[:_SHOWN] or ["nothing"]]
    output.say(*lines, stream=stream)


def submit(
    files: Annotated[list[str], typer.Argument(help="Job files, or - for stdin.", show_default=False)],
    yes: Yes = False,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Do not follow.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only the plan.")] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the file, as YAML; may be repeated."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME[=VALUE]", help="A variable of the job; without VALUE, yours."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the job.", show_default=False)] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=0, max=MOST_GPUS, help="GPUs of the job.", show_default=False)
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Cancel the job of that name first, and take its place, unless it is the same."),
    ] = False,
    wait_for_capacity: Annotated[
        bool,
        typer.Option("--wait-for-capacity", help="Queue it even if all nodes together could never give what it asks."),
    ] = False,
    rank: Annotated[
        int, typer.Option("--rank", help="Show the output of this rank; -1: of all.", min=-1, max=MAX_RANK)
    ] = 0,
    fmt: Output = Format.table,
) -> None:
    """Plans job files, asks, submits, and follows states and output of one job. Ctrl-C stops following, not the job.

    \b
      whaleflux submit job.yaml             plan, ask, run, follow
      whaleflux submit job.yaml --dry-run   only the plan, and what of the folder would be sent
      whaleflux submit job.yaml -y -d       do not ask, do not follow
      whaleflux submit job.yaml --name try-2 --gpus 4 --set checkpoint.every=50 --env LR=1e-4
      whaleflux submit job.yaml --replace   cancel the job of that name, and take its place
      whaleflux submit prep.yaml train.yaml several files, or several jobs in one, divided by ---
      make-job | whaleflux submit - -y      from a pipe
      whaleflux submit job.yaml -y >out     output goes into the file, states stay on the screen

    Of several jobs, and of the members of an array or matrix, all are checked before the first is submitted. What a file may say: whaleflux explain-field.

    Exit code: 0 submitted (or, when followed, succeeded), 1 the job failed or you said no, 2 the file is wrong,
    130 you stopped following.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument

    if "-" in files and not (yes or dry_run):
        raise InvalidArgument(FieldViolation("--yes", "a job file from stdin cannot be asked about; add -y"))
    overrides = submission.overrides_of(sets or [], name, gpus, env or [])
    jobs = submission.read_all(files, overrides, wait_for_capacity=wait_for_capacity)
    with fleet() as client:
        if not replace:
            submission.refuse_taken(client, jobs, dry_run=dry_run)
        trained = training_plans.plan_all(client, jobs)
        submission.plan_all(client, jobs, replace=replace)
        followed = not (dry_run or detach) and fmt is Format.table and len(jobs) == 1
        aside = followed and not sys.stdout.isatty()
        output.say(*trained, stream=sys.stdout if fmt is Format.table and not aside else sys.stderr)
        _show_plans(client, jobs, fmt, dry_run=dry_run, aside=aside)
        output.note(submission.secrets_in_clear(one.request.job.spec for one in jobs))
        if dry_run:
            return
        submission.consent(jobs, yes)
        confirm(f"submit {len(jobs)} jobs?" if len(jobs) > 1 else "submit?", yes)
        made = creation.create_all(client, jobs)
        show_made(made, jobs, fmt)
        if followed:
            raise typer.Exit(follow(client, made[0].name, rank=rank))


def _show_plans(client: Any, jobs: Sequence[Submission], fmt: Format, *, dry_run: bool, aside: bool) -> None:
    """`aside`: stdout is for something else, such as the output of the job that is followed."""
    stream = sys.stdout if fmt is Format.table and not aside else sys.stderr
    for one, alike in submission.plans(jobs):
        output.say(*([submission.title_of(alike)] if len(jobs) > 1 else ()), stream=stream)
        show_plan(one.planned.decision, stream, losses.of_jobs(client, one.planned.decision.preempts))
        output.say(*submission.replaces_line(one), stream=stream)
        output.say(*(one.parcel.lines(all_of_it=dry_run) if one.parcel else ()), stream=stream)
        if said := _unshared_storage(client, one.planned):
            output.note(f"checkpoints: {said}")
    if dry_run and fmt is not Format.table:
        _show_all(submission.shown(jobs) if fmt.is_json else [one.planned for one in jobs], fmt)


def show_made(made: Sequence[Any], jobs: Sequence[Submission], fmt: Format) -> None:
    """What the command did, job by job."""
    if fmt is not Format.table:
        _show_all(made, fmt)
        return
    for line in _replaced_words(jobs):
        output.note(line)
    told = {one.name for one in jobs if one.kept is not None or one.replaced is not None}
    old = [
        job.name for job, one in zip(made, jobs, strict=True) if job.name not in told and creation.was_there(job, one)
    ]
    new = [job.name for job in made if job.name not in {*old, *told}]
    if len(new) > _SHOWN:
        output.note(f"submitted {len(new)} jobs, {new[0]} to {new[-1]}")
    else:
        output.note("\n".join(f"submitted {name}" for name in new))
    if old:
        output.note(f"{len(old)} were there already, as they are; --replace runs them again")


def _replaced_words(jobs: Sequence[Submission]) -> list[str]:
    """Whose place was taken, and who was there already and stays."""
    replaced = [one for one in jobs if one.replaced is not None]
    lines = [f"submitted {one.name} in place of the one that was {submission.was(one.replaced)}" for one in replaced]
    if len(replaced) > _SHOWN:
        lines[_SHOWN:] = [f"and {len(replaced) - _SHOWN} more in place of others"]
    kept = [one.name for one in jobs if one.kept is not None]
    if kept:
        which = f"{kept[0]} stays" if len(kept) == 1 else f"{kept[0]} and {len(kept) - 1} more stay"
        why = "there already, not ended, and what the file and its folder ask for"
        lines.append(f"{which}: {why}; to start anew: whaleflux cancel {kept[0]}, and the same command again")
    return lines


def _show_all(found: Sequence[Any], fmt: Format) -> None:
    """One as itself, several as a list."""
    if len(found) == 1:
        output.show_one(found[0], [], fmt)
    else:
        output.show(found, [], fmt)
