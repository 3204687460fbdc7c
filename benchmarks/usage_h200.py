"""Whether what agents and ranks tell of GPUs is true, on the GPUs of this machine: a real training beside the agent's counters.

    python -m benchmarks.usage_h200 --json FILE        measures (6 min, one or two GPUs of Hopper or later, PyTorch and what the agent needs)

The training's FLOPs are counted from its shapes (torch.utils.flop_counter); MFU by counters is `tensor_ppm` of the agent's sampler, in windows
that lie within a phase. Waits for the CPU are told of the steps behind the first that was looked at: against how long the program slept amid its steps, and
where kernels are small against the same work replayed as one CUDA graph. NVLink bytes are compared with what a ring of all-reduces sends. Costs are medians of blocks of 20 steps,
with and without, side by side.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Options, Report, Row, Target, main

_EVERY_S = 5.0
_PEAK_FLOPS = 989.4e12  # bf16, dense: data sheet of H100 and H200 SXM
_MFU_POINTS, _NVLINK_PCT, _COST_PCT, _CORES_PER_8 = 2.0, 2.0, 0.1, 0.01
_SLEPT = {"full": "host", "half": "data", "host": "host"}  # phases, and what their sleep is told as
_MARGIN_S = 1.0  # around a phase's begin and end

Lines = list[dict[str, Any]]


def plan(gpus: int, scale: float) -> list[dict[str, Any]]:
    """Phases of the training; those with and without costs alternate."""

    def phase(name: str, seconds: float, stall: float = 0.0, sdk: bool = False, kind: str = "train") -> dict[str, Any]:
        return {"name": name, "seconds": seconds * scale, "stall": stall, "sdk": sdk, "kind": kind}

    found = [phase("warm up", 15), phase("full", 40, sdk=True), phase("half", 40, 0.5, True)]
    found += [phase("host", 40, 0.25, True, "host"), phase("launches", 8, sdk=True, kind="launches")]
    for at in range(8):
        found += [phase(f"plain {at}", 5), phase(f"told {at}", 5, sdk=True)]
    if gpus > 1:
        found.append(phase("reduce", 25, kind="reduce"))
    return found


def measure(options: Options) -> Report:
    """What counters, ranks and their cost are against what was counted."""
    gpus = _gpus()
    if not gpus:
        return Report(
            targets=_targets({}),
            notes=["not run here: it needs an NVIDIA GPU with performance counters, PyTorch and nvidia-ml-py"],
        )
    with tempfile.TemporaryDirectory() as folder:
        seen, ranks = _ran(Path(folder), plan(gpus, 0.25 if options.quick else 1.0), gpus)
    rows, found = scored(seen, ranks)
    return Report(rows=rows, targets=_targets(found), notes=[f"{gpus} GPU(s); windows of {_EVERY_S:g} s"])


def _gpus() -> int:
    """At most two."""
    try:
        import pynvml  # noqa: F401
        import torch
    except ImportError:
        return 0
    return min(2, int(torch.cuda.device_count()))


def _ran(folder: Path, phases: Sequence[dict[str, Any]], gpus: int) -> tuple[Lines, list[Lines]]:
    """What the sampler saw, and what each rank said."""
    module = [sys.executable, "-m", "benchmarks.usage_lab.sampler", str(folder / "seen.jsonl"), str(_EVERY_S)]
    with subprocess.Popen(module, stdin=subprocess.PIPE) as sampler:
        try:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
            program = ["-m", "benchmarks.usage_lab.training", str(folder), json.dumps(phases)]
            subprocess.run([*launcher, *program], check=True, timeout=480)
        finally:
            assert sampler.stdin is not None
            sampler.stdin.close()
            try:
                sampler.wait(timeout=30)
            except subprocess.TimeoutExpired:
                sampler.send_signal(signal.SIGKILL)
    return _lines(folder / "seen.jsonl"), [_lines(folder / f"rank-{rank}.jsonl") for rank in range(gpus)]


def _lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scored(seen: Lines, ranks: Sequence[Lines]) -> tuple[list[Row], dict[str, float]]:
    """Rows, and figures by target. Pure. GPU i runs rank i."""
    windows = [one for one in seen if "cores" not in one]
    phases = [{line["phase"]: line for line in rank if "phase" in line} for rank in ranks]
    rows = [
        _mfu_row(name, rank, phases[rank][name], windows) for name in ("full", "half") for rank in range(len(ranks))
    ]
    for name, part in _SLEPT.items():
        rows += [_part_row(part, rank, phases[rank][name], ranks[rank]) for rank in range(len(ranks))]
    rows.append(_launches_row(phases[0]["launches"], ranks[0]))
    found = {
        "mfu_points": max(
            (abs(row["by counters"] - row["counted"]) for row in rows if row["what"].startswith("MFU")),
            default=math.nan,
        )
    }
    for part in ("data", "host"):
        waits = [row for row in rows if row["what"].startswith(f"{part} wait")]
        found[f"{part}_points"] = max(abs(row["by counters"] - row["counted"]) for row in waits)
    if "reduce" in phases[0]:
        row = _nvlink_row(phases[0]["reduce"], windows)
        rows.append(row)
        found["nvlink_pct"] = abs(row["by counters"] / row["counted"] - 1) * 100
    pairs = list(_pairs(phases[0]))
    found["sdk_pct"] = statistics.median(100 * (told / plain - 1) for plain, told in pairs)
    for plain, told in pairs:
        rows.append({"what": "step, ms: plain, told", "counted": plain * 1e3, "by counters": told * 1e3})
    costs_s = {name: one["look_cost_s"] for name, one in phases[0].items() if one.get("look_cost_s") is not None}
    rows += [{"what": f"a look, ms, {name}", "by counters": cost_s * 1e3} for name, cost_s in costs_s.items()]
    found["look_pct"] = _look_pct(costs_s, pairs)
    cost = next((one for one in seen if "cores" in one), {"cores": math.nan, "gpus": 1})
    found["cores_per_8"] = cost["cores"] * 8 / cost["gpus"]
    rows.append({"what": "sampler, cores per 8 GPUs", "by counters": found["cores_per_8"]})
    return rows, found


def _mfu_row(name: str, rank: int, phase: dict[str, Any], windows: Lines) -> Row:
    within = [one for one in windows if _within(one, phase)]
    shares = [gpu["tensor_ppm"] / 1e4 for one in within if (gpu := one["gpus"][rank])["tensor_ppm"] is not None]
    counted = phase["flops"] / (phase["end_s"] - phase["start_s"]) / _PEAK_FLOPS * 100
    by_counters = statistics.mean(shares) if shares else math.nan
    return {
        "what": f"MFU %, {name}, GPU {rank}",
        "counted": counted,
        "by counters": by_counters,
        "windows": len(shares),
    }


def _part_row(part: str, rank: int, phase: dict[str, Any], lines: Lines) -> Row:
    """What a rank says that it waited for data or for the CPU, against how long its program slept there."""
    counted = phase["slept_s"] if _SLEPT[phase["phase"]] == part else 0.0
    whole_s = phase["end_s"] - phase["start_s"]
    return {
        "what": f"{part} wait %, {phase['phase']}, rank {rank}",
        "counted": counted / whole_s * 100,
        "by counters": _told_pct(part, phase, lines),
    }


def _launches_row(phase: dict[str, Any], lines: Lines) -> Row:
    """Small kernels: what a step takes longer than the same work as one graph."""
    step_s = statistics.median(
        (one["end_s"] - one["start_s"]) / (one["last_step"] - one["first_step"] + 1) for one in _reports(phase, lines)
    )
    return {
        "what": f"wait for launches %, steps of {step_s * 1e3:.2f} ms",
        "counted": 100 * (1 - phase["graph_s"] / step_s),
        "by counters": _told_pct("host", phase, lines),
    }


def _told_pct(part: str, phase: dict[str, Any], lines: Lines) -> float:
    """Of the time of the reports that say it."""
    said = [one for one in _reports(phase, lines) if one[f"{part}_s"] is not None]
    whole_s = sum(one["end_s"] - one["start_s"] for one in said)
    return 100 * sum(one[f"{part}_s"] for one in said) / whole_s if said else math.nan


def _reports(phase: dict[str, Any], lines: Lines) -> Lines:
    reports = [line["report"] for line in lines if "report" in line]
    return [one for one in reports if phase["start_s"] <= one["start_s"] and one["end_s"] <= phase["end_s"]]


def _nvlink_row(phase: dict[str, Any], windows: Lines) -> Row:
    """Bytes of a second: whole windows within the phase against the phase's mean."""
    within = [one for one in windows if _within(one, phase)]
    sent = sum(one["gpus"][0]["nvlink_sent_bytes"] or 0 for one in within)
    seconds = sum(one["end_s"] - one["start_s"] for one in within)
    counted = phase["sent_bytes"] / (phase["end_s"] - phase["start_s"])
    return {
        "what": "NVLink sent, GB/s",
        "counted": counted / 1e9,
        "by counters": (sent / seconds if seconds else math.nan) / 1e9,
    }


def _within(window: dict[str, Any], phase: dict[str, Any]) -> bool:
    return bool(window["start_s"] >= phase["start_s"] + _MARGIN_S and window["end_s"] <= phase["end_s"] - _MARGIN_S)


def _pairs(phases: dict[str, Any]) -> Iterable[tuple[float, float]]:
    """Seconds of a step without and with, of phases that follow one another: GPUs grow warm, and slower by more than is looked for."""
    for name, one in phases.items():
        if name.startswith("plain"):
            told = phases[name.replace("plain", "told")]
            yield statistics.median(one["blocks_s"]), statistics.median(told["blocks_s"])


def _look_pct(costs_s: dict[str, float], pairs: Sequence[tuple[float, float]]) -> float:
    """Of the time between two looks, where they are as often as their cost allows; the first one in a process is apart."""
    from whaleflux.sdk.looks import steps_between  # imports PyTorch

    later = [cost_s for name, cost_s in costs_s.items() if name in _SLEPT and name != "full"]
    if not later:
        return math.nan
    cost_s, step_s = statistics.mean(later), statistics.median(plain for plain, _ in pairs)
    return 100 * cost_s / (steps_between(cost_s, step_s) * step_s)


def _targets(found: dict[str, float]) -> list[Target]:
    def target(name: str, most: float, unit: str) -> Target:
        return Target(f"usage_h200.{name}", found.get(name, math.nan), most, unit)

    return [
        target("mfu_points", _MFU_POINTS, "points between MFU by counters and by counted FLOPs, at most"),
        target("host_points", _MFU_POINTS, "points between waits for the CPU as told and as slept"),
        target("look_pct", _COST_PCT, "% of the time that looks at single steps cost"),
        target("data_points", _MFU_POINTS, "points between waits for data as told and as slept"),
        target("nvlink_pct", _NVLINK_PCT, "% between NVLink bytes by counters and by all-reduces"),
        target("sdk_pct", _COST_PCT, "% of a step that telling of steps costs"),
        target("cores_per_8", _CORES_PER_8, "cores that sampling 8 GPUs costs"),
    ]


if __name__ == "__main__":
    sys.exit(main("usage_h200", measure))
