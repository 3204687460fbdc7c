"""Inside of a running job: a command, a shell, its ports, its files."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from whaleflux.cli import output
from whaleflux.cli.state import GLOBAL, MAX_RANK, JobArgument, job_name

if TYPE_CHECKING:
    from whaleflux.sdk.client import AsyncClient

T = TypeVar("T")
Rank = Annotated[int, typer.Option("--rank", help="Beside this rank, on its node.", min=0, max=MAX_RANK)]


def exec_(
    name: JobArgument,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.")],
    rank: Rank = 0,
    tty: Annotated[
        bool | None,
        typer.Option(
            "-t/-T", "--tty/--no-tty", help="With a terminal; default: where this one is one.", show_default=False
        ),
    ] = None,
    stdin: Annotated[
        bool | None,
        typer.Option("-i/-I", "--stdin/--no-stdin", help="Pass input on; default: yes.", show_default=False),
    ] = None,
) -> None:
    """Runs a command beside a rank of a running job: in its environment, folder and limits, seeing its GPUs.

    Its exit code is this command's. Whatever it starts ends with it, with the session, and with the attempt.

    \b
      whaleflux exec llama-70b-sft -- nvidia-smi
      whaleflux exec J --rank 3 -- py-spy dump --pid 4711
      whaleflux exec J -- tar c out | tar x        input and output are passed on byte by byte
    """  # noqa: D301 - the escape tells click to keep the lines
    terminals = sys.stdin.isatty() and sys.stdout.isatty()
    raise SystemExit(_attached(name, rank, command, tty=terminals if tty is None else tty, stdin=stdin is not False))


def shell(name: JobArgument, rank: Rank = 0) -> None:
    """A shell beside a rank of a running job, with a terminal of its own.

    Leave it with `exit`; when nothing answers any more, with Enter ~ .

    \b
      whaleflux shell llama-70b-sft --rank 3
    """  # noqa: D301 - the escape tells click to keep the lines
    terminals = sys.stdin.isatty() and sys.stdout.isatty()
    greeting = f"rank {rank} of {job_name(name)} on {{node}}; leave with exit, or with Enter ~ ." if terminals else ""
    raise SystemExit(_attached(name, rank, [], tty=terminals, stdin=True, greeting=greeting))


def _attached(name: str, rank: int, command: list[str], *, tty: bool, stdin: bool, greeting: str = "") -> int:
    from whaleflux.cli import attached, terminal
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2

    asked = scheduler_pb2.AttachCommand(argv=command)
    if tty:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise InvalidArgument(FieldViolation("-t", "input and output are no terminal here; leave -t out"))
        rows, columns = terminal.size()
        asked.terminal.rows, asked.terminal.columns = rows, columns
        asked.term = os.environ.get("TERM", "xterm")
    wanted = scheduler_pb2.AttachOpen(name=job_name(name), rank=rank, command=asked)
    return _run(lambda client: attached.run(client, wanted, stdin=stdin, greeting=greeting))


def port_forward(
    name: JobArgument,
    ports: Annotated[list[str], typer.Argument(metavar="[LOCAL:]PORT...", help="Port here (0: any) and there.")],
    rank: Rank = 0,
) -> None:
    """Makes ports of a rank's node reachable on this machine, until Ctrl-C or the job's end.

    \b
      whaleflux port-forward notebook 8888         http://127.0.0.1:8888 here is port 8888 there
      whaleflux port-forward J 9000:6006 0:8265    two ports; any free one here for the second
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import forwarding

    forwards = [forwarding.parse(text) for text in ports]
    _run(lambda client: forwarding.Forwarding(client, job_name(name), rank).run(forwards))


def cp(
    source: Annotated[str, typer.Argument(metavar="JOB:PATH|LOCAL", help="What to copy.")],
    target: Annotated[str, typer.Argument(metavar="LOCAL|JOB:PATH", help="Where to; into it, if it is a folder.")],
    rank: Rank = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a folder that is there.")] = False,
) -> None:
    """Copies files and folders out of a job's folder, or into it; also of an ended job, while its node keeps them.

    What is copied has its name only when it is whole. A local path with a colon begins with ./ or /.

    \b
      whaleflux cp llama-70b-sft:out .             the folder `out`, as ./out
      whaleflux cp J:. ./everything                the whole working directory
      whaleflux cp fix.py J:fix.py --rank 8        onto the node of rank 8
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import copying
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import scheduler_pb2

    there, here = copying.parse(source), copying.parse(target)
    if (there is None) == (here is None):
        which = "both name a job" if there else "neither names a job"
        raise InvalidArgument(FieldViolation("cp", f"{which}: one is JOB:PATH, the other a path of this machine"))
    if there is not None:
        path = scheduler_pb2.AttachPath(path=there.path)
        wanted = scheduler_pb2.AttachOpen(name=job_name(there.job), rank=rank, read=path)
        _copied(lambda client: copying.fetch(client, wanted, target, replace=replace))
    elif here is not None:
        base = os.path.basename(os.path.realpath(source))
        path = scheduler_pb2.AttachPath(path=here.path, replace=replace, base_name=base)
        wanted = scheduler_pb2.AttachOpen(name=job_name(here.job), rank=rank, write=path)
        _copied(lambda client: copying.send(client, source, wanted))


def _copied(work: Callable[[AsyncClient], Awaitable[None]]) -> None:
    try:
        _run(work)
    except KeyboardInterrupt:
        output.note("\ninterrupted; what had come is taken away again")
        raise


def _run(work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """With the client of the fleet that the context names. Raises Unavailable and Unauthenticated at once; see `reach`."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import asyncio

    from whaleflux.cli import reach
    from whaleflux.sdk.client import AsyncClient

    reach.check_known(GLOBAL.context)

    async def main() -> T:
        async with AsyncClient.from_context(GLOBAL.context) as client:
            return await work(client)

    return asyncio.run(main())
