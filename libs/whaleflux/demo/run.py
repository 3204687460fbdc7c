"""`whaleflux demo`: a training run survives the loss of its node, and its model is then served without a failed request.

Everything is real but the GPUs: agents play the profiles of machines (and say "simulated"), ranks are PyTorch
processes on the CPU, etcd, NATS, Envoy and the services are what production runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whaleflux.demo import training
from whaleflux.demo.fleet import FLEET, DemoFleet
from whaleflux.demo.serving import Served, lose_a_replica, serve
from whaleflux.demo.suite import Teller, join, running_suite
from whaleflux.demo.training import Failure, Watched, follow, lose_a_node, submit, until, watch_logs
from whaleflux.errors import Unavailable
from whaleflux.manifests.yaml_files import job_from_yaml, model_from_yaml
from whaleflux.sdk.client import ENDED, AsyncClient
from whaleflux.v1 import scheduler_pb2

EXAMPLE = Path(__file__).parents[3] / "examples" / "gpt"
DEFAULT_STATE = Path(".whaleflux") / "demo"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`steps` of training, a checkpoint each `every`; `keep` leaves everything running."""

    state: Path = DEFAULT_STATE
    steps: int = 400
    every: int = 20
    keep: bool = False
    report: Path = Path("demo-report.json")
    serve: bool = True
    otlp_endpoint: str = ""


def run(options: DemoOptions) -> int:
    """The demo; returns the exit code: 0 when everything that it claims was seen."""
    say, state = Teller(), options.state.resolve()
    with running_suite(state, say, keep=options.keep, otlp_endpoint=options.otlp_endpoint) as fleet:
        report = asyncio.run(_demo(options, state, fleet, say))
        options.report.write_text(json.dumps(report, indent=2) + "\n")
        _print_summary(report, options.report)
    return 0 if report["passed"] else 1


async def _demo(options: DemoOptions, state: Path, fleet: DemoFleet, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.time()
    async with AsyncClient.from_context(state / "context.json") as client:
        await join(client, fleet, FLEET, say)
        failed, failure, result = await _train_through_a_failure(client, options, state, fleet, say)
        reference = await _train_undisturbed(client, options, state, say)
        served = await _serve(client, options, state, fleet, say) if options.serve else None
        job = await client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=failed.job.name), timeout=10)
        return _report(options, job, failed, failure, result, reference, served, time.time() - began)


def _spec(options: DemoOptions, state: Path, folder: str) -> scheduler_pb2.JobSpec:
    """The example's job file with this run's length and a folder for its result."""
    spec = job_from_yaml((EXAMPLE / "job.yaml").read_text(), EXAMPLE).spec
    output = state / folder
    command = [sys.executable, "train.py", "--steps", str(options.steps), "--output", str(output)]
    del spec.command[:]
    spec.command.extend(command)
    spec.checkpoint.every_steps = options.every
    return spec


async def _train_through_a_failure(
    client: AsyncClient, options: DemoOptions, state: Path, fleet: DemoFleet, say: Callable[[str], None]
) -> tuple[Watched, Failure, dict[str, Any]]:
    say(
        f"TRAIN a GPT of 0.83 M parameters on the standard library's sources: 4 ranks on 2 nodes, {options.steps} steps"
    )
    job = await submit(client, _spec(options, state, "out"), "gpt-stdlib", say)
    watched = Watched(job)
    async with asyncio.TaskGroup() as group:
        watching = [group.create_task(follow(client, watched)), group.create_task(watch_logs(client, watched, say))]
        kill_after = options.steps * 2 // 5
        await until(lambda: watched.losses and watched.losses[-1][0] >= kill_after, f"step {kill_after}", 180)
        failure = await lose_a_node(client, fleet, watched, say)
        await until(lambda: watched.job.state in ENDED, "the end of the training", 240)
        for task in watching:
            task.cancel()
    if watched.job.state != scheduler_pb2.JOB_STATE_SUCCEEDED:
        raise Unavailable(
            f"the training ended as {scheduler_pb2.JobState.Name(watched.job.state)}: {watched.job.state_message}"
        )
    result = training.result_of(state / "out")
    say(f"DONE  trained to the end: loss {result['loss']:.6f}")
    return watched, failure, result


async def _train_undisturbed(
    client: AsyncClient, options: DemoOptions, state: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    say("CHECK the same training once more, without a failure, to compare")
    job = await submit(client, _spec(options, state, "out-unfailed"), "gpt-unfailed", lambda _: None)
    async with asyncio.timeout(300):
        ended = await client.wait(job.name)
    if ended.state != scheduler_pb2.JOB_STATE_SUCCEEDED:
        raise Unavailable(
            f"the undisturbed run ended as {scheduler_pb2.JobState.Name(ended.state)}: {ended.state_message}"
        )
    if ended.restarts or ended.recoveries:
        raise Unavailable("the undisturbed run was disturbed; something else on this machine killed its processes")
    result = training.result_of(state / "out-unfailed")
    say(f"      loss {result['loss']:.6f}")
    return result


async def _serve(
    client: AsyncClient, options: DemoOptions, state: Path, fleet: DemoFleet, say: Callable[[str], None]
) -> Served:
    say("SERVE the trained model with two replicas, through the front door")
    declared = model_from_yaml((EXAMPLE / "model.yaml").read_text(), EXAMPLE)
    model = declared.model
    del model.engine.command[:]
    model.engine.command.extend(
        [
            sys.executable,
            "serve.py",
            "--weights",
            str(state / "out" / "model.pt"),
            "--name",
            "gpt-stdlib",
            "--port",
            "{port}",
        ]
    )
    replicas = await serve(client, declared.model_id, model, say)
    served = Served()
    await lose_a_replica(client, fleet, declared.model_id, replicas, served, say)
    return served


def _report(
    options: DemoOptions,
    job: scheduler_pb2.Job,
    watched: Watched,
    failure: Failure,
    result: dict[str, Any],
    reference: dict[str, Any],
    served: Served | None,
    wall_s: float,
) -> dict[str, Any]:
    repeated = failure.step - failure.resumed_step
    checks = {
        "suspect within 2 s": 0 <= failure.suspect_s <= 2,
        "fenced within 6 s": 0 <= failure.fenced_s <= 6,
        "running again within 15 s": 0 <= failure.running_s <= 15,
        "no more work repeated than since the last committed checkpoint": failure.resumed_step
        >= failure.committed_step,
        "final loss as without a failure": abs(result["loss"] - reference["loss"]) <= 1e-6,
        "parameters bitwise as without a failure": result["digest"] == reference["digest"],
    }
    if served is not None:
        checks["no failed request while a replica was killed"] = served.failed == 0 and served.asked > 0
    return {
        "passed": all(checks.values()),
        "checks": checks,
        "simulated": "GPUs: agents play machine profiles; ranks and replicas are real processes on the CPU",
        "placement": [task.node for task in watched.job.past_attempts[0].tasks] if watched.job.past_attempts else [],
        "placement_after": [task.node for task in job.attempt.tasks],
        "failure": {
            "node": failure.node,
            "processes_killed": failure.pids,
            "suspect_s": failure.suspect_s,
            "fenced_s": failure.fenced_s,
            "replaced_s": failure.replaced_s,
            "running_s": failure.running_s,
            "first_step_s": failure.first_step_s,
            "step_at_kill": failure.step,
            "committed_step_at_kill": failure.committed_step,
            "resumed_step": failure.resumed_step,
            "repeated_steps": repeated,
        },
        "training": {"steps": options.steps, "losses": watched.losses, **result},
        "unfailed": reference,
        "serving": None
        if served is None
        else {
            "requests": served.asked,
            "failed": served.failed,
            "errors": served.errors[:5],
            "median_s": statistics.median(served.seconds) if served.seconds else None,
            "killed_replica": served.killed_replica,
            "sample": served.sample,
        },
        "cost_usd": job.cost_usd,
        "wall_s": wall_s,
        "host": {"cpus": os.cpu_count()},
    }


def _print_summary(report: dict[str, Any], file: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    failure, serving = report["failure"], report["serving"]
    rows = [
        ("placement", ", ".join(report["placement"])),
        ("after the loss of a node", ", ".join(report["placement_after"])),
        ("detected (SUSPECT)", f"{failure['suspect_s']:.2f} s after the kill"),
        ("fenced (UNREACHABLE)", f"{failure['fenced_s']:.2f} s"),
        ("running again / first step", f"{failure['running_s']:.2f} s / {failure['first_step_s']:.2f} s"),
        (
            "steps repeated",
            f"{failure['repeated_steps']} (killed at {failure['step_at_kill']}, restored {failure['resumed_step']})",
        ),
        ("final loss", f"{report['training']['loss']:.9f} (unfailed run: {report['unfailed']['loss']:.9f})"),
        ("parameters", "bitwise equal" if report["checks"]["parameters bitwise as without a failure"] else "DIFFERENT"),
        ("cost of the training so far", f"${report['cost_usd']:.4f} at the listed prices (simulated GPUs)"),
    ]
    if serving:
        rows.append(
            (
                "requests served",
                f"{serving['requests'] - serving['failed']} of {serving['requests']}, one replica killed",
            )
        )
    table = Table(title="WhaleFlux demo (GPUs simulated)", show_header=False)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(_curve(report["training"]["losses"], failure["resumed_step"]))
    console.print(table)
    for check, held in report["checks"].items():
        console.print(("[green]ok[/]   " if held else "[red]MISSED[/] ") + check, highlight=False)
    console.print(f"report: {file}", highlight=False)


def _curve(losses: list[tuple[int, float]], resumed: int, width: int = 60) -> str:
    """The loss as a line of blocks; a bar marks where the node was lost."""
    points = sorted(dict(losses).items())
    if not points:
        return ""
    step = max(1, len(points) // width)
    sampled = points[::step]
    low, high = min(v for _, v in sampled), max(v for _, v in sampled)
    blocks = "▁▂▃▄▅▆▇█"
    line = ""
    marked = False
    for at, value in sampled:
        if at >= resumed > 0 and not marked:
            line, marked = line + "│", True
        line += blocks[round((value - low) / ((high - low) or 1) * (len(blocks) - 1))]
    return f"loss {high:.2f} {line} {points[-1][1]:.2f}   (│ restored after the loss of a node)"
