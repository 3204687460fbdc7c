"""One plan in whole numbers, with what the formats want to know besides; and what they answer with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.arrays import Flags
from whaleflux.planning.found import Split, split_of
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.training import Training

_BF16 = (8, 0)  # the first compute capability with bf16, and with flash attention


@dataclass(frozen=True, slots=True)
class Facts:
    """What formats want to know besides the split. `node_gpus` are the GPUs of a node.

    `reduce_bytes` is per parameter (4: 32 bit), `fp8` as in `Training`; `capability` is the GPUs' compute capability.
    """

    shape: ModelShape
    node_gpus: int
    frozen: bool
    flash: bool
    fused: bool
    dropout: bool
    fp8: int
    overlap_tp: bool
    overlap_dp: bool
    reduce_bytes: int
    capability: tuple[int, int]


def facts_of(shape: ModelShape, how: Training, node_gpus: int = 8, capability: tuple[int, int] = _BF16) -> Facts:
    """What formats want to know of any plan of this model."""
    return Facts(**_facts(shape, how, node_gpus, capability))


def _facts(shape: ModelShape, how: Training, node_gpus: int, capability: tuple[int, int]) -> dict[str, Any]:
    flags = ("frozen", "flash", "fused", "dropout", "overlap_tp", "overlap_dp")
    return {
        "shape": shape, "node_gpus": node_gpus, "capability": capability,
        **{name: bool(np.ravel(np.asarray(getattr(how, name)))[0]) for name in flags},
        **{name: int(np.ravel(np.asarray(getattr(how, name)))[0]) for name in ("fp8", "reduce_bytes")},
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned(Facts):
    """A valid plan of one model."""

    split: Split

    @staticmethod
    def of(
        shape: ModelShape, plan: Plans, how: Training, node_gpus: int = 8, capability: tuple[int, int] = _BF16
    ) -> Planned:
        """Of plans that are one. Raises InvalidArgument where it breaks a rule of `Plans.faults`, which names it."""
        if len(plan) != 1:
            raise InvalidArgument(FieldViolation("plan", f"are {len(plan)} plans; a configuration is made of one"))
        one = plan.take(slice(0, 1))
        broken = [rule for rule, there in one.faults(shape).items() if bool(there[0])]
        if broken:
            raise InvalidArgument([FieldViolation("plan", f"cannot be run: {rule}") for rule in broken])
        return Planned(**_facts(shape, how, node_gpus, capability), split=split_of(one, 0))

    @property
    def layers_per_chunk(self) -> int:
        """Of one virtual stage of the stage that has most."""
        return max(self.stage_layers) // self.split.vp

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Of each pipeline stage, its virtual ones together."""
        return self.split.stage_layers(self.shape)

    @property
    def per_node(self) -> int:
        """Ranks on each node: as many as divide the job evenly and keep tensor parallelism inside, else as many as divide it."""
        even = [n for n in range(min(self.node_gpus, self.split.gpus), 0, -1) if self.split.gpus % n == 0]
        return next((n for n in even if n % self.split.tp == 0), even[0])

    @property
    def nodes(self) -> int:
        return self.split.gpus // self.per_node

    def uneven(self) -> tuple[str, ...]:
        """A note where nodes have more GPUs than ranks start on each; none where the job is on one node."""
        if self.nodes < 2 or self.per_node == self.node_gpus:
            return ()
        less = self.split.gpus // self.node_gpus * self.node_gpus
        near = " or ".join(f"--gpus {one}" for one in (less, less + self.node_gpus) if one)
        starts = f"{self.nodes} nodes start {self.per_node} each"
        planned = f"the time was planned on whole ones; plan with {near}"
        return (f"{self.split.gpus} GPUs are not whole nodes of {self.node_gpus}: {starts}, and {planned}",)

    def title(self) -> str:
        """What a file says of itself, in one line whatever the model is called."""
        name = "".join(char if char.isprintable() else " " for char in self.shape.name)
        return f"{name} on {self.split.gpus} GPU{'s' if self.split.gpus > 1 else ''}: {self.split.words()}; micro-batch {self.split.micro_batch}, batch {self.split.global_batch:,} x {self.split.sequence:,} tokens"


@dataclass(frozen=True, slots=True)
class Emitted:
    """A file: its usual name, its text, and what it cannot say of the plan or what the reader has to do besides."""

    file: str
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """What a format cannot express: whether it is so of a split, or of each of many, and what is wrong in words, with what to use."""

    wrong: Callable[[Facts, Split | Plans], Any]
    words: Callable[[Planned], str]


def cannot(planned: Planned, rules: Iterable[Rule]) -> list[str]:
    """What is wrong with one plan."""
    return [rule.words(planned) for rule in rules if bool(np.ravel(rule.wrong(planned, planned.split))[0])]


def expressible(facts: Facts, plans: Plans, rules: Iterable[Rule]) -> Flags:
    """Which of them break no rule."""
    found = np.ones(len(plans), dtype=np.bool_)
    for rule in rules:
        found &= ~np.asarray(rule.wrong(facts, plans), dtype=np.bool_)
    return found


def has_bf16(facts: Facts) -> bool:
    return facts.capability >= _BF16


# Of a format that says bf16.
BF16 = Rule(
    lambda facts, _: not has_bf16(facts),
    lambda planned: (
        f"its GPUs have compute capability {'.'.join(map(str, planned.capability))}, bf16 and flash attention begin at 8.0; "
        "use --emit torchrun with a script in fp16, or plan with another --gpu"
    ),
)
SHARED_REPLICAS = Rule(
    lambda _, split: split.dp % split.replicas > 0,
    lambda it: (
        f"{it.split.replicas} replicas that share context-parallel ranks; let replicas divide dp {it.split.dp}, or use --emit megatron"
    ),
)
FP8 = Rule(lambda facts, _: facts.fp8 > 0, lambda _: "linear layers in 8 bit; use --emit megatron or torchtitan")


def refuse(what: str, *wrong: str) -> None:
    """Raises InvalidArgument with all of `wrong`: parts of the plan that the format `what` cannot express, each with what to use."""
    if wrong:
        raise InvalidArgument([FieldViolation("--emit", f"{what} cannot express this plan: {one}") for one in wrong])
