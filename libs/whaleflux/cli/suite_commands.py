"""The suite on this machine: up, down, demo, agent, version."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import NoHeaders, Output, fleet

State = Annotated[Path, typer.Option("--state", help="Folder of its state.")]


def up(
    state: State = Path(".whaleflux"),
    simulate: Annotated[
        list[str] | None,
        typer.Option(metavar="[SITE/]PROFILE,...", help="Play these machines as nodes; none: last time's no more."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Front door; 0: last time's, or a free one.")] = 0,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Inference API; 0: last time's, or a free one.")] = 0,
    otlp_endpoint: Annotated[str, typer.Option(help="Where traces go, http://host:4317.")] = "",
    plain_loopback: Annotated[
        bool, typer.Option("--plain-loopback", help="etcd and NATS without certificates, to look into them.")
    ] = False,
    tls_http: Annotated[
        bool, typer.Option("--tls-http", help="The inference API over TLS; clients need STATE/pki/ca.crt.")
    ] = False,
    register: Annotated[
        bool, typer.Option(help="Let commands in other folders find it: whaleflux config list.")
    ] = True,
) -> None:
    """Starts the whole suite here (etcd, NATS, Envoy, all services) until Ctrl-C; comes back with its state.

    \b
      whaleflux up                                 then admit nodes: whaleflux token create --site NAME
      whaleflux up --simulate h200x8               with a node that is played, for a machine without GPUs
      whaleflux up --simulate onprem/h200x8,edge/rtx4090x2
      whaleflux up --state /srv/whaleflux --port 7443

    Profiles are listed by: whaleflux profiles. Commands are for another terminal, in any folder.
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli import suite_words
    from whaleflux.embedded import simulated
    from whaleflux.embedded.suite import SuiteOptions, run_up

    nodes = None if simulate is None else simulated.wanted(simulate)
    with suite_words.clear_errors(state):
        run_up(
            SuiteOptions(state, port, http_port, otlp_endpoint, plain_loopback, tls_http, nodes),
            output.note,
            lambda suite: suite_words.say_ready(suite, register=register),
        )
    output.note(f"stopped; start again with the same state by: whaleflux up{suite_words.state_flag(state)}")


def profiles(fmt: Output = Format.table, no_headers: NoHeaders = False) -> None:
    """Machines that agents can play, with `up --simulate` or `agent --profile`.

    \b
      whaleflux up --simulate h200x8                    one node of 8 simulated H200
      whaleflux up --simulate edge/rtx4090x2            in a site of its own
      whaleflux agent --profile a100x8 ...              an agent that joins a fleet elsewhere

    \b
    Several in one machine, and what is special about it:
      h200x4+a100x4pcie             GPUs of two kinds
      h200x8:mig=3g.71gb,4*1g.18gb  each GPU cut into these MIG instances; mig=none: MIG is on, without any
      h200x8:numa=2                 over two NUMA nodes
      h200x8:lost=3@60s             GPU 3 falls off the bus a minute after the start
      h200x8:xid=79/0@5min:ecc=1    the driver reports Xid 79 of GPU 0; GPU 1 has an uncorrectable ECC error
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.cli.suite_words import PROFILE_COLUMNS, played_machines

    output.show(played_machines(), PROFILE_COLUMNS, fmt, headers=not no_headers, name=lambda row: str(row["name"]))


def down(
    state: Annotated[
        Path | None, typer.Option("--state", help="Folder of its state; without it, of this folder's fleet.")
    ] = None,
) -> None:
    """Stops the suite of this folder, or of the fleet in use where that is on this machine; its state stays."""
    from whaleflux.cli.suite_words import state_of_this_fleet
    from whaleflux.embedded.suite import run_down

    folder = (state or state_of_this_fleet()).absolute()
    output.note(f"stopped ({folder})" if run_down(folder) else f"no suite runs with its state in {folder}")


def demo(
    steps: Annotated[int, typer.Option(min=50, max=100_000, help="Training steps.")] = 400,
    every: Annotated[int, typer.Option(min=1, max=100_000, help="Steps between checkpoints.")] = 20,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running.")] = False,
    state: State = Path(".whaleflux/demo"),
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("demo-report.json"),
    serve: Annotated[bool, typer.Option(help="Serve the trained model too.")] = True,
    otlp_endpoint: Annotated[str, typer.Option(help="Where traces go, http://host:4317.")] = "",
) -> None:
    """The main job: a training run survives the loss of its node, then its model is served. GPUs are simulated."""
    from whaleflux.demo.run import DemoOptions, run

    raise typer.Exit(run(DemoOptions(state, steps, every, keep, report, serve, otlp_endpoint)))


def demo_elastic(
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running.")] = False,
    state: State = Path(".whaleflux/demo-elastic"),
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("demo-elastic-report.json"),
    ray_python: Annotated[
        Path, typer.Option("--ray-python", help="An interpreter that has Ray 2.60, as `make ray` makes.")
    ] = Path(".venv-ray/bin/python"),
) -> None:
    """One pool that breathes: Ray workers come and go, a training lends GPUs, a machine is rented, a model goes to three sites. Simulated GPUs."""
    from whaleflux.demo.elastic import ElasticOptions, run

    raise typer.Exit(run(ElasticOptions(ray_python, state, keep, report)))


def agent(context: typer.Context) -> None:
    """The agent of this node (see: whaleflux agent --help)."""
    os.execv(sys.executable, [sys.executable, "-m", "whaleflux_agent", *context.args])  # noqa: S606


def version(fmt: Output = Format.table) -> None:
    """Version of this program, and of the fleet if one is known."""
    from whaleflux.errors import StatusError
    from whaleflux.v1 import inventory_pb2
    from whaleflux.version import version as own

    versions = {"client": own()}
    try:
        with fleet() as client:
            nodes = client.inventory.ListNodes(inventory_pb2.ListNodesRequest(page_size=1000), timeout=2).nodes
        versions["agents"] = (
            ", ".join(sorted({n.facts.agent_version for n in nodes if n.facts.agent_version})) or "none"
        )
        versions["fleet"] = "reachable"
    except StatusError as error:
        versions["fleet"] = f"not reached: {error.message}"
    if fmt.is_json:
        output.say_json(versions, fmt)
    else:
        output.table([], [[what, found] for what, found in versions.items()])
