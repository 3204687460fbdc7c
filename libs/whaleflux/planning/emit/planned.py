"""One plan in whole numbers, with what the formats want to know besides; and what they answer with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.training import Training

_WHOLE = ("tp", "pp", "dp", "cp", "ep", "vp", "micro_batch", "global_batch", "sequence", "zero", "replicas")
_BF16 = (8, 0)  # the first compute capability with bf16, and with flash attention


@dataclass(frozen=True, slots=True)
class Planned:
    """A valid plan of one model. Names as in `Plans`; batches in samples, `sequence` in tokens; `node_gpus` are the GPUs of a node.

    `reduce_bytes` is per parameter (4: 32 bit), `fp8` as in `Training`; `capability` is the GPUs' compute capability.
    """

    shape: ModelShape
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
    recompute: Recompute
    sequence_parallel: bool
    recomputed: float
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
        flags = {
            name: bool(np.ravel(np.asarray(getattr(how, name)))[0])
            for name in ("frozen", "flash", "fused", "dropout", "overlap_tp", "overlap_dp")
        }
        whole: dict[str, Any] = {name: int(getattr(one, name)[0]) for name in _WHOLE}
        return Planned(
            shape=shape,
            **whole,
            recompute=Recompute(int(one.recompute[0])),
            sequence_parallel=bool(one.sequence_parallel[0]),
            recomputed=float(one.recomputed[0]),
            node_gpus=node_gpus,
            capability=capability,
            fp8=int(np.ravel(np.asarray(how.fp8))[0]),
            reduce_bytes=int(np.ravel(np.asarray(how.reduce_bytes))[0]),
            **flags,
        )

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def micro_batches(self) -> int:
        """Of one data-parallel rank in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def layers_per_chunk(self) -> int:
        """Of one virtual stage."""
        return self.shape.layers // (self.pp * self.vp)

    @property
    def per_node(self) -> int:
        """Ranks on each node: as many as divide the job evenly and keep tensor parallelism inside, else as many as divide it."""
        even = [n for n in range(min(self.node_gpus, self.gpus), 0, -1) if self.gpus % n == 0]
        return next((n for n in even if n % self.tp == 0), even[0])

    @property
    def nodes(self) -> int:
        return self.gpus // self.per_node

    def uneven(self) -> tuple[str, ...]:
        """A note where nodes have more GPUs than ranks start on each; none where the job is on one node."""
        if self.nodes < 2 or self.per_node == self.node_gpus:
            return ()
        less = self.gpus // self.node_gpus * self.node_gpus
        near = " or ".join(f"--gpus {one}" for one in (less, less + self.node_gpus) if one)
        starts = f"{self.nodes} nodes start {self.per_node} each"
        planned = f"the time was planned on whole ones; plan with {near}"
        return (f"{self.gpus} GPUs are not whole nodes of {self.node_gpus}: {starts}, and {planned}",)

    def words(self) -> str:
        """As people say it, in one line: tp 8, pp 4, dp 4, ZeRO-1, full recomputation."""
        parts = [
            f"{name} {getattr(self, name)}" for name in ("tp", "pp", "vp", "cp", "ep", "dp") if getattr(self, name) > 1
        ]
        if self.zero:
            parts.append(f"ZeRO-{self.zero}" + (f" in {self.replicas} replicas" if self.replicas > 1 else ""))
        share = (
            f" of {self.recomputed:.0%} of the layers"
            if self.recompute == Recompute.FULL and self.recomputed < 1
            else ""
        )
        again = {Recompute.NONE: "no", Recompute.SELECTIVE: "selective", Recompute.FULL: "full"}[self.recompute]
        return ", ".join([*(parts or ["one GPU"]), f"{again} recomputation{share}"])

    def title(self) -> str:
        """What a file says of itself, in one line whatever the model is called."""
        name = "".join(char if char.isprintable() else " " for char in self.shape.name)
        return f"{name} on {self.gpus} GPU{'s' if self.gpus > 1 else ''}: {self.words()}; micro-batch {self.micro_batch}, batch {self.global_batch:,} x {self.sequence:,} tokens"


@dataclass(frozen=True, slots=True)
class Emitted:
    """A file: its usual name, its text, and what it cannot say of the plan or what the reader has to do besides."""

    file: str
    text: str
    notes: tuple[str, ...] = ()


def before_bf16(planned: Planned) -> list[str]:
    """What is wrong with a format that says bf16, on GPUs that have none."""
    if planned.capability >= _BF16:
        return []
    had = ".".join(map(str, planned.capability))
    return [
        f"its GPUs have compute capability {had}, bf16 and flash attention begin at 8.0; use --emit torchrun with a script in fp16, or plan with another --gpu"
    ]


def refuse(what: str, *wrong: str) -> None:
    """Raises InvalidArgument with all of `wrong`: parts of the plan that the format `what` cannot express, each with what to use."""
    if wrong:
        raise InvalidArgument([FieldViolation("--emit", f"{what} cannot express this plan: {one}") for one in wrong])
