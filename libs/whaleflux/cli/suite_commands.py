"""The suite on this machine: up, down, demo, agent, version; and events."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import GLOBAL, Output, fleet

if TYPE_CHECKING:
    from whaleflux.cli.watching import Told

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


def config(fmt: Output = Format.table) -> None:
    """Which fleet this program talks to."""
    import json
    from dataclasses import asdict

    from whaleflux.context import Context, find

    path = find(GLOBAL.context)
    shown = asdict(Context.load(path)) | {"api_key": "***"}
    if fmt is Format.json:
        print(json.dumps({"context": str(path), **shown}, indent=2))
        return
    output.table([], [["context", str(path)], *([key, value] for key, value in shown.items())])


def events(
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Go on as things happen.")] = False,
    for_: Annotated[str, typer.Option("--for", metavar="WHAT", help="TYPE/NAME, or a part of a name.")] = "",
    since: Annotated[str, typer.Option(help="Not older than this: 5m, 1h, or 2026-12-01T08:00Z.")] = "",
    fmt: Output = Format.table,
) -> None:
    """What happened in the fleet, oldest first: jobs, nodes and their health, incidents, checkpoints.

    \b
      whaleflux events --since 1h
      whaleflux events --watch --for job/llama-70b-sft
      whaleflux events --watch -o json | jq .what

    The past is what each owner still knows: the last attempt of a job, not all of them.
    """  # noqa: D301 - the escape tells click to keep the lines
    import queue
    import threading

    from whaleflux.cli.watching import Events, Listed, sources

    oldest_s = _since(since)
    told: Events = queue.Queue(maxsize=10_000)
    past: list[Told] | None = []
    with fleet() as client:
        readers = sources(client)
        for read in readers:
            threading.Thread(target=read, args=(told, watch), daemon=True).start()
        waiting, refusals = len(readers), []
        try:
            while waiting or watch:
                event = told.get()
                if isinstance(event, Listed):
                    waiting -= 1
                    if event.refusal is not None and waiting >= 0:
                        refusals.append(event.refusal)
                elif event.is_about(for_) and event.at_s >= oldest_s:
                    if past is None:
                        _print_event(event, fmt)
                    else:
                        past.append(event)
                if waiting == 0 and past is not None:
                    for event in sorted(past, key=lambda event: event.at_s):
                        _print_event(event, fmt)
                    past = None
                    if len(refusals) == len(readers):
                        raise refusals[0]
                    for refusal in refusals:
                        output.note(f"not told: {refusal.message}")
        except KeyboardInterrupt:
            return


def _since(text: str) -> float:
    """Unix time that a duration back from now, or an instant, stands for; 0 for none."""
    import time

    from whaleflux.cli import quantities
    from whaleflux.errors import FieldViolation, Invalid

    if not text:
        return 0.0
    try:
        return time.time() - quantities.seconds(text)
    except ValueError:
        pass
    try:
        return quantities.instant(text).timestamp()
    except ValueError:
        raise Invalid(
            FieldViolation("--since", "must be a duration such as 5m, or a time such as 2026-12-01T08:00Z")
        ) from None


def _print_event(event: Told, fmt: Format) -> None:
    import json
    import time
    from dataclasses import asdict

    if fmt is Format.json:
        print(json.dumps(asdict(event)), flush=True)
        return
    if fmt is Format.name:
        print(event.name, flush=True)
        return
    today = time.time() - event.at_s < 43200
    stamp = time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", time.localtime(event.at_s))
    print(f"{stamp}  {event.what:<12} {event.name}  {event.message}".rstrip(), flush=True)
