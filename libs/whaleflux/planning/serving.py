"""What serving a model takes: how many GPUs of a type hold it, and how many requests at once they answer within an objective.

Two rooflines (Splitwise, Patel et al. 2024; DistServe, Zhong et al. 2024): a prompt is computed, a token is read. Weights pass through memory once
for each step of all requests together, keys and values of each request once; tensor parallelism adds two all-reduces a layer. Prompts are
computed between steps, so that each request is halted by those that come while it is answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from whaleflux.planning.arrays import Array
from whaleflux.planning.collectives import all_reduce_s
from whaleflux.planning.constants import FITTED, Constants
from whaleflux.planning.layers import layer_times
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.training import Training
from whaleflux.quantities import shown_bytes, shown_number

MOST_REQUESTS = 1024  # at once, on one replica
# Of the data sheet's memory rate, what decoding kernels reach (H100, A100: 0.80-0.88 measured, flash-decoding and cuBLAS GEMV reports).
_MEMORY_SHARE = 0.82
_STEP_S = 1.5e-3  # of an engine's own work between two steps: scheduling, sampling (vLLM V1: 1-2 ms)
_KERNEL_S = 4e-6  # between two kernels of a captured graph
_KERNELS = 10  # of a layer
_WORKING_BYTES = 2e9  # activations and graphs of an engine
_KV_BYTES = 2.0  # of an element
_PROMPT, _ANSWER = 2000, 500  # tokens, where nobody says


class Lack(Enum):
    """What keeps a replica from serving; those that come later hold only where none before them does."""

    NOTHING = "nothing"
    WEIGHTS = "weights"
    CONTEXT = "context"
    FIRST_TOKEN = "first_token"
    TOKEN = "token"
    RATE = "rate"


@dataclass(frozen=True, slots=True)
class Requests:
    """What is asked: tokens of a prompt and of an answer, and the objective: seconds to the first token, and for each further one (0: none).

    `context`: tokens of the longest request, prompt and answer (0: as usual ones). `per_s`: requests a second of one replica (0: as many as it can).
    """

    prompt: int
    answer: int
    first_token_s: float = 0.0
    token_s: float = 0.0
    context: int = 0
    per_s: float = 0.0

    @property
    def longest(self) -> int:
        """Tokens that have to fit beside the weights."""
        return max(self.context, self.prompt + self.answer)


@dataclass(frozen=True, slots=True)
class Replica:
    """One way to serve: `tp` GPUs of a type. Rates are of one replica with `at_once` requests under way, all the time.

    `weights_bytes`, `kv_bytes_per_token`, `usable_bytes` of one GPU; `context`: tokens of the longest request that fits beside the weights, at most
    what the model was made for; `held`: requests that fit at once. Dollars are at the rate that is asked for, else at its best. `binding`: what keeps
    it from serving, or from more, in words.
    """

    gpu: str
    tp: int
    weights_bytes: float
    kv_bytes_per_token: float
    usable_bytes: float
    context: int
    held: int
    at_once: int
    first_token_s: float
    token_s: float
    requests_per_s: float
    usd_per_million_tokens: float | None
    lack: Lack
    binding: str

    @property
    def fits(self) -> bool:
        return self.held >= 1

    @property
    def meets(self) -> bool:
        return self.lack is Lack.NOTHING

    @property
    def answer_tokens_per_s(self) -> float:
        """Of one request."""
        return 1 / self.token_s if self.token_s else 0.0


def longest(shape: ModelShape) -> int:
    """Tokens of a prompt and its answer together that the model was made for."""
    return min(shape.sequence, shape.positions) if shape.positions else shape.sequence


def usual(shape: ModelShape, prompt: int, answer: int, context: int = 0) -> tuple[int, int]:
    """(tokens of a prompt, of an answer): those that are said; 2000 and 500 where they are 0, or less where `context` or the model's own is short."""
    most = min(context or longest(shape), longest(shape))
    answered = answer or max(1, min(_ANSWER, most // 5, most - prompt))
    return prompt or max(1, min(_PROMPT, most - answered)), answered


def replica(
    shape: ModelShape,
    machine: Machine,
    tp: int,
    asked: Requests,
    weight_bytes: float,
    usd: float | None,
    constants: Constants = FITTED,
) -> Replica:
    """With as many requests at once as give the most tokens within the objective. `usd` of one GPU for an hour."""
    weights = shape.parameters * weight_bytes / tp
    per_token = kv_bytes(shape, tp)
    room = float(machine.usable_bytes) - weights - _WORKING_BYTES
    tokens = int(max(0.0, room // per_token))
    held = min(MOST_REQUESTS, tokens // (asked.prompt + asked.answer)) if tokens >= asked.longest else 0
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
    lack = _lack(asked, room, held, at_once, rate, float(waits[0]))
    paid = asked.per_s or rate
    return Replica(
        machine.name, tp, weights, per_token, float(machine.usable_bytes), min(tokens, longest(shape)), held, at_once, float(waits[best]),
        float(token_s[best]), rate, usd * tp / 3600 / (paid * asked.answer) * 1e6 if usd and lack is Lack.NOTHING else None, lack,
        _binding(lack, asked, room, tokens, per_token, float(token_s[0]), float(waits[0]), rate)
        or ("memory for keys and values" if at_once == held else "the objective"),
    )  # fmt: skip


def _lack(asked: Requests, room: float, held: int, at_once: int, rate: float, first_s: float) -> Lack:
    if room < 0:
        return Lack.WEIGHTS
    if held < 1:
        return Lack.CONTEXT
    if not at_once:
        return Lack.FIRST_TOKEN if asked.first_token_s and first_s > asked.first_token_s else Lack.TOKEN
    return Lack.RATE if rate < asked.per_s else Lack.NOTHING


def _binding(
    lack: Lack, asked: Requests, room: float, tokens: int, per_token: float, token_s: float, first_s: float, rate: float
) -> str:
    """What keeps it from serving, with the numbers; "" where nothing does."""
    missing = shown_bytes(asked.longest * per_token - room)
    words = {
        Lack.WEIGHTS: f"the weights do not fit: {shown_bytes(-room)} too much for each GPU",
        Lack.CONTEXT: f"no request of {asked.longest:,} tokens fits beside the weights: {missing} too much for each GPU, {tokens:,} tokens fit",
        Lack.FIRST_TOKEN: f"the first token comes after {shown_number(first_s * 1e3)} ms alone, {shown_number(asked.first_token_s * 1e3)} ms are wanted",
        Lack.TOKEN: f"a token takes {shown_number(token_s * 1e3)} ms alone, {shown_number(asked.token_s * 1e3)} ms are wanted",
        Lack.RATE: f"answers {shown_number(rate)} requests/s, {shown_number(asked.per_s)} are wanted",
    }
    return words.get(lack, "")


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
