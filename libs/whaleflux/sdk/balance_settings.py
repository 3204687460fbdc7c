"""What ranks tell one another before they share out samples, and whether it can be."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from whaleflux.fleet.gpu_types import CATALOGUE

VARIABLE, _MOST_TEXT = "BALANCE", 1 << 16
_COMMON = ("samples", "global_batch", "num_replicas", "drop_last", "micro_batch", "shuffle", "seed", "every_steps")


@dataclass(frozen=True, slots=True)
class Told:
    """Of one rank: its place among the replicas, how fast it is, how many samples it holds; and `common`, which must be the same on all."""

    replica: int
    speed: float | None
    largest: int | None
    common: tuple[Any, ...]

    @property
    def kind(self) -> list[float | None]:
        return [self.speed, self.largest]


def own_speed(model: nn.Module | None) -> float | None:
    """Operations per second of this rank's GPU in 16 bit, as the catalogue has them; None: no GPU, or one that it does not know."""
    known = CATALOGUE.types.get(own_type(model) or "")
    return known.speed.best_flops("bf16") if known and known.speed else None


@dataclass(frozen=True, slots=True)
class PlannedShares:
    """What a plan over several pools says (`whaleflux plan --gpu TYPE:GPUS,... --emit job`). `samples` of a step, by type of GPU."""

    global_batch: int | None = None
    micro_batch: int | None = None
    samples: Mapping[str, float] = field(default_factory=dict)


def planned_shares() -> PlannedShares:
    """Of the variable BALANCE. Raises ValueError where it is not as a plan writes it."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return PlannedShares()
    try:
        said = json.loads(text[:_MOST_TEXT])
        micro = said.get("micro_batch")
        samples = {str(name): float(count) for name, count in said["samples"].items()}
        found = PlannedShares(
            _whole("global_batch", said["global_batch"]),
            None if micro is None else _whole("micro_batch", micro),
            samples,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as wrong:
        raise ValueError(
            f"{VARIABLE} is not as a plan writes it ({str(wrong)[:80]}): make it with whaleflux plan MODEL --gpu TYPE:GPUS,... --emit job"
        ) from None
    if not all(math.isfinite(one) and one > 0 for one in samples.values()):
        raise ValueError(
            f"{VARIABLE} has samples that are no finite numbers above 0: make it with whaleflux plan MODEL --gpu TYPE:GPUS,... --emit job"
        )
    return found


def own_type(model: nn.Module | None) -> str | None:
    """The catalogue's name of this rank's GPU; None: no GPU."""
    parameter = next(model.parameters(), None) if model is not None else None
    if parameter is None or not parameter.is_cuda:
        return None
    about = torch.cuda.get_device_properties(parameter.device)
    return CATALOGUE.name_of(about.name, about.total_memory)


def first_speed(model: nn.Module | None, planned: PlannedShares, type_: str | None = None) -> float | None:
    """To begin with: the plan's samples of this rank's type of GPU (None where it names others), without a plan the catalogue's speed."""
    if not planned.samples:
        return own_speed(model)
    return planned.samples.get(type_ or own_type(model) or "")


def even_ones(speeds: Sequence[float | None]) -> list[float]:
    """What a sample takes each, in one unit: the same for all where one speed is not known."""
    known = [1.0 / speed for speed in speeds if speed]
    return known if len(known) == len(speeds) else [1.0] * len(speeds)


def settled(told: Sequence[Told]) -> list[Told]:
    """One for each replica, the slowest and smallest of its ranks. Raises ValueError, for the same on all ranks, where it cannot be."""
    for name, values in zip(_COMMON, zip(*(one.common for one in told), strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} differs between ranks ({values[0]} on rank 0): give Balance the same on all of them"
            )
    samples, batch, replicas, drop_last, micro_batch, *_, every_steps = told[0].common
    _whole("global_batch", batch), _whole("every_steps", every_steps), _whole("num_replicas", replicas)
    unit = 1 if micro_batch is None else _whole("micro_batch", micro_batch)
    if batch % unit or batch // unit < replicas:
        raise ValueError(
            f"global_batch={batch} must be a multiple of micro_batch={unit} and give each of {replicas} ranks one part; take a multiple of {unit} "
            f"from {unit * replicas} up"
        )
    if samples < (batch if drop_last else replicas):
        raise ValueError(
            f"the data set has {samples} samples, which make no step of {batch} for {replicas} ranks: take a smaller global_batch, or fewer ranks"
        )
    members = [_of_replica(replica, told) for replica in range(replicas)]
    room = [one.largest // unit if one.largest else batch for one in members]
    slack = 0 if drop_last else replicas - 1  # what the last step of an epoch may have more
    if min(room) < 1 or sum(min(one * unit, batch + slack) for one in room) < batch + slack:
        raise ValueError(
            f"largest_batch of all ranks holds {sum(room) * unit} samples, global_batch={batch} needs {batch + slack}, and each rank takes one part "
            "at least: take a smaller global_batch, or micro_batch"
        )
    return members


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 40:
        raise ValueError(f"{name}={value!r} must be a whole number from 1 to 2**40")
    return value


def _of_replica(replica: int, told: Sequence[Told]) -> Told:
    own = [one for one in told if one.replica == replica]
    if not own:
        raise ValueError(
            f"no rank is replica {replica} of {told[0].common[2]}: rank must be the place in the data-parallel dimension, from 0"
        )
    speeds = [one.speed for one in own]
    for speed in speeds:
        if speed is not None and not (math.isfinite(speed) and speed > 0):
            raise ValueError(
                f"speed={speed!r} of replica {replica} must be a finite number above 0, in samples per second or any unit of all ranks"
            )
    for one in own:
        if one.largest is not None:
            _whole("largest_batch", one.largest)
    slowest = None if None in speeds else min(speed for speed in speeds if speed is not None)
    return Told(replica, slowest, min((one.largest for one in own if one.largest), default=None), own[0].common)
