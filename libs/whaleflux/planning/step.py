"""How long one optimizer step of each plan takes, by component."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from whaleflux.planning.arrays import Array, array
from whaleflux.planning.collectives import all_reduce_s, all_to_all_s, gather_s, send_s
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.layers import LayerTimes, head_s, layer_times
from whaleflux.planning.machine import Fabric, Links, Machine
from whaleflux.planning.memory import layer_weights, stage_weights
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.training import Training

_SOFT = 4.0
_BY_COLUMNS = 0.6  # of a layer's multiplications are those of QKV, up and gate: 7 in 12 of GPT, 0.65 of Llama


@dataclass(frozen=True, slots=True)
class Groups:
    """The communicators of each plan: what tensor, context, expert, data (with context) parallel groups and neighbouring stages run over.

    `experts` is the group of copies of an expert, `shards` that of ZeRO's shards, `replicas` that of HSDP's copies.
    """

    tp: Links
    cp: Links
    ep: Links
    dp: Links
    pp: Links
    experts: Links
    shards: Links
    replicas: Links

    @staticmethod
    def in_order(fabric: Fabric, plans: Plans) -> Groups:
        """Where rank r lies on GPU r, tp first, then cp, dp, pp."""
        data = plans.dp * plans.cp
        return Groups(
            tp=fabric.links(plans.tp, np.ones(())),
            cp=fabric.links(plans.cp, plans.tp),
            ep=fabric.links(plans.ep, plans.tp),
            dp=fabric.links(data, plans.tp),
            pp=fabric.links(plans.pp, plans.tp * data),
            experts=fabric.links(np.maximum(data / plans.ep, 1.0), plans.tp * plans.ep),
            shards=fabric.links(plans.shards, plans.tp),
            replicas=fabric.links(plans.replicas, plans.tp * plans.shards),
        )


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by component, arrays of the plans' shape; they add up to `total_s`.

    `compute_s`: the slowest stage's own work on all micro-batches, without `recompute_s`. `host_s`: the GPU waits for its kernels to be launched.
    `tp_s` ... `dp_s`: communication that nothing hides; `dp_s` with ZeRO's gathers. `bubble_s`: stages that wait for others.
    """

    compute_s: Array
    recompute_s: Array
    host_s: Array
    tp_s: Array
    cp_s: Array
    ep_s: Array
    pp_s: Array
    dp_s: Array
    bubble_s: Array
    optimizer_s: Array
    data_s: Array
    checkpoint_s: Array

    @property
    def total_s(self) -> Array:
        return np.asarray(sum(getattr(self, one.name) for one in fields(self)), dtype=np.float64)

    @property
    def exposed_s(self) -> Array:
        """All communication that nothing hides."""
        return self.tp_s + self.cp_s + self.ep_s + self.pp_s + self.dp_s


@dataclass(frozen=True, slots=True)
class _PerLayer:
    """Exposed seconds of one layer and micro-batch, forward and backward together."""

    compute: Array
    recompute: Array
    host: Array
    tp: Array
    cp: Array
    ep: Array
    dp: Array

    @property
    def total(self) -> Array:
        return self.compute + self.recompute + self.host + self.tp + self.cp + self.ep + self.dp


def step_time(
    shape: ModelShape,
    machine: Machine,
    plans: Plans,
    how: Training,
    constants: Constants = FITTED,
    groups: Groups | None = None,
) -> StepTime:
    """Of each plan, on ranks that lie in order or over the links of `groups`. Plans are not checked (`Plans.faults`)."""
    links = groups or Groups.in_order(machine.fabric, plans)
    layer = layer_times(shape, machine, plans, how, constants)
    usual = again = _per_layer(shape, plans, how, constants, links, layer, full=False)
    if np.any(plans.recompute == Recompute.FULL):
        again = _per_layer(shape, plans, how, constants, links, layer, full=True)
    head = head_s(shape, machine, plans, how, constants)
    slowest = _slowest(shape, plans, usual.total, again.total, head)
    sends, waited_for = _sends_s(shape, plans, how, constants, links, beside_s=slowest.layers * usual.total)
    # Gradients of further micro-batches are added to the first one's. m micro-batches on the slowest stage, and its wait for the first one to come through the others and back (1 / v of it interleaved).
    count, layers = plans.micro_batches, slowest.layers
    bubble = (slowest.others_s + (plans.pp - 1) * sends) / plans.vp
    reduced, optimizer = _data_parallel_s(shape, machine, plans, how, constants, links, layer.backward_s)
    summed = (count - 1) * layers * _summed_s(shape, machine, plans, how)
    ends = count * _end_gathers_s(shape, plans, how, constants, links, head)

    def of(part: Callable[[_PerLayer], Array]) -> Array:
        return count * ((layers - slowest.again) * part(usual) + slowest.again * part(again))

    parts = {
        "compute_s": of(lambda one: one.compute) + count * slowest.head_s + summed,
        "recompute_s": of(lambda one: one.recompute),
        "host_s": of(lambda one: one.host),
        "tp_s": of(lambda one: one.tp),
        "cp_s": of(lambda one: one.cp),
        "ep_s": of(lambda one: one.ep),
        "pp_s": count * waited_for,
        "dp_s": of(lambda one: one.dp) + ends + reduced,
        "bubble_s": bubble,
        "optimizer_s": optimizer,
    }
    whole = np.broadcast_shapes(*(np.shape(part) for part in parts.values()))
    known = {name: np.broadcast_to(np.asarray(part, dtype=np.float64), whole) for name, part in parts.items()}
    busy = np.asarray(sum(known.values()))
    waited = _stalls(plans, how, busy)
    return StepTime(**known, data_s=waited[0], checkpoint_s=waited[1])


def stage_s(
    shape: ModelShape, machine: Machine, plans: Plans, how: Training, constants: Constants, stage: Array
) -> Array:
    """Seconds of one micro-batch in that stage, counted from 0, forward and backward, without the output layer and sends; ranks in order."""
    links, layer = Groups.in_order(machine.fabric, plans), layer_times(shape, machine, plans, how, constants)
    usual, again = (_per_layer(shape, plans, how, constants, links, layer, full).total for full in (False, True))
    computed = plans.again_layers(shape, stage)
    return np.asarray((plans.stage_layers(shape, stage) - computed) * usual + computed * again)


@dataclass(frozen=True, slots=True)
class _Slowest:
    """The stage that everybody waits for: its layers, how many of them are computed again, its seconds of the output layer; all other stages' seconds."""

    layers: Array
    again: Array
    head_s: Array
    others_s: Array


def _slowest(shape: ModelShape, plans: Plans, layer_s: Array, again_s: Array, head: Array) -> _Slowest:
    """`layer_s` of a micro-batch and layer, `again_s` of one that is computed again, `head` of the output layer."""
    stages, counts = _kinds_of_stages(plans)
    layers = [plans.stage_layers(shape, stage) for stage in stages]
    again = [plans.again_layers(shape, stage) for stage in stages]
    heads = [head if number == 0 else np.zeros(()) for number in range(len(stages))]
    busy = [
        (some - full) * layer_s + full * again_s + end for some, full, end in zip(layers, again, heads, strict=True)
    ]
    every = sum(count * took for count, took in zip(counts, busy, strict=True))
    longest, chosen = busy[0], [layers[0], again[0], heads[0]]
    for count, took, some, full, end in zip(counts[1:], busy[1:], layers[1:], again[1:], heads[1:], strict=True):
        longer = (count > 0) & (took > longest)
        longest = np.where(longer, took, longest)
        chosen = [np.where(longer, new, old) for new, old in zip((some, full, end), chosen, strict=True)]
    return _Slowest(chosen[0], chosen[1], chosen[2], np.asarray(every - longest))


def _kinds_of_stages(plans: Plans) -> tuple[list[Array], list[Array]]:
    """(a stage of each kind, how many there are of it): the last one, which comes first, and those before it as far as any differ."""
    last, before = plans.pp - 1, plans.pp - 1
    if not (np.any(plans.own_ends > 0) or np.any(plans.recomputing > 0)):
        return [last, np.zeros(())], [np.ones(()), before]
    between = np.maximum(before - 1, 0.0)
    computing = np.where(plans.recomputing > 0, np.clip(plans.recomputing - 1, 0, between), between)
    stages = [last, np.zeros(()), np.ones(()), 1 + computing]
    return stages, [np.ones(()), np.minimum(before, 1.0), computing, between - computing]


def _per_layer(
    shape: ModelShape, plans: Plans, how: Training, constants: Constants, links: Groups, layer: LayerTimes, full: bool
) -> _PerLayer:
    """`full`: of a layer that full recomputation is for; where a plan has none, as any other."""
    selective = plans.recompute == Recompute.SELECTIVE
    again = np.where(plans.recompute == Recompute.FULL, 1.0, 0.0) if full else np.zeros(())
    compute = layer.forward_s + layer.backward_s
    kept = how.either(how.flash, 0.0, 1.0)  # fused attention keeps no scores: nothing to compute again
    recompute = again * layer.forward_s + np.where(selective, kept * layer.core_s, 0.0)
    passes = 3.0 + again  # forward, backward (twice the kernels)
    busy, launching = compute + recompute, passes * layer.host_s
    host = (busy**_SOFT + launching**_SOFT) ** (1 / _SOFT) - busy
    return _PerLayer(
        compute=compute,
        recompute=recompute,
        host=host,
        tp=_tensor_parallel_s(shape, plans, how, constants, links.tp, again, layer),
        cp=_context_parallel_s(shape, plans, constants, links.cp, layer, again),
        ep=_expert_parallel_s(shape, plans, constants, links.ep, again),
        dp=_gathers_s(shape, plans, how, constants, links, compute + recompute, again),
    )


def _hidden(communication: Array, computation: Array, share: float) -> Array:
    """What is exposed of communication beside computation: all that is longer, and a part of the rest (they disturb one another)."""
    beside = np.minimum(communication, computation)
    return np.asarray(communication - share * beside, dtype=np.float64)


def _behind(communication: Array, computation: Array, pieces: Array) -> Array:
    """What is exposed of communication that follows computation layer by layer: the last layer's part, or all that is longer."""
    return np.asarray(np.maximum(communication - computation * (1 - 1 / pieces), communication / pieces))


def _state_bytes(shape: ModelShape, plans: Plans) -> Array:
    """A micro-batch's hidden state on one rank, 16 bit."""
    return np.asarray(2.0 * plans.tokens * shape.hidden)


def _tensor_parallel_s(
    shape: ModelShape, plans: Plans, how: Training, constants: Constants, links: Links, again: Array, layer: LayerTimes
) -> Array:
    """All-reduces of a micro-batch's state, two in each pass; with sequence parallelism each is a gather and a scatter.

    Those of backward's inputs run beside multiplications of the layers that are split by columns: all-reduces (scatters) beside the weights'
    gradients, and with sequence parallelism another gather, of the inputs that were not kept, beside the inputs'.
    """
    volume, split = _state_bytes(shape, plans), plans.sequence_parallel > 0
    reduced, scattered = all_reduce_s(volume, links, constants), gather_s(volume, links, constants)
    gathered = gather_s(volume * np.where(array(how.fp8) > 0, 0.5, 1.0), links, constants)  # as they are multiplied
    alone = np.where(split, (4 + 2 * again) * gathered + 2 * (1 + again) * scattered, 2 * (1 + again) * reduced)
    beside = np.where(split, 2 * (gathered + scattered), 2 * reduced)
    busy = np.where(split, 2, 1) * _BY_COLUMNS * layer.linear_s * how.either(how.frozen, 0.0, 1.0)
    hidden = _hidden(beside, busy, constants.overlap)
    return np.asarray(alone + how.either(how.overlap_gradients, hidden, beside))


def _context_parallel_s(
    shape: ModelShape, plans: Plans, constants: Constants, links: Links, layer: LayerTimes, again: Array
) -> Array:
    """Keys and values go round the ring from rank to rank, once forward and backward with their gradients, beside the attention on those that are there."""
    part = 2.0 * plans.tokens * shape.kv_width / plans.tp
    round_s = (plans.cp - 1) * send_s(part, links, constants)
    return np.where(plans.cp > 1, _hidden((3 + again) * round_s, (3.5 + again) * layer.core_s, constants.overlap), 0.0)


def _expert_parallel_s(shape: ModelShape, plans: Plans, constants: Constants, links: Links, again: Array) -> Array:
    """Tokens to their experts and back: two exchanges forward, two backward. A node gets a token once, however many of its experts are there."""
    if not shape.experts:
        return np.zeros(())
    volume = _state_bytes(shape, plans) * shape.top_k / np.where(plans.sequence_parallel > 0, plans.tp, 1.0)
    visited = links.nodes * (1 - (1 - 1 / links.nodes) ** shape.top_k)
    visited = np.minimum(visited, shape.route_nodes or np.inf)
    share = shape.moe_layers / shape.layers
    return np.asarray((4 + 2 * again) * share * all_to_all_s(volume, links, constants, visited / shape.top_k))


def _gathers_s(
    shape: ModelShape, plans: Plans, how: Training, constants: Constants, links: Groups, beside_s: Array, again: Array
) -> Array:
    """ZeRO-3: each layer's weights are gathered forward and backward, its gradients scattered, in each micro-batch."""
    layer, wire, trained = layer_weights(shape, plans), array(how.reduce_bytes), how.either(how.frozen, 0.0, 1.0)
    moved = 2 * gather_s(2.0 * layer.common, links.shards, constants)
    moved = moved + trained * gather_s(wire * layer.common, links.shards, constants)
    moved = moved + trained * all_reduce_s(wire * layer.common / plans.shards, links.replicas, constants)
    if shape.experts:
        moved = moved + (2 * gather_s(2.0 * layer.experts, links.experts, constants))
        moved = moved + trained * gather_s(wire * layer.experts, links.experts, constants)
    exposed = _hidden(moved, beside_s, constants.overlap_shards)
    return np.where((plans.zero > 2) & (plans.dp * plans.cp > 1), exposed, 0.0)


def _end_gathers_s(
    shape: ModelShape, plans: Plans, how: Training, constants: Constants, links: Groups, beside_s: Array
) -> Array:
    """ZeRO-3: embedding and output layer are gathered once for a micro-batch, since the one that goes last forward comes first backward."""
    whole = shape.embedding_weights + (0 if shape.tied else shape.head_weights)
    ends, trained = whole / plans.tp, how.either(how.frozen, 0.0, 1.0)
    moved = gather_s(2.0 * ends, links.shards, constants)
    moved = moved + trained * gather_s(array(how.reduce_bytes) * ends, links.shards, constants)
    exposed = _hidden(moved, beside_s, constants.overlap_shards)
    return np.where((plans.zero > 2) & (plans.dp * plans.cp > 1), exposed, 0.0)


def _sends_s(
    shape: ModelShape, plans: Plans, how: Training, constants: Constants, links: Groups, beside_s: Array
) -> tuple[Array, Array]:
    """Of one micro-batch between stages, to and fro; interleaved, for each of the virtual ones: (all, what its computation does not hide).

    Each tensor-parallel rank sends its part of the state; without sequence parallelism they are gathered there (Megatron's scatter-gather).
    Only interleaved stages have another micro-batch's pass to do while they send.
    """
    volume = _state_bytes(shape, plans)
    whole = np.where(plans.sequence_parallel > 0, 0.0, gather_s(volume, links.tp, constants))
    sends = np.where(plans.pp > 1, 2 * plans.vp * (send_s(volume / plans.tp, links.pp, constants) + whole), 0.0)
    beside = np.where(plans.vp > 1, how.either(how.overlap_pp, 1.0, 0.0), 0.0) * beside_s
    # A state forth and a gradient back cross at once: a stage waits once for each neighbour, and of two stages each has one.
    waits = np.where((plans.vp == 1) & (plans.pp == 2), sends / 2, sends)
    return np.asarray(sends), np.maximum(waits - beside, 0.0)


def _summed_s(shape: ModelShape, machine: Machine, plans: Plans, how: Training) -> Array:
    """To add a layer's gradients to those of the micro-batches before: read both, written once, where no multiplication does it; of shards their part."""
    apart = how.either(how.fused_gradients, 0.0, 3 * array(how.reduce_bytes))
    moved = np.maximum(array(how.cast_bytes), apart) * shape.layer_weights / plans.tp
    return np.asarray(moved / np.where(plans.zero > 2, plans.shards, 1.0) / machine.memory_bytes_per_s)


def _data_parallel_s(
    shape: ModelShape,
    machine: Machine,
    plans: Plans,
    how: Training,
    constants: Constants,
    links: Groups,
    layer_backward_s: Array,
) -> tuple[Array, Array]:
    """The reduction of gradients (and ZeRO-1 and 2's gather of weights) that the last backward pass does not hide; the optimizer. Of the stage with most weights."""
    stage = _heaviest(shape, plans)
    weights, backward_s = stage_weights(shape, plans, stage), plans.stage_layers(shape, stage) * layer_backward_s
    trained, wire = how.either(how.frozen, 0.0, 1.0), array(how.reduce_bytes)
    whole, scattered, gathered = np.zeros(()), np.zeros(()), np.zeros(())
    for some, among in ((weights.common, links.dp), *(((weights.experts, links.experts),) if shape.experts else ())):
        whole = whole + all_reduce_s(wire * some, among, constants)
        scattered = scattered + gather_s(wire * some, among, constants)
        gathered = gathered + gather_s(2.0 * some, among, constants)
    beside = how.either(how.overlap_dp, 1.0, 0.0) * backward_s
    pieces = plans.stage_layers(shape, stage)
    reduce, spread = np.where(plans.zero > 0, scattered, whole), np.where(plans.zero > 0, gathered, 0.0)
    # ZeRO-2 keeps no whole gradients to add to: it reduces those of every micro-batch, as FSDP does, which is what it is.
    rounds, fsdp, share = plans.micro_batches, plans.zero == 2, constants.overlap_shards
    summed = np.where(fsdp, rounds * _hidden(reduce, beside, share), _behind(reduce, beside, pieces))
    spread = np.where(
        fsdp, _hidden(spread, beside / 2, share), _behind(spread, beside / 2, pieces)
    )  # beside the next forward pass
    exposed = np.where(plans.zero > 2, 0.0, trained * (summed + spread))
    owned = weights.owned(plans, plans.zero > 0)
    # Adam reads gradient, master weight and two moments, writes the latter three and the 16-bit weight; the norm reads gradients once more.
    moved = owned * (array(how.gradient_bytes) * 2 + array(how.optimizer_bytes) * 2 + 2)
    passes = np.where(array(how.optimizer_traffic) > 0, how.optimizer_traffic, constants.fused_traffic)
    return exposed, np.asarray(trained * passes * moved / machine.memory_bytes_per_s)


def _heaviest(shape: ModelShape, plans: Plans) -> Array:
    """The stage that has most weights: where all have as many layers the first, since an embedding is never smaller than the output layer."""
    found = np.zeros(())
    if not np.any(plans.own_ends > 0):
        return found
    most = _all_weights(shape, plans, found)
    for stage in (np.minimum(1.0, plans.pp - 1), plans.pp - 1):
        these = _all_weights(shape, plans, stage)
        found, most = np.where(these > most, stage, found), np.maximum(these, most)
    return found


def _all_weights(shape: ModelShape, plans: Plans, stage: Array) -> Array:
    weights = stage_weights(shape, plans, stage)
    return weights.common + weights.experts


def _stalls(plans: Plans, how: Training, busy: Array) -> tuple[Array, Array]:
    """Waiting for data beyond the step itself, and a step's part of what checkpoints halt."""
    rate = array(how.data_tokens_per_s)
    needed = plans.tokens_per_step / plans.gpus / np.where(rate > 0, rate, np.inf)
    every = array(how.checkpoint_every_s)
    halted = array(how.checkpoint_s) / np.where(every > 0, every, np.inf)
    waiting = np.maximum(needed - busy, 0.0)
    return np.broadcast_to(waiting, busy.shape), np.broadcast_to(halted * (busy + waiting), busy.shape)
