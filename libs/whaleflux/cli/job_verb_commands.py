"""What people do to jobs that are there: cancel, hold, release, put back into the queue, change the priority, delete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from whaleflux.cli import arrays, output
from whaleflux.cli.state import Yes, complete, complete_jobs, confirm, fleet, job_name

Jobs = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB...", help="Jobs: name, queue/name or full name.", autocompletion=complete(complete_jobs)
    ),
]
Why = Annotated[str, typer.Option("-m", "--message", help="Why; shown with the job.")]


def cancel(jobs: Jobs, message: Why = "", yes: Yes = False) -> None:
    """Stops jobs for good: SIGTERM to their ranks, SIGKILL after their grace."""
    from whaleflux.v1 import scheduler_pb2 as pb

    def one(client: Any, name: str) -> str:
        return _state(client.scheduler.CancelJob(pb.CancelJobRequest(name=name, reason=message), timeout=10))

    _each(jobs, one, ask="" if yes else "cancel")


def hold(jobs: Jobs, message: Why = "") -> None:
    """Keeps waiting jobs from being placed until they are released. For one that runs: whaleflux requeue --hold.

    \b
      whaleflux hold sft-7b -m "data is being mended"
      whaleflux release sft-7b
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    def one(client: Any, name: str) -> str:
        client.scheduler.HoldJob(pb.HoldJobRequest(name=name, reason=message), timeout=10)
        return f"is held; let it go with: whaleflux release {name}"

    _each(jobs, one)


def release(jobs: Jobs) -> None:
    """Ends the hold of jobs: they are placed when it is their turn."""
    from whaleflux.v1 import scheduler_pb2 as pb

    def one(client: Any, name: str) -> str:
        return _state(client.scheduler.ReleaseJob(pb.ReleaseJobRequest(name=name), timeout=10))

    _each(jobs, one)


def requeue(
    jobs: Jobs,
    hold: Annotated[bool, typer.Option("--hold", help="Keep them waiting until they are released.")] = False,
    message: Why = "",
    yes: Yes = False,
) -> None:
    """Stops running jobs as a preemption does, after a last checkpoint, and puts them back into their queue.

    \b
      whaleflux requeue sft-7b              starts again where there is room, from its checkpoint
      whaleflux requeue sft-7b --hold       waits until: whaleflux release sft-7b
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    def one(client: Any, name: str) -> str:
        request = pb.RequeueJobRequest(name=name, hold=hold, reason=message)
        return _state(client.scheduler.RequeueJob(request, timeout=10))

    _each(jobs, one, ask="" if yes else "stop and requeue")


def set_priority(
    jobs: Jobs,
    priority: Annotated[int, typer.Argument(min=0, max=1000, help="0 to 1000; higher goes first.")],
) -> None:
    """Changes the priority of unfinished jobs; effective at once, also for what runs: lower ones may be preempted.

    \b
      whaleflux set-priority sft-7b 500
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import scheduler_pb2 as pb

    def one(client: Any, name: str) -> str:
        client.scheduler.SetJobPriority(pb.SetJobPriorityRequest(name=name, priority=priority), timeout=10)
        return f"has priority {priority}"

    _each(jobs, one)


def delete(jobs: Jobs, yes: Yes = False) -> None:
    """Deletes the records of jobs that have ended."""
    from whaleflux.v1 import scheduler_pb2 as pb

    def one(client: Any, name: str) -> str:
        client.scheduler.DeleteJob(pb.DeleteJobRequest(name=name), timeout=10)
        return "is deleted"

    _each(jobs, one, ask="" if yes else "delete the record of")


def _state(job: Any) -> str:
    return f"is {output.job_state(job)}"


def _each(jobs: Sequence[str], act: Callable[[Any, str], str], ask: str = "") -> None:
    """Does it to each job and to all members of an array, asking once before; what one refuses does not keep the others from it."""
    from whaleflux.errors import StatusError
    from whaleflux.reasons import ErrorReason

    refused: list[StatusError] = []
    done: Counter[tuple[str, str]] = Counter()  # of arrays: how many members, and what became of them
    with fleet() as client:
        found = arrays.expanded(client, list(dict.fromkeys(map(job_name, jobs))))
        if ask:
            confirm(f"{ask} {arrays.in_words(found)}?", yes=False)
        for name, array in found.items():
            try:
                said = act(client, name)
                if array:
                    done[array, said.replace(name, f"{array}-N")] += 1
                else:
                    output.note(f"{name} {said}")
            except StatusError as error:
                if array and error.reason == ErrorReason.JOB_ENDED:  # of an array what is left was meant
                    continue
                if len(found) == 1:
                    raise
                refused.append(error)
                output.fail(error.message)
    for (array, said), count in done.items():
        output.note(f"{count} member{'s' * (count != 1)} of {array}: {said}")
    if refused:
        raise typer.Exit(1)
