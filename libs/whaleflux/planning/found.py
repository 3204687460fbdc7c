"""What a search answers with: plain numbers and words, frozen, and as JSON by `dataclasses.asdict`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.machine import Machine
from whaleflux.planning.memory import Memory, memory_of_stage
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.step import Groups, StepTime, step_time
from whaleflux.planning.training import Training

PART_WORDS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activations_bytes": "activations",
    "working_bytes": "working set of a layer",
    "logits_bytes": "logits",
}
STEP_WORDS = {
    "compute_s": "compute",
    "recompute_s": "recomputation",
    "host_s": "waiting for kernels",
    "tp_s": "tensor parallel",
    "cp_s": "context parallel",
    "ep_s": "expert parallel",
    "pp_s": "between stages",
    "dp_s": "data parallel",
    "bubble_s": "pipeline bubble",
    "optimizer_s": "optimizer",
    "data_s": "waiting for data",
    "checkpoint_s": "checkpoints",
}


_WHOLE = (
    "tp", "pp", "dp", "cp", "ep", "vp", "micro_batch", "global_batch", "sequence", "zero", "replicas", "recomputing", "first_layers", "last_layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Split:
    """One plan's numbers, as `Plans` has them. `recompute` is none, selective or full."""

    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    vp: int
    micro_batch: int
    global_batch: int
    sequence: int
    zero: int
    replicas: int
    recompute: str
    recomputed: float
    sequence_parallel: bool
    recomputing: int = 0
    first_layers: int = 0
    last_layers: int = 0

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def micro_batches(self) -> int:
        """Of one data-parallel rank in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.sequence

    def plans(self) -> Plans:
        """As arrays of one."""
        numbers = {one.name: [getattr(self, one.name)] for one in fields(self) if one.name != "recompute"}
        return Plans.of(**numbers, recompute=[Recompute[self.recompute.upper()]])

    def stage_layers(self, shape: ModelShape) -> tuple[int, ...]:
        """Of each pipeline stage, its virtual ones together."""
        stages = np.arange(self.pp, dtype=np.float64)
        return tuple(int(one) for one in np.broadcast_to(self.plans().stage_layers(shape, stages), stages.shape))

    def words(self) -> str:
        """As people say it: tp 8, pp 4, dp 4, ZeRO-1, full recomputation."""
        parts = [
            f"{name} {getattr(self, name)}{self._ends() if name == 'pp' else ''}"
            for name in ("tp", "pp", "cp", "ep", "dp")
            if getattr(self, name) > 1
        ]
        parts = parts or ["one GPU"]
        if self.vp > 1:
            parts.append(f"{self.vp} virtual stages")
        if self.zero and self.dp * self.cp > 1:
            whole = f"HSDP (ZeRO-3 in {self.replicas} replicas)" if self.replicas > 1 else "FSDP (ZeRO-3)"
            parts.append(whole if self.zero > 2 else f"ZeRO-{self.zero}")
        return ", ".join([*parts, self.recomputation()])

    def _ends(self) -> str:
        ends = [f"{layers} layer{'s' if layers > 1 else ''} {where}" for layers, where in ((self.first_layers, "first"), (self.last_layers, "last")) if layers]  # fmt: skip
        return f" ({', '.join(ends)})" if ends else ""

    def recomputation(self) -> str:
        """As people say it."""
        if self.recompute != "full":
            return f"{'no' if self.recompute == 'none' else self.recompute} recomputation"
        share = f" of {self.recomputed:.0%} of the layers" if self.recomputed < 1 else ""
        stages = f" in the first {self.recomputing} stages" if self.recomputing > 1 else " in the first stage"
        return f"full recomputation{share}{stages if self.recomputing else ''}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan, what its step takes (`seconds` by component of `StepTime`), and what its stages hold (bytes by component of `Memory`).

    `exposed_s` of the step is communication that nothing hides.
    """

    split: Split
    seconds: dict[str, float]
    exposed_s: float
    stages_bytes: tuple[dict[str, float], ...]
    usable_bytes: float

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def token_s(self) -> float:
        """For each token of the batch."""
        return self.step_s / self.split.tokens_per_step

    @property
    def tokens_per_s(self) -> float:
        return self.split.tokens_per_step / self.step_s

    @property
    def fullest(self) -> int:
        """The stage that needs most."""
        return max(range(len(self.stages_bytes)), key=lambda stage: sum(self.stages_bytes[stage].values()))

    @property
    def parts_bytes(self) -> dict[str, float]:
        """Of the fullest stage."""
        return self.stages_bytes[self.fullest]

    @property
    def total_bytes(self) -> float:
        return sum(self.parts_bytes.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes

    @property
    def binding(self) -> str:
        """What needs most, in words."""
        return PART_WORDS[max(self.parts_bytes, key=lambda part: self.parts_bytes[part])]


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The best of another kind; `loses` is the share by which it is slower for each token."""

    kind: str
    plan: Candidate
    loses: float


@dataclass(frozen=True, slots=True)
class Binding:
    """What keeps training from being faster. `kind`: memory, compute, bubble, communication, host, data, batch or rule; `loses`: what memory costs."""

    kind: str
    words: str
    loses: float = 0.0


@dataclass(frozen=True, slots=True)
class PlanFound:
    """Where nothing fits `best` is None and `nearest` the plan that needs least; where no split is possible both are, and `binding` names the rule."""

    gpus: int
    best: Candidate | None
    nearest: Candidate | None
    runners_up: tuple[RunnerUp, ...]
    binding: Binding
    looked_at: int = 0

    @property
    def idle_gpus(self) -> int:
        """That the best plan has no use for."""
        return self.gpus - self.best.split.gpus if self.best else 0


def split_of(plans: Plans, number: int) -> Split:
    """One of them."""
    one = plans.take(slice(number, number + 1))
    whole = {name: int(getattr(one, name)[0]) for name in _WHOLE}
    again = Recompute(int(one.recompute[0])).name.lower()
    return Split(
        **whole, recompute=again, recomputed=float(one.recomputed[0]), sequence_parallel=bool(one.sequence_parallel[0])
    )


def candidate(
    shape: ModelShape,
    machine: Machine,
    split: Split,
    how: Training,
    constants: Constants = FITTED,
    groups: Groups | None = None,
) -> Candidate:
    """The whole picture of one plan, over links in order or those of `groups`; `split` need not be a valid one."""
    plan = split.plans()
    took = step_time(shape, machine, plan, how, constants, groups)
    seconds = {one.name: float(np.ravel(getattr(took, one.name))[0]) for one in fields(StepTime)}
    held = memory_of_stage(shape, plan, how, np.arange(split.pp, dtype=np.float64))
    columns = {one.name: np.broadcast_to(getattr(held, one.name), (split.pp,)).tolist() for one in fields(Memory)}
    stages = tuple(dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True))
    return Candidate(split, seconds, float(np.ravel(took.exposed_s)[0]), stages, float(machine.usable_bytes))
