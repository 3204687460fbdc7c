"""What operators do to nodes: cordon, uncordon, drain, retire, replace."""

from __future__ import annotations

import sys
from typing import Any

from whaleflux.cli import losses, output
from whaleflux.cli.state import NodeArgument, Reason, Yes, confirm, fleet, node_name, pages


def cordon(node: NodeArgument, message: Reason = "") -> None:
    """No new work on a node; running work stays."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        client.inventory.CordonNode(inventory_pb2.CordonNodeRequest(name=name, reason=message), timeout=10)
    output.note(f"{name} takes no new work; undo with: whaleflux uncordon {name}")


def uncordon(node: NodeArgument) -> None:
    """Undoes cordon and drain."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        client.inventory.UncordonNode(inventory_pb2.UncordonNodeRequest(name=name), timeout=10)
    output.note(f"{name} takes work again")


def drain(node: NodeArgument, message: Reason = "", yes: Yes = False) -> None:
    """No new work on a node; running work is moved elsewhere through its checkpoints.

    \b
      whaleflux drain n7 -m "fan is loud"
      whaleflux drain onprem/n7 -m "kernel update" --yes
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        work = losses.of_jobs(client, _jobs_on(client, name))
        if yes or sys.stdin.isatty():
            output.note("\n".join(f"moves {line}" for line in work))
        confirm(f"move all work off {name}?" if work else f"nothing runs on {name}; let nothing run there?", yes)
        client.inventory.DrainNode(inventory_pb2.DrainNodeRequest(name=name, reason=message), timeout=10)
    then = "watch with: whaleflux nodes --state draining" if work else "nothing runs there: it is empty now"
    output.note(f"{name} is being drained; {then}; undo with: whaleflux uncordon {name}")


def _jobs_on(client: Any, node: str) -> list[str]:
    """Names of the jobs that hold GPUs of a node."""
    from whaleflux.v1 import scheduler_pb2

    listed = pages(client.scheduler.ListAllocations, scheduler_pb2.ListAllocationsRequest(), "allocations")
    return [allocation.job for allocation in listed if allocation.task.node == node]


def retire(node: NodeArgument, message: Reason = "", yes: Yes = False) -> None:
    """Removes a node for good; GPUs that it still holds are given up."""
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        confirm(f"remove {name} for good?", yes)
        client.inventory.RetireNode(inventory_pb2.RetireNodeRequest(name=name, reason=message), timeout=10)
    output.note(f"{name} is retired")


def replace(node: NodeArgument, yes: Yes = False) -> None:
    """The machine behind a node is gone: the next one that joins under its name takes the name over.

    \b
      whaleflux replace onprem/n7
      whaleflux token create --site onprem        # then start the agent of the new machine with --node-id n7
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.v1 import inventory_pb2

    with fleet() as client:
        name = node_name(client, node)
        confirm(f"refuse the machine that is {name} from now on?", yes)
        client.inventory.ReplaceNode(inventory_pb2.ReplaceNodeRequest(name=name), timeout=10)
    output.note(f"the next machine that joins as {name} takes the name over")
