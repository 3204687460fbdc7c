"""What this machine's GPUs really do, measured in less than a minute: the ladder that `whaleflux calibrate` runs.

Needs torch and nothing else of WhaleFlux. What the numbers mean for plans, `whaleflux.planning.calibration` knows.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

VERSION = 1
_TOKENS = 8192
LEAST_S = 0.06  # of a round, for the clock
HOT_S = 0.4  # layers run for so long that the GPU is as warm, and its clock as low, as in training
# Rows, columns, inner: what layers of models of 1 to 100 billion parameters multiply.
_MATMULS = tuple(
    (tokens, out, inner)
    for tokens in (4096, 16384)
    for out, inner in (
        (1024, 2048),
        (2048, 2048),
        (5632, 2048),
        (4096, 4096),
        (11008, 4096),
        (4096, 11008),
        (8192, 8192),
    )
)
_ATTENTION = ((4, 16, 2048), (2, 32, 4096), (1, 16, 16384))  # batch, heads, sequence
_LAYERS = ((2048, 5632), (4096, 11008))  # hidden, ffn
_HEADS = ((2048, 32_000), (4096, 128_256))  # hidden, vocabulary
# How layers run: as they are written or compiled, with weights in 16 bit, or in 32 that are cast (autocast).
_SOFTWARE = ("eager", "compiled", "autocast", "autocast compiled")
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")
_BYTES = tuple(1 << power for power in (16, 20, 22, 24, 26, 28, 30))


@dataclass(slots=True)
class Ladder:
    """Seconds of single operations. `simulated`: measured on the CPU, where there is no GPU: says nothing of any GPU.

    matmul (rows, columns, inner, s); attention (batch, heads, sequence, head_dim, forward_s, backward_s), causal; copy (bytes, s); optimizer (weights, s), fused AdamW in 32 bit;
    layer (software, tokens, sequence, hidden, ffn, forward_s, backward_s, kept_bytes); head, the output layer with its loss (software, tokens,
    hidden, vocabulary, s there and back, peak_bytes); launch, of one small kernel by the host (software, s); collective (kind, ranks, bytes of the
    whole tensor, s). 16-bit floats.
    """

    gpu: str
    gpus: int
    memory_bytes: int
    context_bytes: int
    torch: str
    simulated: bool
    measured_s: float = 0.0
    version: int = VERSION
    matmul: list[tuple[int, int, int, float]] = field(default_factory=list)
    attention: list[tuple[int, int, int, int, float, float]] = field(default_factory=list)
    copy: list[tuple[int, float]] = field(default_factory=list)
    optimizer: list[tuple[int, float]] = field(default_factory=list)
    layer: list[tuple[str, int, int, int, int, float, float, int]] = field(default_factory=list)
    head: list[tuple[str, int, int, int, float, int]] = field(default_factory=list)
    launch: list[tuple[str, float]] = field(default_factory=list)
    collective: list[tuple[str, int, int, float]] = field(default_factory=list)


def measure(*, compiled: bool = True, small: float = 1.0, say: Callable[[str], None] = lambda _: None) -> Ladder:
    """On the GPUs of this machine, on the CPU where it has none. `small` < 1 shrinks all sizes (tests)."""
    began = time.monotonic()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    ladder = _empty(gpu)
    for what, step in (
        ("multiplications", _matmuls), ("attention", _attentions), ("memory", _copies), ("launches", _launches), ("the optimizer", _optimizers),
        ("the output layer", _heads),
        ("layers", _layers),
    ):  # fmt: skip
        say(f"{time.monotonic() - began:4.0f} s: measuring {what}")
        step(ladder, device, small, compiled)
    if ladder.gpus > 1:
        say(f"{time.monotonic() - began:4.0f} s: measuring collectives of {ladder.gpus} GPUs")
        ladder.collective = collectives(ladder.gpus, "nccl", small)
    ladder.measured_s = time.monotonic() - began
    return ladder


def _empty(gpu: bool) -> Ladder:
    if not gpu:
        return Ladder("CPU", 1, 0, 0, torch.__version__, simulated=True)
    torch.zeros(1, device="cuda")
    free, whole = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    used = whole - free - torch.cuda.memory_reserved()
    return Ladder(name, torch.cuda.device_count(), whole, used, torch.__version__, simulated=False)


def _seconds(run: Callable[[], object], device: torch.device, least_s: float = 0.0) -> float:
    """Of one call: the median of three rounds, each long enough for the clock."""

    def of(count: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            run()
        _wait(device)
        return (time.perf_counter() - began) / count

    run()
    count = max(2, min(2000, int((least_s or LEAST_S) / max(of(2), 1e-7))))
    return sorted(of(count) for _ in range(3))[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _scaled(number: int, small: float) -> int:
    return max(64, int(number * small) // 64 * 64)


def _matmuls(ladder: Ladder, device: torch.device, small: float, _: bool) -> None:
    for rows, columns, inner in _MATMULS:
        m, n, k = (_scaled(one, small) for one in (rows, columns, inner))
        left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        right = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        ladder.matmul.append((m, n, k, _seconds(partial(functional.linear, left, right), device)))


def _attentions(ladder: Ladder, device: torch.device, small: float, _: bool) -> None:
    for batch, heads, sequence in _ATTENTION:
        tokens = _scaled(sequence, small)
        q, k, v = (
            torch.randn(batch, heads, tokens, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )

        def forward(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        forward_s, backward_s = _there_and_back(forward, (q, k, v), device)
        ladder.attention.append((batch, heads, tokens, 128, forward_s, backward_s))


def _there_and_back(
    forward: Callable[[], Any], learning: tuple[Any, ...], device: torch.device, least_s: float = 0.0
) -> tuple[float, float]:
    """Seconds forward, and backward alone."""
    gradient = torch.ones_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), learning, gradient)

    whole_s = _seconds(both, device, least_s)
    forward_s = _seconds(forward, device)
    return forward_s, max(whole_s - forward_s, 0.0)


def _copies(ladder: Ladder, device: torch.device, small: float, _: bool) -> None:
    for size in (1 << 28, 1 << 30):
        there = torch.empty(_scaled(size, small) // 2, device=device, dtype=torch.bfloat16).normal_()
        here = torch.empty_like(there)
        taken = _seconds(partial(here.copy_, there), device)
        ladder.copy.append((2 * there.nbytes, taken))  # read and written


def _launches(ladder: Ladder, device: torch.device, _: float, __: bool) -> None:
    """Of a layer so small that only the host's work counts, by kernel: modules and autograd are part of what a kernel costs."""
    for software in ("eager", "autocast"):
        layer = _Layer(128, 128, 1).to(device, _weights(software))
        x = torch.randn(1, 16, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        turn = _angles(16, 128, device)

        def run(layer: Any = layer, x: Any = x, turn: Any = turn, software: str = software) -> Any:
            with _cast(software, device):
                return layer(x, turn)

        ladder.launch.append((software, _seconds(run, device) / KERNELS_OF_LAYER))


def _optimizers(ladder: Ladder, device: torch.device, small: float, _: bool) -> None:
    weights = [nn.Parameter(torch.zeros(_scaled(1 << 25, small), device=device)) for _ in range(8)]
    for one in weights:
        one.grad = torch.zeros_like(one)
    optimizer = torch.optim.AdamW(weights, fused=True)
    ladder.optimizer.append((sum(one.numel() for one in weights), _seconds(optimizer.step, device)))


KERNELS_OF_LAYER = 40  # as the cost model counts them, eager and forward


class _Layer(nn.Module):  # type: ignore[misc]
    """A decoder's layer as most are today: RMSNorm, rotary attention, SwiGLU."""

    def __init__(self, hidden: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Any, turn: Any) -> Any:
        batch, tokens, hidden = x.shape
        y = self.before(x)
        q, k, v = (one(y).view(batch, tokens, self.heads, -1).transpose(1, 2) for one in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(_turned(q, *turn), _turned(k, *turn), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        y = self.between(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _turned(x: Any, cos: Any, sin: Any) -> Any:
    """Rotary positions."""
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def _angles(tokens: int, width: int, device: torch.device) -> tuple[Any, Any]:
    angle = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(width // 2) * 2 / width)
    return angle.cos().to(device, torch.bfloat16), angle.sin().to(device, torch.bfloat16)


def _cast(software: str, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if software.startswith("autocast") else nullcontext()


def _weights(software: str) -> torch.dtype:
    return torch.float32 if software.startswith("autocast") else torch.bfloat16


def _heads(ladder: Ladder, device: torch.device, small: float, _: bool) -> None:
    for hidden, vocabulary in _HEADS:
        for software in ("eager", "autocast") if hidden > 2048 else ("eager",):
            h, words, tokens = _scaled(hidden, small), _scaled(vocabulary, small), _scaled(4096, small)
            head = nn.Linear(h, words, bias=False).to(device, _weights(software))
            x = torch.randn(tokens, h, device=device, dtype=torch.bfloat16, requires_grad=True)
            right = torch.randint(words, (tokens,), device=device)

            def both(head: Any = head, x: Any = x, right: Any = right, software: str = software) -> None:
                with _cast(software, device):
                    loss = functional.cross_entropy(head(x).float(), right)
                torch.autograd.grad(loss, (x, head.weight))

            taken = _seconds(both, device)
            ladder.head.append((software, tokens, h, words, taken, _peak_bytes(both, device)))


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """What a call takes at most, beyond what was there. 0 on the CPU, which does not tell."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - int(before)


def _layers(ladder: Ladder, device: torch.device, small: float, compiled: bool) -> None:
    for hidden, ffn in _LAYERS:
        for software in _SOFTWARE:
            if "compiled" in software and (not compiled or (hidden, software) == (2048, "compiled")):
                continue
            h, f, sequence = _scaled(hidden, small), _scaled(ffn, small), _scaled(4096, small)
            batch = max(1, _TOKENS // 4096)
            layer = _Layer(h, f, max(1, h // 128)).to(device, _weights(software))
            turn = _angles(sequence, h // layer.heads, device)
            inner = torch.compile(layer, dynamic=False) if "compiled" in software else layer
            x = torch.randn(batch, sequence, h, device=device, dtype=torch.bfloat16, requires_grad=True)

            def run(inner: Any = inner, x: Any = x, turn: Any = turn, software: str = software) -> Any:
                with _cast(software, device):
                    return inner(x, turn)

            kept = _kept_bytes(run, device)
            forward_s, backward_s = _there_and_back(run, (x, *layer.parameters()), device, HOT_S)
            ladder.layer.append((software, batch * sequence, sequence, h, f, forward_s, backward_s, kept))


def _kept_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """What a layer holds from forward to backward, its output too."""
    if device.type != "cuda":
        return 0
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = run()
    torch.cuda.synchronize()
    after = int(torch.cuda.memory_allocated())
    del held
    return after - int(before)


def collectives(ranks: int, backend: str, small: float) -> list[tuple[str, int, int, float]]:
    """Among all GPUs of this machine, and among every power of two of them."""
    import torch.multiprocessing as processes

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    results = processes.get_context("spawn").SimpleQueue()
    processes.spawn(_collective_rank, (ranks, port, backend, small, results), ranks)
    found: list[tuple[str, int, int, float]] = results.get()
    return found


def _collective_rank(rank: int, ranks: int, port: int, backend: str, small: float, results: Any) -> None:
    cuda = backend == "nccl"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    device = torch.device("cuda" if cuda else "cpu")
    found = []
    for size in sorted({1 << power for power in range(1, ranks.bit_length())} | {ranks}):
        group = dist.new_group(range(size))
        if rank < size:
            found += _of_group(size, group, device, small)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _of_group(size: int, group: Any, device: torch.device, small: float) -> list[tuple[str, int, int, float]]:
    found = []
    for kind in COLLECTIVES:
        for asked in _BYTES:
            elements = _scaled(asked, small) // 2 // size * size
            taken = _collective_s(kind, elements, size, group, device)
            found.append((kind, size, 2 * elements, taken))
    return found


def _collective_s(kind: str, elements: int, size: int, group: Any, device: torch.device) -> float:
    """Each rank runs it as often as the others: how often depends on the size alone."""
    whole = torch.zeros(elements, device=device, dtype=torch.bfloat16)
    part = torch.zeros(elements // size, device=device, dtype=torch.bfloat16)

    def run() -> None:
        if kind == "all_reduce":
            dist.all_reduce(whole, group=group)
        elif kind == "all_gather":
            dist.all_gather_into_tensor(whole, part, group=group)
        else:
            dist.reduce_scatter_tensor(part, whole, group=group)

    for _ in range(3):
        run()
    count = 10 if elements > 1 << 24 else 30
    dist.barrier(group=group)
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    _wait(device)
    return (time.perf_counter() - began) / count


def main() -> int:
    """Prints the ladder as JSON: for machines that have torch and no WhaleFlux."""
    print(json.dumps(asdict(measure(say=lambda what: print(what, file=sys.stderr, flush=True)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
