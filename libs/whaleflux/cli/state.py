"""What all commands share: the global options of this call, and the client of the fleet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.output import Format

if TYPE_CHECKING:
    from whaleflux.sdk.client import Client


@dataclass(slots=True)
class Global:
    """Options before the command."""

    context: str = ""
    debug: bool = False
    program: Any = None  # the command line itself, once it was called


GLOBAL = Global()
_COMPLETION_S = 0.3  # nobody waits longer for a name

MAX_RANK = 99_999  # of the largest job
MAX_LINES = 1_000_000_000  # fits the contract's field

Output = Annotated[
    Format, typer.Option("-o", "--output", help="table, wide, json, jsonl (an item a line), csv or name.")
]
NoHeaders = Annotated[bool, typer.Option("--no-headers", help="Only rows.")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]
Reason = Annotated[str, typer.Option("-m", "--message", help="Why; shown wherever the node is.")]


@contextmanager
def fleet(within_s: float = 0.0) -> Iterator[Client]:
    """The client of the fleet that the context names. Raises Unavailable and Unauthenticated at once; see `reach`.

    `within_s` bounds the look whether it is there; 0: as long as people wait for a command.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it has to say about connections, errors say in words
    from whaleflux.cli import reach

    reach.check_known(GLOBAL.context, within_s or reach.WITHIN_S)
    from whaleflux.cli.waiting import Waiting
    from whaleflux.errors import Unavailable
    from whaleflux.sdk.client import Client  # gRPC, which an answer of "nobody is there" need not wait for

    with Client.from_context(GLOBAL.context) as client:
        if not within_s:  # a completion has no time to tell
            client.channel.beside = Waiting().call
        try:
            yield client
        except Unavailable:
            if client.context is not None:
                reach.check_certificate(client.context)  # a front door hangs up on one that has ended, without a word
            raise


def pages(call: Callable[..., Any], request: Any, field: str, most: int = 0) -> list[Any]:
    """All items of a listing, page by page, at most `most` (0: all)."""
    found: list[Any] = []
    while True:
        answer = call(request, timeout=20)
        found += getattr(answer, field)
        for name in getattr(answer, "unreadable", ()):
            output.note(f"{name} exists, but its record cannot be read by this version of the control plane")
        if not answer.next_page_token or (most and len(found) >= most):
            return found[:most] if most else found
        request.page_token = answer.next_page_token


def confirm(question: str, yes: bool) -> None:
    """Asks; refuses where nobody can answer."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidArgument(
            FieldViolation("--yes", "nobody can be asked here (stdin is no terminal); repeat with -y")
        )
    if not typer.confirm(question, err=True):
        output.note("nothing was changed")
        raise typer.Exit(1)


def job_name(name: str) -> str:
    """queues/q/jobs/j as it is; q/j and j (in queue default) in full."""
    return names.job_of_reference(name, names.last(names.DEFAULT_QUEUE))


def node_name(client: Client, name: str) -> str:
    """sites/s/nodes/n as it is; s/n in full; n where one site has it."""
    from whaleflux.errors import FieldViolation, InvalidArgument
    from whaleflux.v1 import inventory_pb2

    if name.startswith("sites/"):
        return name
    site, _, node = name.rpartition("/")
    if site:
        return names.node(site, node)
    listed = pages(client.inventory.ListNodes, inventory_pb2.ListNodesRequest(show_retired=True), "nodes")
    alike = [n for n in listed if names.last(n.name) == node]
    found = [n.name for n in alike if n.intent != inventory_pb2.NODE_INTENT_RETIRED] or [n.name for n in alike][:1]
    if len(found) != 1:
        which = "no site has it" if not found else "several sites have it: " + ", ".join(found)
        raise InvalidArgument(FieldViolation("node", f"{node!r}: {which}; see: whaleflux nodes"))
    return str(found[0])


def complete(list_names: Callable[[Client], list[str]]) -> Callable[[str], list[str]]:
    """A completion that asks the fleet, and stays silent when it does not answer at once."""

    def names(incomplete: str) -> list[str]:
        try:
            with fleet(_COMPLETION_S) as client:
                return [name for name in list_names(client) if name.startswith(incomplete)]
        except Exception:
            return []

    return names


def complete_jobs(client: Client) -> list[str]:
    from whaleflux.v1 import scheduler_pb2

    answer = client.scheduler.ListJobs(scheduler_pb2.ListJobsRequest(show_ended=True, page_size=200), timeout=0.3)
    return [j.name.removeprefix(names.DEFAULT_QUEUE + "/jobs/") for j in answer.jobs]


def complete_nodes(client: Client) -> list[str]:
    from whaleflux.v1 import inventory_pb2

    answer = client.inventory.ListNodes(inventory_pb2.ListNodesRequest(page_size=200), timeout=0.3)
    return [n.name for n in answer.nodes]


JobArgument = Annotated[
    str, typer.Argument(help="Job: name, queue/name or full name.", autocompletion=complete(complete_jobs))
]


def complete_users(client: Client) -> list[str]:
    from whaleflux.v1 import identity_pb2

    answer = client.identity.ListUsers(identity_pb2.ListUsersRequest(page_size=200), timeout=0.3)
    return [names.last(u.name) for u in answer.users]


UserArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="User or service account.", autocompletion=complete(complete_users))
]
NodeArgument = Annotated[
    str, typer.Argument(help="Node: name, site/name or full name.", autocompletion=complete(complete_nodes))
]
