"""Fine-tuning on GPUs of several kinds: time per token against the even split and each kind alone, planned; and a real run of four uneven ranks.

    python -m benchmarks.plan_mixed [--quick] [--planned-only | --run-only] --json FILE

Planned: the cost model's steps (`plan_accuracy` says how far it is from real ones), no GPU runs. The even split is the planner's best for as many GPUs
of the slower kind, with the smaller memory: that is what every GPU of an even split waits for. It may take 10 % more or fewer samples, all else takes exactly as many.
Run: four ranks over gloo, two of them held to half the speed of the others (`plan_lab/uneven_training.py` says how); even split is torch's own
DistributedSampler under DDP, ours `whaleflux.sdk.Balance` in its place; the same steps with the same samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Options, Report, Row, Target, main
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.mixed import MixedAsked, mixed_search
from whaleflux.planning.pools import Pool, slowest
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training

MODELS = ("llama-2-7b", "llama-3.1-8b", "llama-2-13b", "qwen2.5-32b", "llama-3.1-70b")
QUICK = ("llama-3.1-8b", "llama-3.1-70b")
BATCH, SEQUENCE = 512, 4096
PROMISED, MORE_SAMPLES, LOSS_GOAL = 65.0, 30.0, 1e-4
CORE_SHARES = (0.2, 0.2, 0.1, 0.1)
_SETTLED = 25  # steps after which shares are where they stay


def pool(gpu: str, gpus: int, site_gbps: float = 0.0) -> Pool:
    """Of the catalogue; at a site of its own behind a link of so many Gb/s, 10 ms away."""
    found = Pool(Machine.of(CATALOGUE.types[gpu]), gpus)
    return replace(found, uplink_bytes_per_s=site_gbps / 8 * 1e9 / gpus, uplink_hop_s=0.01) if site_gbps else found


FLEETS: Mapping[str, tuple[Pool, ...]] = {
    "16 H100 + 32 A100": (pool("H100-80GB", 16), pool("A100-80GB", 32)),
    "the same at two sites, 100 Gb/s": (pool("H100-80GB", 16, 100), pool("A100-80GB", 32, 100)),
    "the same at two sites, 10 Gb/s": (pool("H100-80GB", 16, 10), pool("A100-80GB", 32, 10)),
    "16 H100 + 8 RTX 4090": (pool("H100-80GB", 16), pool("RTX4090", 8)),
    "8 A100 + 32 RTX 4090": (pool("A100-80GB", 8), pool("RTX4090", 32)),
}


def measure(options: Options) -> Report:
    report = Report(simulated="GPUs, links and sites of the planned rows; in the run, that two ranks are slow")
    if not options.extra.run_only:
        _plan(report, QUICK if options.quick else MODELS)
    if not options.extra.planned_only:
        _run(report, 60 if options.quick else 100, options.seed)
    return report


def _plan(report: Report, models: Sequence[str]) -> None:
    for fleet, pools in FLEETS.items():
        for model in models:
            for method in ("full", "lora"):
                report.rows.append(_row(fleet, pools, model, method))
    rows = [row for row in report.rows if row["fleet"] == next(iter(FLEETS))]
    for other in ("even split", *(one.name for one in FLEETS[rows[0]["fleet"]])):
        saved = {
            f"{row['model']} {row['method']}": row[f"less than {other}, %"]
            for row in rows
            if row.get(f"less than {other}, %") is not None
        }
        case, best = max(saved.items(), key=lambda item: item[1])
        report.targets.append(Target(f"less_time_than_{other.replace(' ', '_')}", best, PROMISED, "%", "higher"))
        report.notes.append(
            f"against {other}: {min(saved.values()):.0f} to {best:.0f} % less time per token, most for {case}"
        )


def _row(fleet: str, pools: tuple[Pool, ...], model: str, method: str) -> Row:
    shape, how = model_named(model), Training(frozen=method == "lora")
    begun_s = time.perf_counter()
    found = mixed_search(shape, pools, MixedAsked(BATCH, SEQUENCE), how)
    took_s = time.perf_counter() - begun_s
    every = sum(one.gpus for one in pools)
    even = search(shape, slowest(pools), Asked(gpus=every, sequence=SEQUENCE, batch=BATCH, batch_slack=0.1), how).best
    row: Row = {"fleet": fleet, "model": model, "method": method, "search_s": round(took_s, 2)}
    if found.best is None:
        return row | {"plan": "does not fit"}
    own_s = found.best.token_s
    row["us/token"] = round(own_s * 1e6, 3)
    token_s = {"even split": even.token_s if even else None} | {
        name: step_s / (BATCH * SEQUENCE) if step_s else None for name, step_s in found.alone_s.items()
    }
    for name, other_s in token_s.items():
        row[f"{name} us/token"] = round(other_s * 1e6, 3) if other_s else None
        row[f"less than {name}, %"] = round(100 * (1 - own_s / other_s), 1) if other_s else None
    return row | {"left out": ", ".join(found.left_out), "plan": found.best.words()}


def _run(report: Report, steps: int, seed: int) -> None:
    even, ours = (_ranks(split, steps, seed) for split in ("even", "balance"))
    rows = [_speed("even split", even), _speed("Balance", ours), _speed("Balance, shares settled", ours, _SETTLED)]
    report.rows += rows
    losses = [np.array(ranks[0]["losses"]) for ranks in (even, ours)]
    apart = float(np.max(np.abs(losses[0] - losses[1]) / np.abs(losses[0])))
    more = [100 * (row["samples/s"] / rows[0]["samples/s"] - 1) for row in rows[1:]]
    report.targets += [
        Target("more_samples_settled", more[1], MORE_SAMPLES, "%", "higher"),
        Target("more_samples_from_the_first_step", more[0], MORE_SAMPLES, "%", "higher"),
        Target("losses_apart", apart, LOSS_GOAL, "relative"),
    ]
    report.notes.append(
        f"loss {losses[0][0]:.4f} to {losses[0][-1]:.4f} in {steps} steps; shares at the end {ours[0]['shares'][-1]}"
    )


def _ranks(split: str, steps: int, seed: int) -> list[dict[str, Any]]:
    """What four ranks noted."""
    told = {"split": split, "steps": steps, "core_shares": CORE_SHARES, "seed": seed, "samples": 64 * 40}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "benchmarks.plan_lab.uneven_training",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, json.dumps(told), folder], cwd=ROOT, env=environment, check=True, timeout=900)
        return [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(4)]


def _speed(name: str, ranks: list[dict[str, Any]], skip: int = 0) -> Row:
    step_s = np.max([rank["step_s"] for rank in ranks], axis=0)[skip:]
    samples = np.sum([rank["samples"] for rank in ranks], axis=0)[skip:]
    return {
        "run": name,
        "steps": len(step_s),
        "step_ms": round(1000 * float(step_s.mean()), 1),
        "samples/s": round(float(samples.sum() / step_s.sum()), 1),
    }


def options_of(parser: argparse.ArgumentParser) -> None:
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--planned-only", action="store_true", help="no run")
    only.add_argument("--run-only", action="store_true", help="no plans")


if __name__ == "__main__":
    sys.exit(main("plan_mixed", measure, add_arguments=options_of))
