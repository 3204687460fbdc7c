"""How well a calibrated planner predicts real training: steps, peak memory, what fits, which plan is best.

    python -m benchmarks.plan_reality --json FILE                  scores the recording in plan_lab/h200_reality.json
    python -m benchmarks.plan_reality --record FILE --json FILE    measures on this machine's GPU first (10 min), and scores that

One GPU: steps of DDP and FSDP2 are those of one rank, and tensor and pipeline parallelism have none. The ladder (`whaleflux calibrate`) ran
beside the cases in the same hour. The facts about PyTorch in `reality_cases.seen` (what autocast keeps, DDP's buckets) were written while looking
at runs like these, and no number was fitted on them; `without` are the same predictions from the data sheet and the published runs alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.plan_lab.reality_cases import borderline, cases, needed_bytes, step_s
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.calibration import Calibrated, calibrated, ladder_from_text
from whaleflux.planning.constants import FITTED
from whaleflux.planning.machine import Machine

_RECORDED = Path(__file__).parent / "plan_lab" / "h200_reality.json"
_PROGRAM = Path(__file__).parent / "plan_lab" / "reality_gpu.py"
_STEP_MEAN_PCT, _STEP_MAX_PCT, _MEMORY_PCT, _CHOSEN_PCT, _VERDICTS = 7.0, 12.0, 5.0, 3.0, 0.95


def measure(options: Options) -> Report:
    record = options.extra.record
    if record is not None:
        record.write_text(json.dumps(_measured()), encoding="utf-8")
    said = json.loads((record or _RECORDED).read_text(encoding="utf-8"))
    ladder = ladder_from_text(json.dumps(said["ladder"]))
    sheet = Machine.of(CATALOGUE.types[CATALOGUE.name_of(ladder.gpu, int(ladder.memory_bytes))])
    found, plain = calibrated(sheet, ladder), Calibrated(sheet, FITTED, {})
    rows = [_row(case, found, plain) for case in said["cases"]]
    verdicts = [_verdict(case, found) for case in said["borderline"]]
    chosen = _chosen(said["cases"], found)
    return Report(
        rows=[*rows, *chosen, *verdicts],
        targets=_targets(rows, chosen, verdicts),
        simulated="",
        notes=[
            f"one {ladder.gpu}; PyTorch {said['ladder'].get('torch')}; the ladder took {said['ladder'].get('measured_s', 0):.0f} s"
        ],
    )


def _measured() -> dict[str, Any]:
    from whaleflux.sdk.ladder import measure as climb

    ladder = asdict(climb(say=lambda what: print(what, file=sys.stderr, flush=True)))
    parsed = ladder_from_text(json.dumps(ladder))
    sheet = Machine.of(CATALOGUE.types[CATALOGUE.name_of(parsed.gpu, int(parsed.memory_bytes))])
    return {
        "ladder": ladder,
        "cases": _trained(cases()),
        "borderline": _trained(borderline(calibrated(sheet, parsed))),
    }


def _trained(some: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        asked, done = Path(folder) / "cases.json", Path(folder) / "measured.json"
        asked.write_text(json.dumps(list(some)), encoding="utf-8")
        subprocess.run([sys.executable, str(_PROGRAM), str(asked), str(done)], check=True, timeout=3600)
        measured: list[dict[str, Any]] = json.loads(done.read_text(encoding="utf-8"))
        return measured


def _row(case: dict[str, Any], found: Calibrated, plain: Calibrated) -> Row:
    needed = needed_bytes(case, found)
    return {
        "case": case["name"],
        "measured_s": round(case["step_s"], 4),
        "step_pct": _percent(step_s(case, found), case["step_s"]),
        "without_pct": _percent(step_s(case, plain), case["step_s"]),
        "measured_gb": round(case["allocated_bytes"] / 1e9, 1),
        "memory_pct": _percent(needed, case["allocated_bytes"]),
    }


def _percent(predicted: float, measured: float) -> float:
    return round(100 * (predicted / measured - 1), 2)


def _chosen(measured: Sequence[dict[str, Any]], found: Calibrated) -> list[Row]:
    """Of cases that do the same work: how much slower the planner's choice is than the fastest, with and without compiled layers."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in measured:
        groups[case["group"]].append(case)
        if not case["compiled"]:
            groups[f"{case['group']}, eager"].append(case)
    rows: list[Row] = []
    for name, some in groups.items():
        best = min(some, key=lambda case: float(case["step_s"]))
        taken = min(some, key=lambda case: step_s(case, found))
        rows.append(
            {
                "case": f"best of {len(some)}: {name}",
                "chosen": taken["name"],
                "slower_pct": _percent(taken["step_s"], best["step_s"]),
            }
        )
    return rows


def _verdict(case: dict[str, Any], found: Calibrated) -> Row:
    share = needed_bytes(case, found) / float(np.asarray(found.machine.usable_bytes))
    return {
        "case": f"fits? {case['name']} x {case['sequence']}",
        "share_of_gpu": round(share, 3),
        "fits": case["fits"],
        "right": (share <= 1) == case["fits"],
    }


def _targets(rows: Sequence[Row], chosen: Sequence[Row], verdicts: Sequence[Row]) -> list[Target]:
    step = np.abs([row["step_pct"] for row in rows])
    memory = np.abs([row["memory_pct"] for row in rows])
    return [
        Target("step_mean_error", float(step.mean()), _STEP_MEAN_PCT, "%"),
        Target("step_max_error", float(step.max()), _STEP_MAX_PCT, "%"),
        Target("peak_memory_mean_error", float(memory.mean()), _MEMORY_PCT, "%"),
        Target("chosen_slower_than_best", max(row["slower_pct"] for row in chosen), _CHOSEN_PCT, "%"),
        Target(
            "borderline_fits_right",
            sum(row["right"] for row in verdicts) / len(verdicts),
            _VERDICTS,
            "",
            better="higher",
        ),
    ]


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, help="measure on this machine's GPU, and keep it there")


if __name__ == "__main__":
    sys.exit(main("plan_reality", measure, add_arguments=options_of))
