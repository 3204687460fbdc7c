"""What a node type really does, measured once (`whaleflux calibrate`), in the terms of the cost model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.layers import layer_times
from whaleflux.planning.machine import NVLS_FROM_GPUS, Fabric, Machine, reserved_bytes
from whaleflux.planning.memory import activation_bytes
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.training import Training

MAX_BYTES = 1 << 20  # of a file
VERSION = 1
_MOST_ROWS = 10_000
_LARGE = 1 << 26  # bytes: bandwidth counts, not latency
_ROWS = {"matmul": 4, "attention": 6, "copy": 2, "optimizer": 2, "layer": 8, "head": 6, "launch": 2, "collective": 4}
_SECONDS = {
    "matmul": {3},
    "attention": {4, 5},
    "copy": {1},
    "optimizer": {1},
    "layer": {5, 6},
    "head": {4},
    "launch": {1},
    "collective": {3},
}
_WORDS = ("layer", "head", "launch", "collective")  # kinds whose first column is a word
SOFTWARE = ("compiled", "eager", "autocast", "autocast compiled")
_CAST_BYTES = 12.0  # for each weight and micro-batch: read in 32 bit, written in 16, its gradient back
_ADAM_BYTES = 34.0  # `step`: of a weight in 32 bit, its gradient and two moments
_LOGIT_PASSES_BYTES = 20.0  # `layers.head_s`: five passes of 4 bytes


@dataclass(frozen=True, slots=True)
class Ladder:
    """Seconds of single operations on a node's GPUs; the columns of each kind are those of `whaleflux.sdk.ladder.Ladder`, which measures them.

    `memory_bytes` as the driver reports it, of which `context_bytes` are taken before a program allocates anything.
    """

    gpu: str
    gpus: int
    memory_bytes: float
    context_bytes: float
    matmul: tuple[tuple[float, ...], ...]
    attention: tuple[tuple[float, ...], ...]
    copy: tuple[tuple[float, ...], ...]
    optimizer: tuple[tuple[float, ...], ...]
    layer: tuple[tuple[Any, ...], ...]
    head: tuple[tuple[Any, ...], ...]
    launch: tuple[tuple[Any, ...], ...]
    collective: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Kernels:
    """How layers ran: passes of element-wise work, kept activations against the formula's, and the loss: passes and bytes of a logit."""

    traffic: float
    kept: float
    logits_traffic: float
    logits_bytes: float
    optimizer_traffic: float
    launch_s: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A machine as it was measured, the constants that go with it, and what each way to run layers is like (of SOFTWARE, those measured)."""

    machine: Machine
    constants: Constants
    kernels: Mapping[str, Kernels]

    def check(self, software: str) -> None:
        """Raises InvalidArgument where layers that run so were not measured, though others were."""
        if self.kernels and software not in self.kernels:
            raise InvalidArgument(
                FieldViolation(
                    "--software", f"{software!r} was not measured on {self.machine.name}; take one of: {', '.join(self.kernels)}, or calibrate again"
                )
            )  # fmt: skip

    def lacks(self, software: str = SOFTWARE[0]) -> str:
        """That layers which run so were not measured, so that fitted constants count for them, in words; "" where they were."""
        if software in self.kernels:
            return ""
        has = f"{', '.join(self.kernels)} alone" if self.kernels else "no layers"
        return f"the calibration of {self.machine.name} measured {has}: {software} layers count with fitted constants; measure them with whaleflux calibrate"

    def running(self, how: Training, software: str = SOFTWARE[0]) -> tuple[Training, Calibrated]:
        """The same training, and this machine, for layers that run so."""
        how, constants = self.of(how, software)
        return how, replace(self, constants=constants)

    def of(self, how: Training, software: str = SOFTWARE[0]) -> tuple[Training, Constants]:
        """The same training and the constants for layers that run so."""
        found = self.kernels.get(software)
        if found is None:
            return how, self.constants
        cast = _CAST_BYTES if software.startswith("autocast") else how.cast_bytes
        as_run = replace(
            how, fused="compiled" in software, kept=found.kept, logits_traffic=found.logits_traffic, logits_bytes=found.logits_bytes,
            optimizer_traffic=found.optimizer_traffic, cast_bytes=cast,
        )  # fmt: skip
        return as_run, replace(
            self.constants, eager_traffic=found.traffic, fused_traffic=found.traffic, launch_s=found.launch_s
        )  # fmt: skip


def calibrated(machine: Machine, ladder: Ladder, constants: Constants = FITTED) -> Calibrated:
    """Rates and what operations cost beyond them, from the ladder; what it did not measure stays as it was.

    Multiplications: t = operations / rate + tail, least squares of relative errors. Attention: the rate over long sequences, there and back.
    Element-wise traffic: what a whole layer takes beyond both. Linear layers in 8 bit keep their data sheet's ratio.
    """
    rate, tail_s = _line([(2 * m * n * k, taken) for m, n, k, taken in ladder.matmul])
    attention, short = _attention(ladder)
    copied = max(moved / taken for moved, taken in ladder.copy)
    faster = float(np.asarray(machine.flops)) / float(np.asarray(machine.attention_flops))
    measured = replace(
        machine,
        flops=rate * max(faster, 1.0) / constants.matmul_share,
        attention_flops=rate / constants.matmul_share,
        memory_bytes_per_s=copied,
        fabric=_fabric(machine.fabric, ladder),
        reserved_bytes=_reserved_bytes(machine, ladder),
    )
    share = attention / (rate / constants.matmul_share)
    found = replace(constants, matmul_tail_s=tail_s, attention_share=share, attention_short=short)
    kernels = {
        software: _kernels(measured, found, ladder, software)
        for software in SOFTWARE
        if any(row[0] == software for row in ladder.layer)
    }
    return Calibrated(measured, found, kernels)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(rate, seconds beyond it) of t = size / rate + beyond; each point's relative error counts alike."""
    size, taken = (np.array(part) for part in zip(*points, strict=True))
    slope, beyond = np.linalg.lstsq(np.stack([size / taken, 1 / taken], 1), np.ones(len(taken)), rcond=None)[0]
    if beyond < 0 or slope <= 0:
        return float(1 / np.mean(taken / size)), 0.0
    return float(1 / slope), float(beyond)


def _attention(ladder: Ladder) -> tuple[float, float]:
    """(operations of causal attention in a second over long sequences, tokens by which others are too short), forward and backward."""
    rows = np.array(ladder.attention)
    batch, heads, sequence, width, there, back = rows.T
    taken = there + back
    operations = (
        3.5 * 0.5 * 4 * batch * heads * sequence**2 * width
    )  # backward: 2.5 times forward's; half of the scores
    slope, more = np.linalg.lstsq(
        np.stack([operations / taken, operations / sequence / taken], 1), np.ones(len(taken)), rcond=None
    )[0]
    if slope <= 0 or more < 0:
        return float(operations.sum() / taken.sum()), 0.0
    return float(1 / slope), float(more / slope)


def _kernels(machine: Machine, constants: Constants, ladder: Ladder, software: str) -> Kernels:
    """What a layer takes beyond multiplications and attention, what it keeps; the loss likewise."""
    cast = software.startswith("autocast")
    traffic, kept = [], []
    for its, tokens, sequence, hidden, ffn, there, back, bytes_ in ladder.layer:
        if its != software:
            continue
        shape, plan = _layer(hidden, ffn), _plan(tokens, sequence)
        how = Training(cast_bytes=_CAST_BYTES if cast else 0)
        none, once = (_layer_s(shape, machine, plan, constants, how, passes) for passes in (0.0, 1.0))
        traffic.append((there + back - none) / (once - none))
        weights = 2 * shape.layer_weights if cast else 0.0  # their 16-bit copies
        kept.append((bytes_ - weights) / float(np.ravel(activation_bytes(shape, plan, Training())[0])[0]))
    logits = [row for row in ladder.head if row[0] == ("autocast" if cast else "eager")]
    passes = [_logit_passes(machine, constants, row, cast) for row in logits]
    # Autocast's 16-bit weights are no logits.
    held = [(peak - 2 * cast * hidden * words) / (tokens * words) for _, tokens, hidden, words, _, peak in logits]
    launched = [taken for its, taken in ladder.launch if its == ("autocast" if cast else "eager")]
    stepped = [
        taken * float(np.asarray(machine.memory_bytes_per_s)) / (_ADAM_BYTES * count)
        for count, taken in ladder.optimizer
    ]
    return Kernels(
        _mean(traffic, 0.2), _mean(kept, 0.0), _mean(passes, 0.0), _mean(held, 0.0) or 8.0, _mean(stepped, 0.0),
        _mean(launched, 0.0) or constants.launch_s,
    )  # fmt: skip


def _mean(found: Sequence[float], least: float) -> float:
    return float(np.clip(np.mean(found), least, 100.0)) if found else 0.0


def _layer(hidden: float, ffn: float) -> ModelShape:
    heads = max(1, int(hidden) // 128)
    return ModelShape("layer", 1, int(hidden), heads, heads, int(hidden) // heads, int(ffn), 1)


def _plan(tokens: float, sequence: float) -> Plans:
    return Plans.of(micro_batch=tokens / sequence, global_batch=tokens / sequence, sequence=sequence)


def _layer_s(
    shape: ModelShape, machine: Machine, plan: Plans, constants: Constants, how: Training, traffic: float
) -> float:
    times = layer_times(shape, machine, plan, how, replace(constants, eager_traffic=traffic, fused_traffic=traffic))
    return float(np.ravel(times.forward_s + times.backward_s)[0])


def _logit_passes(machine: Machine, constants: Constants, row: tuple[Any, ...], cast: bool) -> float:
    """Of `_LOGIT_PASSES_BYTES`, what the loss takes beyond its multiplications and the casts of its weights."""
    _, tokens, hidden, words, taken, _ = row
    rate = constants.matmul_share * float(np.asarray(machine.attention_flops))
    copied = float(np.asarray(machine.memory_bytes_per_s))
    casts = _CAST_BYTES * hidden * words / copied if cast else 0.0
    return float((taken - 6 * tokens * hidden * words / rate - casts) * copied / (_LOGIT_PASSES_BYTES * tokens * words))


def _reserved_bytes(machine: Machine, ladder: Ladder) -> float:
    """With the context as it was measured, where it was."""
    if not ladder.context_bytes:
        return float(np.asarray(machine.reserved_bytes))
    return reserved_bytes(float(np.asarray(machine.memory_bytes)), ladder.context_bytes)


def _fabric(fabric: Fabric, ladder: Ladder) -> Fabric:
    """An island as all of its GPUs' collectives were measured: bus bandwidths of large tensors.

    Of too few GPUs for NVLS the measured all-reduce is a ring's, and says nothing of the switches.
    """

    def bus(kind: str, factor: float) -> float:
        return max(
            (factor * size / taken for its, ranks, size, taken in ladder.collective if its == kind and ranks == most and size >= _LARGE),
            default=0.0,
        )  # fmt: skip

    most = max((row[1] for row in ladder.collective), default=0)
    if most < 2:
        return fabric
    ring = max(bus("all_gather", (most - 1) / most), bus("reduce_scatter", (most - 1) / most))
    reduced = bus("all_reduce", 2 * (most - 1) / most)
    switch = fabric.switch_bytes_per_s
    if most >= NVLS_FROM_GPUS and reduced:
        switch = reduced if reduced > 1.1 * ring else 0.0
    return replace(
        fabric,
        island_bytes_per_s=ring or fabric.island_bytes_per_s,
        switch_bytes_per_s=switch,
    )


def ladder_from_text(text: str) -> Ladder:
    """Of `whaleflux calibrate`. Raises InvalidArgument naming what is wrong with the file."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong("is no JSON; make one with: whaleflux calibrate --file FILE") from None
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise _wrong(f"is no ladder of version {VERSION}; make one with: whaleflux calibrate --file FILE")
    if said.get("simulated") is not False:
        raise _wrong("was measured on a CPU, which says nothing of GPUs; run whaleflux calibrate where GPUs are")
    rows = {kind: _rows(kind, said.get(kind), columns) for kind, columns in _ROWS.items()}
    if missing := [kind for kind in ("matmul", "attention", "copy") if not rows[kind]]:
        raise _wrong(f"has no rows in {', '.join(missing)}; measure again")
    return Ladder(
        gpu=str(said.get("gpu", ""))[:100],
        gpus=int(_number("gpus", said.get("gpus"), 1, 1024)),
        memory_bytes=_number("memory_bytes", said.get("memory_bytes"), 0, 1e15),
        context_bytes=_number("context_bytes", said.get("context_bytes"), 0, 1e15),
        **rows,
    )


def _rows(kind: str, said: object, columns: int) -> tuple[tuple[Any, ...], ...]:
    if said is None:
        return ()
    if not isinstance(said, list) or len(said) > _MOST_ROWS:
        raise _wrong(f"{kind} must be a list of at most {_MOST_ROWS} rows")
    return tuple(_row(kind, row, columns) for row in said)


def _row(kind: str, row: object, columns: int) -> tuple[Any, ...]:
    if not isinstance(row, list) or len(row) != columns:
        raise _wrong(f"{kind}: each row has {columns} columns")
    words = 1 if kind in _WORDS else 0
    zero = {("layer", 6), ("layer", 7), ("head", 5)}  # backward may be lost in noise; the CPU does not tell bytes
    seconds = _SECONDS[kind]  # all else are counts and bytes
    numbers = (
        _number(kind, one, 0 if (kind, place) in zero else 1e-12 if place in seconds else 1, 1e18)
        for place, one in enumerate(row[words:], words)
    )
    return (*(str(one) for one in row[:words]), *numbers)


def _number(name: str, said: object, least: float, most: float) -> float:
    if not isinstance(said, int | float) or not least <= said <= most or not math.isfinite(said):
        raise _wrong(f"{name} must be a number between {least:g} and {most:g}")
    return float(said)


def _wrong(what: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation("--calibration", f"the file {what}"))


def shown(found: Calibrated, sheet: Machine) -> Mapping[str, tuple[float, float]]:
    """What was measured, and what plans take without: by name, in units of people (TFLOP/s, GB/s, us)."""
    before, after = FITTED, found.constants

    def rate(machine: Machine, constants: Constants, share: float) -> float:
        return share * float(np.asarray(machine.attention_flops)) / 1e12

    return {
        "multiplications, TFLOP/s": (rate(found.machine, after, after.matmul_share), rate(sheet, before, before.matmul_share)),
        "attention, TFLOP/s": (rate(found.machine, after, after.attention_share), rate(sheet, before, before.attention_share)),
        "memory, GB/s": (float(np.asarray(found.machine.memory_bytes_per_s)) / 1e9, float(np.asarray(sheet.memory_bytes_per_s)) / 1e9),
        "each multiplication's tail, us": (1e6 * after.matmul_tail_s, 1e6 * before.matmul_tail_s),
        **{f"each kernel's launch, {name}, us": (1e6 * one.launch_s, 1e6 * before.launch_s) for name, one in found.kernels.items()},
        **{f"passes of element-wise work, {name}": (one.traffic, before.fused_traffic if "compiled" in name else before.eager_traffic) for name, one in found.kernels.items()},
        **{f"activations kept, {name}": (one.kept, 1.0 if "compiled" in name else 1.6) for name, one in found.kernels.items()},
        "ring in an island, GB/s": (float(np.asarray(found.machine.fabric.island_bytes_per_s)) / 1e9, float(np.asarray(sheet.fabric.island_bytes_per_s)) / 1e9),
    }  # fmt: skip
