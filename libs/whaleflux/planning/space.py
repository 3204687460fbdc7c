"""Which splits are looked at: every valid one of so many GPUs, within the bounds named here, as arrays.

Tensor parallelism stays within an island (beyond one, it divides it), pipelines divide the layers or have layers of their own at both ends
(`uneven`), context parallelism and micro-batches are
powers of two, at least 1,024 tokens of a sequence and at most 262,144 tokens of a micro-batch are on a rank, a stage is cut into at most 16
virtual ones, HSDP's replicas are a power of two. Data parallelism is every divisor of a batch that is exact; where the batch may differ a
little, the 64 largest numbers that there are GPUs for and the largest multiple of each power of two; the batch is then the nearest that these divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.arrays import Flags
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute

MOST_GPUS = 131_072
LEAST_TOKENS, MOST_TOKENS = 1024, 1 << 18  # of a sequence, and of a micro-batch, on a rank
MOST_VIRTUAL = 16
MOST_FRAMES = 1_000_000  # known models have up to 400,000, on as many GPUs as may be asked for
_CELLS = 2048  # of which frames are made at once
_LARGEST = 64
_ROUNDING = 1e-9
_MORE = 2  # numbers of layers between the ends of an uneven pipeline: the least that there can be, and so on


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody wants to train, and which parts of the split are settled. 0 leaves a part open (-1 of `zero`).

    `gpus` are there; a plan may leave some of them idle. `batch` in samples of a step, from which a plan's may differ by the share `batch_slack`;
    0: one micro-batch, with a pipeline four for each stage. `recompute` FULL is of all layers; None: of as few as make the plan fit.
    A plan uses at least `least_gpus`, and a multiple of `gpus_step`.
    """

    gpus: int
    sequence: int
    micro_batch: int = 0
    tp: int = 0
    pp: int = 0
    cp: int = 0
    ep: int = 0
    zero: int = -1
    recompute: Recompute | None = None
    vp: int = 0
    batch: int = 0
    batch_slack: float = 0.0
    least_gpus: int = 1
    gpus_step: int = 1


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def stages_of(shape: ModelShape, asked: Asked, *, uneven: bool) -> list[int]:
    """Numbers of pipeline stages: what divides the layers; of uneven ones also once and three times a power of two."""
    if asked.zero > 1:
        return [asked.pp or 1] if not uneven else []
    round_ = {factor << step for factor in (1, 3) for step in range(shape.layers.bit_length())} if uneven else set()
    found = [asked.pp] if asked.pp else sorted({*divisors(shape.layers), *round_})
    return [
        one
        for one in found
        if one <= (min(asked.gpus, shape.layers) if uneven or not asked.pp else one) and (one > 1 or not uneven)
    ]


def cells(shape: ModelShape, island: int, asked: Asked, *, uneven: bool = False) -> Plans:
    """Each tp, pp, cp and dp once; the rest of the split is not chosen yet."""
    gpus, sequence = asked.gpus, asked.sequence
    heads = [one for one in divisors(shape.heads) if one <= min(island, gpus) and (gpus <= island or island % one == 0)]
    whole = [one for one in _powers(gpus) if sequence % (2 * one) == 0 and sequence // one >= LEAST_TOKENS]
    axes = (
        [asked.tp] if asked.tp else heads,
        stages_of(shape, asked, uneven=uneven),
        [asked.cp] if asked.cp else whole or [1],
    )
    tp, pp, cp = (one.ravel() for one in np.meshgrid(*(np.array(one, dtype=np.intp) for one in axes), indexing="ij"))
    copies = gpus // (tp * pp * cp)
    number, dp = _data_parallel(copies, asked)
    found = Plans.of(
        tp=tp[number], pp=pp[number], cp=cp[number], dp=dp, micro_batch=1, global_batch=1, sequence=sequence
    )
    return found.take((found.gpus >= asked.least_gpus) & (found.gpus % asked.gpus_step == 0))


def _powers(most: int) -> list[int]:
    return [1 << step for step in range(most.bit_length()) if 1 << step <= most]


def _data_parallel(copies: NDArray[np.intp], asked: Asked) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(number of the cell, dp), where there are GPUs for so many `copies` of a model: none for 0."""
    if not asked.batch:
        offered = copies[:, None]
    elif not asked.batch_slack:
        offered = np.where(copies[:, None] > 0, np.array(divisors(asked.batch))[None, :], 0)
    else:
        most = np.minimum(copies, int(asked.batch * (1 + asked.batch_slack) + _ROUNDING))[:, None]
        round_ = 2 ** np.arange(1, asked.gpus.bit_length())
        offered = np.concatenate([most - np.arange(_LARGEST), most // round_ * round_], axis=1)
    possible = (offered >= 1) & (offered <= copies[:, None])
    numbers = np.nonzero(possible)[0]
    both = np.unique(numbers * (MOST_GPUS + 1) + offered[possible])
    return both // (MOST_GPUS + 1), both % (MOST_GPUS + 1)


def frames(shape: ModelShape, asked: Asked, some: Plans, *, uneven: bool = False) -> Plans:
    """Every way to run these cells: micro-batch, virtual stages, expert and sequence parallelism. All are valid (`Plans.faults`).

    Of uneven pipelines those of which no other has less to do in the last stage (`with_other_ends` has the others).
    """
    some = _each(some, "micro_batch", [asked.micro_batch] if asked.micro_batch else _powers(MOST_TOKENS))
    if not asked.micro_batch:
        some = some.take((some.micro_batch == 1) | (some.tokens <= MOST_TOKENS))
    virtual = [one for one in divisors(shape.layers) if one <= MOST_VIRTUAL]
    some = _each(some, "vp", [asked.vp] if asked.vp else virtual)
    if uneven:
        some = _with_ends(shape, some)
    some = some.take((some.vp == 1) | ((some.pp > 1) & (uneven | (shape.layers % (some.pp * some.vp) == 0))))
    some, near = _batches(some, asked)
    some = some.take(near)
    some = _each(some, "ep", [asked.ep]) if asked.ep else _expert_parallel(shape, some)
    some = _each(some, "sequence_parallel", [0, 1])
    return some.take(some.valid(shape)) if len(some) else some


def _with_ends(shape: ModelShape, some: Plans) -> Plans:
    """Each with as few layers between its ends as can be, or with one more of each chunk; then the last stage has as few as can be.

    No stage has more layers than those between.
    """
    some = some.take((shape.layers % some.vp == 0) & (shape.layers >= some.pp * some.vp))
    chunks, found = shape.layers / some.vp, []
    for more in range(_MORE):
        between = np.ceil(chunks / some.pp) + more
        ends = chunks - between * (some.pp - 2)
        last = np.maximum(ends - between, 1)
        uneven = replace(some, first_layers=(ends - last) * some.vp, last_layers=last * some.vp)
        found.append(uneven.take((ends >= 2) & (ends < 2 * between)))
    return joined(found)


def with_other_ends(some: Plans) -> Plans:
    """These uneven plans, and each with the layers of its first and last stage exchanged, and with about as many in both."""
    ends = some.first_layers + some.last_layers
    half = np.ceil(ends / some.vp / 2) * some.vp
    swapped = replace(some, first_layers=some.last_layers, last_layers=some.first_layers)
    halves = replace(some, first_layers=half, last_layers=ends - half)
    apart = some.first_layers - some.last_layers
    return joined([some, swapped.take(apart > 0), halves.take(apart > some.vp)])


def joined(parts: list[Plans]) -> Plans:
    """All of them, one after another."""
    whole = [part.take(slice(None)) for part in parts]
    return Plans(*(np.concatenate([getattr(part, one.name) for part in whole]) for one in fields(Plans)))


def frames_in_turn(shape: ModelShape, asked: Asked, some: Plans, *, uneven: bool = False) -> Iterator[Plans]:
    """The same, of a few cells at a time, none of them empty. Raises InvalidArgument where there are more than `MOST_FRAMES`."""
    count = 0
    for start in range(0, len(some), _CELLS):
        found = frames(shape, asked, some.take(slice(start, start + _CELLS)), uneven=uneven)
        count += len(found)
        if count > MOST_FRAMES:
            raise InvalidArgument(
                FieldViolation(
                    "model",
                    f"can be split in more than {MOST_FRAMES:,} ways: {shape.layers:,} layers, {shape.experts:,} experts and a batch of {asked.batch:,} "
                    "have many divisors; settle pp, ep or micro_batch, or take a batch that is a power of two",
                )
            )
        if len(found):
            yield found


def _expert_parallel(shape: ModelShape, some: Plans) -> Plans:
    """Each plan with every number of ranks that divides the experts and its dp x cp."""
    ranks = some.dp * some.cp
    degrees = [one for one in divisors(shape.experts) if one <= np.max(ranks, initial=1)] if shape.experts else [1]
    numbers = [np.flatnonzero(ranks % one == 0) for one in degrees]
    repeated = some.take(np.concatenate(numbers))
    return replace(repeated, ep=np.repeat(np.array(degrees, dtype=np.float64), [one.size for one in numbers]))


def _batches(some: Plans, asked: Asked) -> tuple[Plans, Flags]:
    """With the batch of each, and whether it is near enough to what was asked for."""
    unit = some.dp * some.micro_batch * np.where(some.vp > 1, some.pp, 1)
    if not asked.batch:
        return replace(some, global_batch=some.dp * some.micro_batch * np.where(some.pp > 1, 4 * some.pp, 1)), unit > 0
    batch = (
        np.maximum(np.round(asked.batch / unit), 1) * unit if asked.batch_slack else np.full(unit.shape, asked.batch)
    )
    near = (np.abs(batch / asked.batch - 1) <= asked.batch_slack + _ROUNDING) & (batch % unit == 0)
    return replace(some, global_batch=batch.astype(np.float64)), near


def _each(some: Plans, name: str, values: list[int]) -> Plans:
    """Each plan with each of these values."""
    count = len(some)
    repeated = some.take(np.repeat(np.arange(count), len(values)))
    return replace(repeated, **{name: np.tile(np.array(values, dtype=np.float64), count)})


def variants(asked: Asked, some: Plans) -> Plans:
    """Each of these plans under every stage of ZeRO, and FSDP with every number of replicas."""
    stages = [asked.zero] if asked.zero >= 0 else [0, 1, 2, 3]
    ways = [(zero, 1) for zero in stages]
    if 3 in stages:
        ways += [(3, copies) for copies in _powers(int(np.max(some.dp * some.cp, initial=1)))[1:]]
    count = len(some)
    repeated = some.take(np.repeat(np.arange(count), len(ways)))
    zero, replicas = (np.tile(np.array(one, dtype=np.float64), count) for one in zip(*ways, strict=True))
    ranks = repeated.dp * repeated.cp
    possible = ((zero < 2) | (repeated.pp == 1)) & ((replicas == 1) | ((replicas < ranks) & (ranks % replicas == 0)))
    if asked.zero < 0:
        possible &= (ranks > 1) | (zero == 0)  # nothing to spread over
    return replace(repeated, zero=zero, replicas=replicas).take(possible)
