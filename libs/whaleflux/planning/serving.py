"""What serving a model takes: how many GPUs of a type hold it, and how many requests at once they answer within an objective.

Two rooflines (Splitwise, Patel et al. 2024; DistServe, Zhong et al. 2024): a prompt is computed, a token is read. Weights pass through memory once
for each step of all requests together, keys and values of each request once; tensor parallelism adds two all-reduces a layer. Prompts are
computed between steps, so that each request is halted by those that come while it is answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whaleflux.fleet.gpu_types import GpuType
from whaleflux.planning.arrays import Array
from whaleflux.planning.collectives import all_reduce_s
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.layers import layer_times
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.training import Training

MOST_REQUESTS = 1024  # at once, on one replica
_MOST_TP = 64
# Of the data sheet's memory rate, what decoding kernels reach (H100, A100: 0.80-0.88 measured, flash-decoding and cuBLAS GEMV reports).
_MEMORY_SHARE = 0.82
_STEP_S = 1.5e-3  # of an engine's own work between two steps: scheduling, sampling (vLLM V1: 1-2 ms)
_KERNEL_S = 4e-6  # between two kernels of a captured graph
_KERNELS = 10  # of a layer
_WORKING_BYTES = 2e9  # activations and graphs of an engine
_KV_BYTES = 2.0  # of an element


@dataclass(frozen=True, slots=True)
class Requests:
    """What is asked: tokens of a prompt and of an answer, and the objective: seconds to the first token, and for each further one (0: none)."""

    prompt: int
    answer: int
    first_token_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Replica:
    """One way to serve: `tp` GPUs of a type. Rates are of one replica with `at_once` requests under way, all the time.

    `fits`: the weights and one request do; `meets`: within the objective. `kv_bytes_per_token` of one GPU; `held` requests fit at once.
    """

    gpu: str
    tp: int
    weights_bytes: float
    kv_bytes_per_token: float
    usable_bytes: float
    held: int
    at_once: int
    first_token_s: float
    token_s: float
    requests_per_s: float
    usd_per_million_tokens: float | None
    binding: str

    @property
    def fits(self) -> bool:
        return self.held >= 1

    @property
    def meets(self) -> bool:
        return self.at_once >= 1

    @property
    def answer_tokens_per_s(self) -> float:
        """Of one request."""
        return 1 / self.token_s if self.token_s else 0.0


def longest(shape: ModelShape) -> int:
    """Tokens of a prompt and its answer together that the model was made for."""
    return min(shape.sequence, shape.positions) if shape.positions else shape.sequence


def serve(
    shape: ModelShape,
    gpus: Sequence[GpuType],
    asked: Requests,
    weight_bytes: float = 2.0,
    constants: Constants = FITTED,
) -> list[Replica]:
    """Each type with each power of two of its GPUs that divides the heads, at most an island of them; what meets the objective first, the cheapest first.

    Where no price is known, the fewest GPUs. `weight_bytes` of a parameter: 2, or 1 in 8 bit. Raises InvalidArgument where a type's speed is not known.
    """
    found = []
    for gpu in gpus:
        machine = Machine.of(gpu, "fp8" if weight_bytes < 2 else "bf16")
        island = min(int(np.asarray(machine.fabric.island)), _MOST_TP)
        usd = gpu.list_price.usd_per_gpu_hour if gpu.list_price else None
        for tp in (one for one in _powers(island) if shape.heads % one == 0):
            found.append(replica(shape, machine, tp, asked, weight_bytes, usd, constants))
    return sorted(found, key=_rank)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def _rank(one: Replica) -> tuple[bool, bool, float, int]:
    return not one.meets, not one.fits, one.usd_per_million_tokens or np.inf, one.tp


def replica(
    shape: ModelShape,
    machine: Machine,
    tp: int,
    asked: Requests,
    weight_bytes: float,
    usd: float | None,
    constants: Constants = FITTED,
) -> Replica:
    """With as many requests at once as give the most tokens within the objective."""
    weights = shape.parameters * weight_bytes / tp
    per_token = kv_bytes(shape, tp)
    room = float(machine.usable_bytes) - weights - _WORKING_BYTES
    held = int(max(0.0, min(MOST_REQUESTS, room // (per_token * (asked.prompt + asked.answer)))))
    first_s = prefill_s(shape, machine, tp, asked.prompt, weight_bytes, constants)
    counts = np.arange(1, max(held, 1) + 1, dtype=np.float64)
    steps = decode_s(shape, machine, tp, counts, asked.prompt + asked.answer / 2, weight_bytes, constants)
    token_s = steps + counts * first_s / asked.answer  # halted by the prompts that come meanwhile
    waits = first_s + token_s / 2  # for the step under way
    within = (not asked.token_s or token_s <= asked.token_s) & (not asked.first_token_s or waits <= asked.first_token_s)
    within = np.broadcast_to(within, counts.shape) & (counts <= held)
    best = int(np.argmax(np.where(within, counts / token_s, -1.0)))
    at_once = int(counts[best]) if within[best] else 0
    rate = at_once / (asked.answer * float(token_s[best])) if at_once else 0.0
    dollars = usd * tp / 3600 / (rate * asked.answer) * 1e6 if usd and rate else None
    return Replica(
        machine.name, tp, weights, per_token, float(machine.usable_bytes), held, at_once, float(waits[best]), float(token_s[best]), rate, dollars,
        _binding(asked, held, at_once, room, float(token_s[0]), float(waits[0])),
    )  # fmt: skip


def _binding(asked: Requests, held: int, at_once: int, room: float, token_s: float, first_s: float) -> str:
    """What keeps it from more, in words."""
    if room < 0:
        return "the weights do not fit"
    if held < 1:
        return "no request fits beside the weights"
    if not at_once:
        first = asked.first_token_s and first_s > asked.first_token_s
        late, wanted = (first_s, asked.first_token_s) if first else (token_s, asked.token_s)
        return f"{'the first token comes' if first else 'a token takes'} {late * 1e3:.3g} ms alone, {wanted * 1e3:.3g} are wanted"
    return "memory for keys and values" if at_once == held else "the objective"


def kv_bytes(shape: ModelShape, tp: int) -> float:
    """Of one token on each GPU. What is compressed for all heads at once (MLA) is on every GPU; a head cannot be divided."""
    copies = 1 if shape.latent else min(tp, shape.kv_heads)
    return _KV_BYTES * shape.cached_width * shape.layers / copies


def prefill_s(
    shape: ModelShape, machine: Machine, tp: int, tokens: int, weight_bytes: float, constants: Constants = FITTED
) -> float:
    """Of one prompt: computed, at least read once."""
    plan = Plans.of(tp=tp, micro_batch=1, global_batch=1, sequence=tokens)
    layer = layer_times(shape, machine, plan, Training(), constants)
    reduced = 2 * all_reduce_s(2.0 * plan.tokens * shape.hidden, machine.fabric.links(plan.tp, np.ones(())), constants)
    read = shape.parameters * weight_bytes / tp / _memory(machine)
    return float(max(shape.layers * float(layer.forward_s), read) + shape.layers * float(reduced)) + _STEP_S


def decode_s(
    shape: ModelShape,
    machine: Machine,
    tp: int,
    requests: Array,
    context: float,
    weight_bytes: float,
    constants: Constants = FITTED,
) -> Array:
    """Of one token of each of so many requests with `context` tokens behind them."""
    dense = shape.parameters - shape.moe_layers * shape.expert_weights
    # Experts that some token of the step visits: all of them for many requests.
    visited = 1 - (1 - shape.top_k / shape.experts) ** requests if shape.experts else 0.0
    weights = weight_bytes * (dense + shape.moe_layers * shape.expert_weights * visited) / tp
    read = (weights + requests * context * kv_bytes(shape, tp)) / _memory(machine)
    computed = 2 * requests * shape.active_parameters / tp / (constants.matmul_share * np.asarray(machine.flops))
    reduced = (
        2
        * shape.layers
        * all_reduce_s(2.0 * requests * shape.hidden, machine.fabric.links(np.array(float(tp)), np.ones(())), constants)
    )
    return np.asarray(np.maximum(read, computed) + reduced + shape.layers * _KERNELS * _KERNEL_S + _STEP_S)


def _memory(machine: Machine) -> float:
    return _MEMORY_SHARE * float(np.asarray(machine.memory_bytes_per_s))
