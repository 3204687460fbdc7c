"""The suite on this machine: up, down, demo, agent, version; and events."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import GLOBAL, Output, fleet

State = Annotated[Path, typer.Option("--state", help="Folder of its state.")]


def up(
    state: State = Path(".whaleflux"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Front door; 0: last time's, or a free one.")] = 0,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Inference API; 0: last time's, or a free one.")] = 0,
    otlp_endpoint: Annotated[str, typer.Option(help="Where traces go, http://host:4317.")] = "",
) -> None:
    """Starts the whole suite here (etcd, NATS, Envoy, all services) until Ctrl-C; comes back with its state."""
    from whaleflux.embedded.suite import Options, Suite, run_up

    def ready(suite: Suite) -> None:
        print("\nWhaleFlux is up:")
        output.table([], [[f"  {what}", where] for what, where in suite.where()])
        print(
            "\nnext: whaleflux status, whaleflux token create --site NAME; stop with Ctrl-C or: whaleflux down",
            flush=True,
        )

    run_up(Options(state, port, http_port, otlp_endpoint), output.note, ready)
    output.note("stopped; start again with the same state by: whaleflux up")


def down(state: State = Path(".whaleflux")) -> None:
    """Stops the suite of this folder; its state stays."""
    from whaleflux.embedded.suite import run_down

    output.note("stopped" if run_down(state) else f"no suite runs with its state in {state}")


def demo(
    steps: Annotated[int, typer.Option(min=50, max=100_000, help="Training steps.")] = 400,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running.")] = False,
    state: State = Path(".whaleflux/demo"),
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("demo-report.json"),
    serve: Annotated[bool, typer.Option(help="Serve the trained model too.")] = True,
    otlp_endpoint: Annotated[str, typer.Option(help="Where traces go, http://host:4317.")] = "",
) -> None:
    """The main job: a training run survives the loss of its node, then its model is served. GPUs are simulated."""
    from whaleflux.demo.run import Options, run

    raise typer.Exit(run(Options(state, steps, every, keep, report, serve, otlp_endpoint)))


def agent(context: typer.Context) -> None:
    """The agent of this node (see: whaleflux agent --help)."""
    os.execv(sys.executable, [sys.executable, "-m", "whaleflux_agent", *context.args])  # noqa: S606


def version(fmt: Output = Format.table) -> None:
    """Version of this program, and of the fleet if one is known."""
    import json
    from importlib.metadata import version as installed

    from whaleflux.errors import Refusal
    from whaleflux.v1 import inventory_pb2

    versions = {"client": installed("whaleflux")}
    try:
        with fleet() as client:
            nodes = client.inventory.ListNodes(inventory_pb2.ListNodesRequest(page_size=1000), timeout=2).nodes
        versions["agents"] = (
            ", ".join(sorted({n.facts.agent_version for n in nodes if n.facts.agent_version})) or "none"
        )
        versions["fleet"] = "reachable"
    except Refusal as refusal:
        versions["fleet"] = f"not reached: {refusal.message}"
    if fmt is Format.json:
        print(json.dumps(versions, indent=2))
    else:
        output.table([], [[what, found] for what, found in versions.items()])


def config() -> None:
    """Which fleet this program talks to."""
    from dataclasses import asdict

    from whaleflux.context import Context, find

    path = find(GLOBAL.context)
    shown = asdict(Context.load(path)) | {"api_key": "***"}
    output.table([], [["context", str(path)], *([key, value] for key, value in shown.items())])


def events(
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Go on as things happen.")] = False,
    for_: Annotated[str, typer.Option("--for", metavar="NAME", help="Only names that contain this.")] = "",
    fmt: Output = Format.table,
) -> None:
    """What happens in the fleet: jobs, nodes and their health, as each owner tells it."""
    import json
    import queue
    import threading
    import time

    from whaleflux.cli.watching import Told, streams

    told: queue.Queue[Told | None] = queue.Queue(maxsize=10_000)
    with fleet() as client:
        sources = streams(client)
        threads = [threading.Thread(target=source, args=(told, watch), daemon=True) for source in sources]
        for thread in threads:
            thread.start()
        ended = 0
        try:
            while ended < len(sources):
                event = told.get()
                if event is None:
                    ended += 1
                elif for_ in event.name:
                    stamp = time.strftime("%H:%M:%S", time.localtime(event.at_s))
                    line: Any = {
                        "time": event.at_s,
                        "kind": event.kind,
                        "name": event.name,
                        "what": event.what,
                        "message": event.message,
                    }
                    print(
                        json.dumps(line)
                        if fmt is Format.json
                        else f"{stamp}  {event.what:<12} {event.name}  {event.message}",
                        flush=True,
                    )
        except KeyboardInterrupt:
            return
