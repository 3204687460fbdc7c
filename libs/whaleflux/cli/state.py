"""What all commands share: the global options of this call, and the client of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whaleflux.cli.output import Format

if TYPE_CHECKING:
    from whaleflux.sdk.client import Client


@dataclass(slots=True)
class Global:
    """Options before the command."""

    context: str = ""
    debug: bool = False


GLOBAL = Global()

Output = Annotated[Format, typer.Option("-o", "--output", help="table, wide, json or name.")]
NoHeaders = Annotated[bool, typer.Option("--no-headers", help="Only rows.")]
Yes = Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")]
Reason = Annotated[str, typer.Option("-m", "--message", help="Why; shown wherever the node is.")]


@contextmanager
def fleet() -> Iterator[Client]:
    """The client of the fleet that the context names."""
    from whaleflux.sdk.client import Client

    with Client.from_context(GLOBAL.context) as client:
        yield client


def pages(call: Callable[..., Any], request: Any, field: str, most: int = 0) -> list[Any]:
    """All items of a listing, page by page, at most `most` (0: all)."""
    found: list[Any] = []
    while True:
        answer = call(request, timeout=20)
        found += getattr(answer, field)
        if not answer.next_page_token or (most and len(found) >= most):
            return found[:most] if most else found
        request.page_token = answer.next_page_token


def job_name(name: str) -> str:
    """queues/q/jobs/j as it is; q/j and j (in queue default) in full."""
    if name.startswith("queues/"):
        return name
    queue, _, job = name.rpartition("/")
    return f"queues/{queue or 'default'}/jobs/{job}"


def node_name(client: Client, name: str) -> str:
    """sites/s/nodes/n as it is; s/n in full; n where one site has it."""
    from whaleflux.errors import FieldViolation, Invalid
    from whaleflux.v1 import inventory_pb2

    if name.startswith("sites/"):
        return name
    site, _, node = name.rpartition("/")
    if site:
        return f"sites/{site}/nodes/{node}"
    listed = pages(client.inventory.ListNodes, inventory_pb2.ListNodesRequest(), "nodes")
    found = [n.name for n in listed if n.name.endswith(f"/nodes/{node}")]
    if len(found) != 1:
        which = "no site has it" if not found else "several sites have it: " + ", ".join(found)
        raise Invalid(FieldViolation("node", f"{node!r}: {which}; see: whaleflux nodes"))
    return str(found[0])


def complete(list_names: Callable[[Client], list[str]]) -> Callable[[str], list[str]]:
    """A completion that asks the fleet, and stays silent when it does not answer at once."""

    def names(incomplete: str) -> list[str]:
        try:
            with fleet() as client:
                return [name for name in list_names(client) if name.startswith(incomplete)]
        except Exception:
            return []

    return names


def complete_jobs(client: Client) -> list[str]:
    from whaleflux.v1 import scheduler_pb2

    answer = client.scheduler.ListJobs(scheduler_pb2.ListJobsRequest(show_ended=True, page_size=200), timeout=0.3)
    return [j.name.removeprefix("queues/default/jobs/") for j in answer.jobs]


def complete_nodes(client: Client) -> list[str]:
    from whaleflux.v1 import inventory_pb2

    answer = client.inventory.ListNodes(inventory_pb2.ListNodesRequest(page_size=200), timeout=0.3)
    return [n.name for n in answer.nodes]


JobArgument = Annotated[
    str, typer.Argument(help="Job: name, queue/name or full name.", autocompletion=complete(complete_jobs))
]
NodeArgument = Annotated[
    str, typer.Argument(help="Node: name, site/name or full name.", autocompletion=complete(complete_nodes))
]
