"""How fast the planner's search is, and whether it finds the best plan.

    python -m benchmarks.plan_search [--seed N] [--quick] --json FILE

Speed: CPU seconds of one search in a process that has imported NumPy and searched once (a cold `whaleflux plan` is under a second more), the
slowest of several models, exact batches and batches that may differ by 5 %, GPUs that are large enough and GPUs that are not; and the process's peak memory.
Truth: `plan_lab/brute_force.py` looks at every plan in plain loops on random models, GPUs and batches of at most 64 GPUs, and on known models
on 128. Uneven: how much longer steps of even pipelines are. Verdicts: the four splits of 700B over 128 H200 that the literature's formulas judge, with their reasons, and the plan that fits.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace

import numpy as np

from benchmarks.common import Options, Report, Row, Target, main
from benchmarks.plan_lab.brute_force import fastest
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.binding import lacks
from whaleflux.planning.found import Split, candidate
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.offers import Goal, Offer, estimate
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training

LIMITS_S = {128: 0.2, 1024: 1.0, 16_384: 3.0}
MODELS = ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "dense-700b", "mixtral-8x22b", "qwen3-235b-a22b", "deepseek-v3", "gpt-3-175b")  # fmt: skip
MOST_MB, NEAR_PCT = 500.0, 1.0
SLACK = 0.05
TYPES = ("H200", "H100-80GB", "A100-40GB", "RTX4090")


def measure(options: Options) -> Report:
    speed = [row for gpus in LIMITS_S for row in speeds(gpus, MODELS[::3] if options.quick else MODELS)]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rng = np.random.default_rng(options.seed)
    exact = equal_to_loops(rng, 20 if options.quick else 200)
    near = near_batches(rng, 4 if options.quick else 20)
    verdicts = four_verdicts()
    known = known_at_128(("mpt-1b",) if options.quick else ("mpt-1b", "llama-3.1-8b", "llama-3.2-3b", "qwen3-30b-a3b"))
    targets = [
        Target(
            f"search_{gpus}", max(row["CPU s"] for row in speed if row["GPUs"] == gpus), limit, "s of CPU", per="numpy"
        )
        for gpus, limit in LIMITS_S.items()
    ]
    targets += [
        Target("peak_memory", peak_mb, MOST_MB, "MB"),
        Target("equal_to_brute_force", 100.0 * exact["equal"] / exact["instances"], 100.0, "%", better="higher"),
        Target("worst_at_128", max(row["worse %"] for row in known), NEAR_PCT, "%"),
        Target("worst_of_near_batches", near["worst %"], NEAR_PCT, "%"),
        Target("verdicts", sum(row["as expected"] == "yes" for row in verdicts), 4, "", better="higher"),
    ]
    return Report(
        rows=[*speed, exact, near, *known, *uneven_pipelines(), *verdicts, plan_that_fits()],
        targets=targets,
        simulated="",
        notes=[],
    )


def speeds(gpus: int, models: tuple[str, ...]) -> list[Row]:
    rows = []
    for name in models:
        shape = model_named(name)
        took, plans = [], 0
        for type_ in ("H200", "A100-40GB", "RTX4090"):
            machine = Machine.of(CATALOGUE.types[type_])
            for slack in (0.0, SLACK):
                began = time.process_time()
                found = search(shape, machine, Asked(gpus, 8192, batch=max(512, gpus // 4), batch_slack=slack))
                took.append(time.process_time() - began)
                plans = max(plans, found.looked_at)
        rows.append({"what": "speed", "model": name, "GPUs": gpus, "CPU s": max(took[1:]), "frames": plans})
    return rows


def _instance(rng: np.random.Generator) -> tuple[ModelShape, Machine, int, int, int]:
    """A model of few layers (a plain loop has to look at every number of layers to compute again), some GPUs, a batch, a sequence."""
    heads = int(rng.choice([8, 12, 16, 32, 40, 64]))
    hidden = heads * 128
    shape = ModelShape(
        "random", int(rng.choice([2, 3, 4, 6, 8, 12])), hidden, heads, heads // int(rng.choice([1, 2, 4])), 128, 4 * hidden,
        int(rng.choice([32_000, 128_256])), gated=bool(rng.integers(2)), tied=bool(rng.integers(2)),
    )  # fmt: skip
    if rng.random() < 0.3:
        shape = replace(shape, experts=int(rng.choice([4, 8])), top_k=2, expert_ffn=2 * hidden)
    machine = Machine.of(CATALOGUE.types[str(rng.choice(TYPES))])
    batch = int(rng.choice([1, 2, 3, 4, 6])) * int(rng.choice([4, 8, 16]))
    return shape, machine, int(rng.integers(1, 65)), batch, int(rng.choice([1024, 2048, 4096, 8192, 16384]))


def equal_to_loops(rng: np.random.Generator, instances: int) -> Row:
    equal, without, plans, wrong = 0, 0, 0, []
    for _ in range(instances):
        shape, machine, gpus, batch, sequence = instance = _instance(rng)
        best, count = fastest(shape, machine, gpus, [batch], sequence)
        found = search(shape, machine, Asked(gpus, sequence, batch=batch)).best
        ours = found.step_s / batch if found else float("inf")
        same = ours == best or abs(ours / best - 1) < 1e-9
        equal, without, plans = equal + same, without + (found is None), plans + count
        wrong += [] if same else [str(instance)]
    return {
        "what": "equal",
        "instances": instances,
        "equal": equal,
        "nothing fits": without,
        "plans": plans,
        "wrong": "; ".join(wrong[:3]),
    }


def near_batches(rng: np.random.Generator, instances: int) -> Row:
    """Against every number of data-parallel ranks, each with the batch that is nearest to what was asked for."""
    worst = 0.0
    for _ in range(instances):
        shape, machine, gpus, _, sequence = _instance(rng)
        batch = int(rng.choice([40, 48, 64]))
        off = int(batch * SLACK + 1e-9)
        every = range(batch - off, batch + off + 1)
        best, _ = fastest(replace(shape, layers=4), machine, gpus, every, sequence)
        found = search(replace(shape, layers=4), machine, Asked(gpus, sequence, batch=batch, batch_slack=SLACK)).best
        if found is not None:
            worst = max(worst, 100 * (found.step_s / found.split.global_batch / best - 1))
        elif np.isfinite(best):
            worst = float("inf")
    return {"what": "near batches", "instances": instances, "worst %": worst}


def known_at_128(names: tuple[str, ...]) -> list[Row]:
    rows = []
    for name in names:
        shape, machine = model_named(name), Machine.of(CATALOGUE.types["H100-80GB"])
        began = time.process_time()
        best, count = fastest(shape, machine, 128, [128], 8192)
        took = time.process_time() - began
        found = search(shape, machine, Asked(128, 8192, batch=128)).best
        worse = 100 * (found.step_s / 128 / best - 1) if found else float("inf")
        rows.append(
            {"what": "all plans of 128 GPUs", "model": name, "plans": count, "loop CPU s": took, "worse %": worse}
        )
    return rows


UNEVEN = (
    ("dense-700b", "H200", 128, 128), ("llama-3.1-405b", "H200", 128, 128), ("llama-3.1-405b", "H100-80GB", 256, 256), ("deepseek-v3", "H200", 256, 1024),
    ("llama-3.1-8b", "RTX4090", 32, 256), ("llama-3.1-70b", "H100-80GB", 64, 256),
)  # fmt: skip


def uneven_pipelines() -> list[Row]:
    """What stages with layers of their own, and recomputation of the first stages alone, save of a step."""
    rows = []
    for name, gpu, gpus, batch in UNEVEN:
        shape, machine, asked = model_named(name), Machine.of(CATALOGUE.types[gpu]), Asked(gpus, 8192, batch=batch)
        best = search(shape, machine, asked).best
        even = search(shape, machine, asked, can=lambda plans: plans.own_ends == 0).best
        alike = search(shape, machine, asked, can=lambda plans: (plans.own_ends == 0) & (plans.recomputing == 0)).best
        if best and even and alike:
            rows.append({
                "what": "uneven", "model": name, "GPUs": f"{gpus} {gpu}", "step s": best.step_s, "of even stages": even.step_s,
                "less %": 100 * (1 - best.step_s / even.step_s), "of stages that all recompute": alike.step_s, "split": best.split.words(),
            })  # fmt: skip
    return rows


# Of 700B over 128 H200 (sequence 8,192, micro-batch 1): the split, and with what recomputation it fits.
VERDICTS = (
    ("TP8 PP16 DP1", {"tp": 8, "pp": 16}, "full"),
    ("TP8 PP8 DP2, ZeRO-1", {"tp": 8, "pp": 8, "dp": 2, "zero": 1}, "full"),
    ("TP8 PP4 DP4, ZeRO-1", {"tp": 8, "pp": 4, "dp": 4, "zero": 1}, "never"),
    ("FSDP over 128", {"dp": 128, "zero": 3}, "never"),
)


def four_verdicts() -> list[Row]:
    shape, machine = model_named("dense-700b"), Machine.of(CATALOGUE.types["H200"])
    rows = []
    for name, degrees, expected in VERDICTS:
        whole = {"tp": 1, "pp": 1, "dp": 1, "cp": 1, "ep": 1, "vp": 1, "zero": 0, "replicas": 1} | degrees
        split = Split(
            **whole, micro_batch=1, global_batch=128, sequence=8192, recompute="selective", recomputed=1.0, sequence_parallel=whole["tp"] > 1
        )  # fmt: skip
        some, all_ = (
            candidate(shape, machine, replace(split, recompute=one), Training()) for one in ("selective", "full")
        )
        fits = "selective" if some.fits else "full" if all_.fits else "never"
        rows.append({
            "what": "verdict", "split": name, "fits with": fits, "as expected": "yes" if fits == expected else "no",
            "selective": lacks(some), "full": lacks(all_),
        })  # fmt: skip
    return rows


def plan_that_fits() -> Row:
    """The plan of 700B over 128 H200 that fits: about 1M tokens a step."""
    shape, gpu = model_named("dense-700b"), CATALOGUE.types["H200"]
    price = gpu.list_price
    offer = Offer(gpu, 128, price.usd_per_gpu_hour if price else None, price.source if price else "")
    one = estimate(shape, offer, Asked(128, 8192, batch=128), Goal(), Training())
    best = one.found.best
    if best is None:
        return {"what": "plan", "split": "none"}
    return {
        "what": "plan", "split": best.split.words(), "step s": best.step_s, "tokens/s/GPU": one.tokens_per_s_per_gpu, "MFU": one.mfu,
        "$/1M tokens": one.usd_per_million_tokens, "binds": one.found.binding.words,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("plan_search", measure))
