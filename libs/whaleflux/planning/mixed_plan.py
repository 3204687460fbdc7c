"""What planning over several pools answers with: plain numbers and words, frozen, and as JSON by `dataclasses.asdict`."""

from __future__ import annotations

from dataclasses import dataclass

from whaleflux.planning.found import Candidate
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.pools import Pool

ALONE, REPLICAS, STAGES = "one pool", "replicas", "stages"


@dataclass(frozen=True, slots=True)
class PoolPart:
    """What one pool does. `samples` of each of its replicas in a step and `layers` of each of its stages, as many as there are.

    `busy_s`: how long its slowest GPU works in a step, with communication that nothing hides; `needed_bytes` of its fullest GPU.
    """

    pool: str
    gpus: int
    tp: int
    samples: tuple[int, ...]
    layers: tuple[int, ...]
    busy_s: float
    needed_bytes: float
    usable_bytes: float


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """`kind`: one pool, replicas (data parallelism over pools) or stages (a pipeline through them). `zero`, `copies` (of HSDP), `recompute` as elsewhere.

    `micro_batch` is in samples; 0: FSDP, where every rank has `micro_batches` of its own size.
    """

    kind: str
    parts: tuple[PoolPart, ...]
    step_s: float
    global_batch: int
    sequence: int
    micro_batch: int
    micro_batches: int
    zero: int
    copies: int
    recompute: str

    @property
    def gpus(self) -> int:
        return sum(part.gpus for part in self.parts)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s

    @property
    def token_s(self) -> float:
        return self.step_s / self.tokens_per_step

    def words(self) -> str:
        """As people say it."""
        pools = " + ".join(_said(part, self.kind) for part in self.parts)
        how = [
            {0: "", 1: "ZeRO-1", 2: "ZeRO-2", 3: "FSDP (ZeRO-3)"}[self.zero],
            f"{self.recompute if self.recompute != 'none' else 'no'} recomputation",
        ]
        if self.copies > 1:
            how[0] = f"HSDP (ZeRO-3 in {self.copies} replicas)"
        return f"{self.kind}: {pools}; {', '.join(one for one in how if one)}"


def _said(part: PoolPart, kind: str) -> str:
    tp = f" tp {part.tp}" if part.tp > 1 else ""
    if kind == STAGES:
        return f"{part.gpus} x {part.pool}{tp}, layers {_counts(part.layers)}"
    stages = f" pp {len(part.layers)}" if len(part.layers) > 1 else ""
    return f"{part.gpus} x {part.pool}{tp}{stages}, samples {_counts(part.samples)}"


def _counts(numbers: tuple[int, ...]) -> str:
    """16 x 5, 2 x 4."""
    return ", ".join(f"{numbers.count(one)} x {one}" for one in sorted(set(numbers), reverse=True))


@dataclass(frozen=True, slots=True)
class MixedFound:
    """`others`: what else fits, fastest first. `alone_s`: the best step of each pool by itself, None where none fits."""

    best: MixedPlan | None
    others: tuple[MixedPlan, ...]
    alone_s: dict[str, float | None]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Pools that would cost more than they bring."""
        used = {part.pool for part in self.best.parts} if self.best else set()
        return tuple(name for name in self.alone_s if name not in used)


def alone(pool: Pool, plan: Candidate, shape: ModelShape) -> MixedPlan:
    """One pool's best plan, in these terms."""
    split = plan.split
    part = PoolPart(
        pool.name, split.gpus, split.tp, (split.global_batch // split.dp,) * split.dp, split.stage_layers(shape), plan.step_s,
        plan.total_bytes, plan.usable_bytes,
    )  # fmt: skip
    return MixedPlan(
        ALONE, (part,), plan.step_s, split.global_batch, split.sequence, split.micro_batch, split.micro_batches, split.zero, split.replicas,
        split.recompute,
    )  # fmt: skip
