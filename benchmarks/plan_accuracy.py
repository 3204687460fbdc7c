"""How far the cost model is from measured training steps, table by table, next to what the best public tool reaches.

    python -m benchmarks.plan_accuracy [--data PATH] [--by shape|source] [--fit] --json FILE

PATH is a CSV file, a folder of such files, or a folder laid out like ../shared/data. What a table is called does not matter, its columns do
(`plan_lab/tables.py`). `shipped` is the error of the constants as they are in `planning/constants.py`; `held_out` that of constants fitted
without the runs of the same shape (5 folds by hidden size and layers; with `--by source`, without the whole table). With --quick, or where the
tables are not those that the constants were fitted on, nothing is fitted. Only seconds and tokens per second are scored.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.plan_lab.fitting import fit, held_out
from benchmarks.plan_lab.predict import Array, batches, seconds
from benchmarks.plan_lab.tables import Run, all_runs
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.memory import layer_weights, memory
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.training import Training

FOLDS = 5
# What the best public tool reaches on the same rows, mean error in percent (published, or measured: docs of the tables).
PEERS = {
    "vtrain_single": "vTrain 8.37 (profiled), Calculon 35.1", "korthikanti_2022": "Calculon 3.65", "megatron_2021": "Calculon 18.1",
    "megatron_h100_2024": "Calculon 38.3",
}  # fmt: skip
GOALS = {"vtrain_single": 8.0, "korthikanti_2022": 3.0, "megatron_2021": 6.0, "megatron_h100_2024": 10.0}
MODERN = ("nemo_2407_h100_fp8", "nemo_automodel_h100_bf16", "llm_foundry H100-80GB", "megatron_bridge_all")
MODERN_GOAL, SPEARMAN_GOAL, MEMORY_GOAL = 10.0, 0.95, 5.0
_NOT_FITTED = (
    "recalled",
    "_measured",
)  # tables that nobody re-read at the source; our own, which is there to be held against
_OWN = Path(__file__).parent / "plan_lab" / "h200_measured.csv"


def measure(options: Options) -> Report:
    paths = tables_below(options.data)
    runs, left_out = all_runs(paths)
    if not runs:
        sys.exit(
            f"{options.data}: no table with GPUs, a batch and a measured time (benchmarks/plan_lab/tables.py says which columns)"
        )
    known = set(GOALS) <= {run.family for run in runs}
    usable = [not run.is_moe and not any(word in run.family for word in _NOT_FITTED) for run in runs]
    notes = [
        f"{table}: {count} rows left out: {why}"
        for table, reasons in left_out.items()
        for why, count in reasons.items()
    ]
    if options.extra.fit:
        found = fit([run for run, use in zip(runs, usable, strict=True) if use], options.seed)
        notes.append("fitted: " + ", ".join(f"{one.name}={getattr(found, one.name):.4g}" for one in fields(Constants)))
    shipped = seconds(batches(runs), FITTED)
    fitted = None
    if known and not options.quick:
        keys = [run.fold if options.extra.by == "shape" else run.family.split(" ")[0] for run in runs]
        folds = FOLDS if options.extra.by == "shape" else len(set(keys))
        fitted = held_out(runs, keys, folds, options.seed, usable)
    rows = [_row(family, runs, numbers, shipped, fitted) for family, numbers in _families(runs).items()]
    stored = [*(row for path in paths for row in _memory_rows(path)), *_peaks(runs)]
    return Report(rows=[*rows, *stored], targets=_targets(rows, stored), simulated="", notes=notes)


def tables_below(path: Path) -> list[Path]:
    """A file, the files of a folder, or those of its folder `validation` and what we measured ourselves."""
    if path.is_file():
        return [path]
    if (path / "validation").is_dir():
        return [*sorted((path / "validation").glob("*.csv")), _OWN]
    return sorted(path.glob("*.csv"))


def _families(runs: Sequence[Run]) -> Mapping[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        found[run.family].append(number)
    return found


def _row(family: str, runs: Sequence[Run], numbers: list[int], shipped: Array, fitted: Array | None) -> Row:
    measured = np.array([runs[number].step_s for number in numbers])
    error = shipped[numbers] / measured - 1
    row: Row = {"table": family, "rows": len(numbers), **_errors("shipped", error)}
    row["spearman"] = _spearman(runs, numbers, shipped)
    if fitted is not None:
        row |= _errors("held_out", fitted[numbers] / measured - 1)
    row["best_tool"] = PEERS.get(family, "")
    return row


def _errors(name: str, error: Array) -> Row:
    return {
        f"{name}_mean_pct": round(100 * float(np.abs(error).mean()), 2),
        f"{name}_bias_pct": round(100 * float(error.mean()), 2),
        f"{name}_max_pct": round(100 * float(np.abs(error).max()), 1),
    }


def _spearman(runs: Sequence[Run], numbers: list[int], predicted: Array) -> float | str:
    """Of tokens per second and GPU, which is what plans are ranked by; nothing for less than five rows."""
    from scipy.stats import spearmanr

    if len(numbers) < 5:
        return ""
    work = np.array([_tokens_per_gpu(runs[number]) for number in numbers])
    measured = np.array([runs[number].step_s for number in numbers])
    return round(float(spearmanr(work / measured, work / predicted[numbers]).statistic), 3)


def _tokens_per_gpu(run: Run) -> float:
    split = run.split
    return split["global_batch"] * split["sequence"] / (split["tp"] * split["pp"] * split["cp"] * split["dp"])


def _peaks(runs: Sequence[Run]) -> list[Row]:
    """Of tables with the allocator's peak: all that a step needs, on GPUs of one stage."""
    rows: list[Row] = []
    for family, numbers in _families(runs).items():
        known = [runs[number] for number in numbers if (runs[number].about.get("allocated_bytes") or "").isdigit()]
        if not known:
            continue
        needed = np.empty(len(known))
        for batch in batches([replace(run, open=()) for run in known]):
            needed[batch.rows] = memory(batch.shape, batch.plans, batch.training).total_bytes
        real = np.array([float(run.about["allocated_bytes"]) for run in known])
        rows.append({"table": f"{family} allocated_bytes", "rows": len(known), **_errors("shipped", needed / real - 1)})
    return rows


_MEMORY = ("static_mem_gib", "act_mem_gib_no_recompute_no_sp", "act_mem_gib_selective_sp")


def _memory_rows(path: Path) -> list[Row]:
    """Of a table with published memory in GiB: state of the layers (published without embeddings), activations as they were and with both savings."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if set(_MEMORY) <= line.keys() and line[_MEMORY[0]]]
    errors: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        number = {
            name: float(line[name])
            for name in (
                "layers",
                "hidden",
                "heads",
                "ffn",
                "vocab",
                "tp",
                "pp",
                "dp",
                "vp",
                "micro_batch",
                "global_batch",
            )
        }
        shape = ModelShape(
            "gpt", int(number["layers"]), int(number["hidden"]), int(number["heads"]), int(number["heads"]), int(number["hidden"] / number["heads"]),
            int(number["ffn"]), int(number["vocab"]), gated=False, tied=True,
        )  # fmt: skip
        for name, gib in _predicted_gib(shape, number, float(line["seq_len"])).items():
            errors[name].append(gib / float(line[name]) - 1)
    return [
        {"table": f"{path.stem} {name}", "rows": len(found), **_errors("shipped", np.array(found))}
        for name, found in errors.items()
    ]


def _predicted_gib(shape: ModelShape, number: Mapping[str, float], sequence: float) -> dict[str, float]:
    split = {name: number[name] for name in ("tp", "pp", "dp", "vp", "micro_batch", "global_batch")}
    how = Training(flash=False, dropout=True)
    plain = Plans.of(sequence=sequence, **split)
    saving = Plans.of(sequence=sequence, sequence_parallel=True, recompute=Recompute.SELECTIVE, **split)
    layers = 18 * float(layer_weights(shape, plain).common) * shape.layers / number["pp"]
    held = (
        layers,
        float(memory(shape, plain, how).activations_bytes),
        float(memory(shape, saving, how).activations_bytes),
    )
    return {name: size / 2**30 for name, size in zip(_MEMORY, held, strict=True)}


def _targets(rows: Sequence[Row], stored: Sequence[Row]) -> list[Target]:
    """By what was held out, where something was."""
    by_name = {row["table"]: row for row in rows}
    kind = "held_out" if any("held_out_mean_pct" in row for row in rows) else "shipped"
    targets = [
        Target(f"{name}_mean_error", by_name[name][f"{kind}_mean_pct"], goal, "%")
        for name, goal in GOALS.items()
        if name in by_name
    ]
    for name in (name for name in MODERN if name in by_name):
        targets.append(Target(f"{name}_mean_error", by_name[name][f"{kind}_mean_pct"], MODERN_GOAL, "%"))
        if by_name[name]["spearman"] != "":
            targets.append(Target(f"{name}_spearman", by_name[name]["spearman"], SPEARMAN_GOAL, "", better="higher"))
    targets += [Target(f"{row['table']}_mean_error", row["shipped_mean_pct"], MEMORY_GOAL, "%") for row in stored]
    return targets


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--by", choices=("shape", "source"), default="shape", help="what is held out together")
    parser.add_argument("--fit", action="store_true", help="fit the constants on all tables and print them")


if __name__ == "__main__":
    sys.exit(main("plan_accuracy", measure, add_arguments=options_of))
