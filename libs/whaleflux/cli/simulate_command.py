"""`whaleflux simulate`: what a fleet would do with a workload. The simulator is the scheduler's own, so it runs as a program of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from whaleflux.cli import output
from whaleflux.cli.output import Format
from whaleflux.cli.state import Output, fleet, pages

_MODULE = "whaleflux_scheduler.simulation"
_MOST_JOBS = 100_000
_MOST_ROWS = 2_000_000  # of a trace, as the simulator reads


def simulate(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[CLUSTER] [WORKLOAD]", help="Files with `nodes` and with `jobs`.")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Jobs of a trace (Philly, openb) instead.")] = None,
    load: Annotated[
        float | None,
        typer.Option("--load", min=0.01, max=10.0, help="Move the trace's jobs closer: GPU time asked for."),
    ] = None,
    first: Annotated[
        int | None, typer.Option("--first", min=1, max=_MOST_ROWS, help="Only so many jobs of the trace.")
    ] = None,
    estimates: Annotated[
        str, typer.Option("--estimates", help="What users say of run times: exact, uniform, lognormal, wrong, none.")
    ] = "",
    from_fleet: Annotated[
        bool, typer.Option("--from-fleet", help="Nodes, queues and jobs of the fleet as they are now.")
    ] = False,
    assume: Annotated[
        str, typer.Option("--assume", help="How long jobs of the fleet take that do not say it.")
    ] = "4 h",
    until: Annotated[str, typer.Option("--until", help="Stop then: 30 d.")] = "",
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Again with this cluster or workload file in place of that one.")
    ] = None,
    gantt: Annotated[Path | None, typer.Option("--gantt", help="Draw it: an SVG file.")] = None,
    moves: Annotated[Path | None, typer.Option("--moves", help="Write every move: a file of JSON lines.")] = None,
    fmt: Output = Format.table,
) -> None:
    """Simulates a fleet with the scheduler's own decisions, in seconds instead of days. Touches no fleet.

    \b
      whaleflux simulate cluster.yaml workload.yaml --gantt out.svg
      whaleflux simulate cluster.yaml --trace philly.csv.gz --load 0.8
      whaleflux simulate --from-fleet workload.yaml            this fleet, its queues, and more work
      whaleflux simulate cluster.yaml workload.yaml --compare larger.yaml
    """  # noqa: D301 - the escape tells click to keep the lines
    from whaleflux.errors import FieldViolation, InvalidArgument

    if fmt not in (Format.table, Format.json):
        raise InvalidArgument(FieldViolation("-o", f"{fmt.value} is not made of a simulation; use table or json"))
    given = {
        "--trace": trace, "--load": load, "--first": first, "--estimates": estimates, "--assume": assume, "--until": until,
        "--compare": compare, "--picture": gantt, "--moves": moves,
    }  # fmt: skip
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None and value != ""]
    arguments += ["--json"] * (fmt is Format.json)
    with tempfile.TemporaryDirectory() as folder:
        if from_fleet:
            arguments.append(f"--fleet={_snapshot(Path(folder))}")
        raise typer.Exit(_run([*arguments, "--", *map(str, files or ())]))


def _run(arguments: list[str]) -> int:
    """The simulator with these arguments; its exit code. Raises FailedPrecondition where it is not installed."""
    import importlib.util

    from whaleflux.errors import FailedPrecondition
    from whaleflux.reasons import ErrorReason

    if any(importlib.util.find_spec(module) is None for module in ("whaleflux_scheduler", "numpy")):
        raise FailedPrecondition(
            "the simulator is part of the scheduler, which is not installed here; run: pip install 'whaleflux[scheduler]'",
            reason=ErrorReason.PROGRAM_MISSING,
        )
    return subprocess.run([sys.executable, "-m", _MODULE, *arguments], check=False).returncode


def _snapshot(folder: Path) -> Path:
    """What the fleet has and does now, in a file."""
    from whaleflux.v1 import inventory_pb2 as inventory
    from whaleflux.v1 import scheduler_pb2 as scheduler

    with fleet() as client:
        listed: dict[str, list[Any]] = {
            "nodes": pages(client.inventory.ListNodes, inventory.ListNodesRequest(page_size=1000), "nodes"),
            "queues": pages(client.scheduler.ListQueues, scheduler.ListQueuesRequest(page_size=1000), "queues"),
            "jobs": pages(client.scheduler.ListJobs, scheduler.ListJobsRequest(page_size=500), "jobs", _MOST_JOBS),
        }
    content = {key: [output.as_json(one) for one in found] for key, found in listed.items()}
    path = folder / "fleet.json"
    path.write_text(json.dumps({"time": datetime.now(UTC).isoformat(), **content}), encoding="utf-8")
    return path
