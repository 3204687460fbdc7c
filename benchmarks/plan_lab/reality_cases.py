"""What `plan_reality` trains on one GPU: models of 0.9 to 3.4 billion parameters, and the cost model's view of each case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from whaleflux.planning.calibration import Calibrated
from whaleflux.planning.memory import memory
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.step import step_time
from whaleflux.planning.training import Training

Case = Mapping[str, Any]
_FILLS = tuple(round(1 + side * step / 100, 2) for side in (-1, 1) for step in range(1, 11))
_SMALL = {"layers": 22, "hidden": 2048, "ffn": 5632, "heads": 16, "kv_heads": 4, "vocab": 32_000}  # 1.0 B, as TinyLlama
_WIDE = {
    "layers": 12,
    "hidden": 4096,
    "ffn": 14336,
    "heads": 32,
    "kv_heads": 8,
    "vocab": 128_256,
}  # 3.7 B, layers of an 8 B
_DEEP = {"layers": 28, "hidden": 3072, "ffn": 8192, "heads": 24, "kv_heads": 8, "vocab": 128_256}  # 3.6 B


def _case(
    group: str, model: Mapping[str, int], sequence: int, micro_batch: int, accumulate: int = 1, **more: Any
) -> dict[str, Any]:
    case = {"group": group, **model, "sequence": sequence, "micro_batch": micro_batch, "accumulate": accumulate}
    case |= {"wrapper": "none", "recompute": False, "compiled": False} | more
    words: list[str] = [group, f"b{micro_batch}x{accumulate}", str(case["wrapper"])]
    words += [word for word, on in (("recompute", case["recompute"]), ("compiled", case["compiled"])) if on]
    return case | {"name": " ".join(words)}


def cases() -> list[dict[str, Any]]:
    """Groups do the same work in each step: among them the planner chooses."""
    found = []
    for micro, count in ((16, 1), (8, 2), (2, 8)):
        found.append(_case("small 32k", _SMALL, 2048, micro, count))
    found += [
        _case("small 32k", _SMALL, 2048, 16, recompute=True),
        _case("small 32k", _SMALL, 2048, 8, 2, wrapper="ddp"),
        _case("small 32k", _SMALL, 2048, 8, 2, wrapper="fsdp2"),
        _case("small 32k", _SMALL, 2048, 8, 2, compiled=True),
        _case("wide 16k", _WIDE, 4096, 4),
        _case("wide 16k", _WIDE, 4096, 4, recompute=True),
        _case("wide 16k", _WIDE, 4096, 2, 2),
        _case("wide 16k", _WIDE, 4096, 2, 2, wrapper="ddp"),
        _case("wide 16k", _WIDE, 4096, 2, 2, wrapper="fsdp2"),
        _case("wide 16k", _WIDE, 4096, 2, 2, compiled=True),
        _case("wide long", _WIDE, 16384, 1),
        _case("wide long", _WIDE, 16384, 1, wrapper="fsdp2", recompute=True),
        _case("deep 8k", _DEEP, 8192, 1),
        _case("deep 8k", _DEEP, 8192, 1, recompute=True, wrapper="ddp"),
        _case("deep 8k", _DEEP, 8192, 1, compiled=True),
    ]
    return found


def borderline(found: Calibrated, fills: Sequence[float] = _FILLS) -> list[dict[str, Any]]:
    """For each share of what the GPU holds, by the cost model, the case that is nearest to it; models, sequences and software take turns."""
    usable = float(np.asarray(found.machine.usable_bytes))
    filled = [(needed_bytes(one, found) / usable, one) for one in _grown()]
    used: Counter[tuple[Any, ...]] = Counter()
    chosen = []
    for wanted in fills:
        near = [(fill, one) for fill, one in filled if abs(fill - wanted) < 0.005]
        _, one = min(near, key=lambda pair: (used[_kind(pair[1])], abs(pair[0] - wanted), pair[1]["name"]))
        used[_kind(one)] += 1
        chosen.append(one | {"borderline": True})
    return chosen


def _kind(case: Case) -> tuple[Any, ...]:
    return case["group"], case["recompute"], case["wrapper"]


def _grown() -> Iterator[dict[str, Any]]:
    for model, word in ((_SMALL, "small"), (_WIDE, "wide"), (_DEEP, "deep")):
        for sequence in (2048, 4096, 8192):
            for again in (False, True):
                for wrapper in ("none", "fsdp2"):
                    for micro in range(1, 129):
                        yield _case(f"{word} {sequence}", model, sequence, micro, wrapper=wrapper, recompute=again)


def needed_bytes(case: Case, found: Calibrated) -> float:
    shape, plan, how = seen(case)
    return float(np.ravel(memory(shape, plan, found.of(how, software(case))[0]).total_bytes)[0])


def step_s(case: Case, found: Calibrated) -> float:
    shape, plan, how = seen(case)
    how, constants = found.of(how, software(case))
    return float(np.ravel(step_time(shape, found.machine, plan, how, constants).total_s)[0])


def seen(case: Case) -> tuple[ModelShape, Plans, Training]:
    """As the cost model sees it. FSDP2 keeps 32-bit shards and gathers 16-bit ones; autocast keeps both until a layer is through backward; DDP's buckets hold summed gradients again."""
    shape = ModelShape(
        case["group"], case["layers"], case["hidden"], case["heads"], case["kv_heads"], case["hidden"] // case["heads"], case["ffn"], case["vocab"],
        case["sequence"],
    )  # fmt: skip
    sharded = case["wrapper"] == "fsdp2"
    plan = Plans.of(
        micro_batch=case["micro_batch"], global_batch=case["micro_batch"] * case["accumulate"], sequence=case["sequence"],
        zero=3 if sharded else 0, recompute=Recompute.FULL if case["recompute"] else Recompute.NONE,
    )  # fmt: skip
    buckets = case["wrapper"] == "ddp"
    how = Training(
        fused=bool(case["compiled"]), lazy_gradients=not buckets, gradient_bytes=8 if buckets and case["accumulate"] > 1 else 4, weight_bytes=0 if sharded or case["recompute"] else 2,
        cast_bytes=12 if sharded else 0, logits_bytes=12,
    )  # fmt: skip
    return shape, plan, how


def software(case: Case) -> str:
    """How its layers run, as the ladder names it: FSDP2 hands them 16-bit weights."""
    if case["wrapper"] == "fsdp2":
        return "compiled" if case["compiled"] else "eager"
    return "autocast compiled" if case["compiled"] else "autocast"
