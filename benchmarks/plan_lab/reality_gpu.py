"""Trains what `plan_reality` asks for on this machine's GPU and says what it took: needs torch only.

    python3 benchmarks/plan_lab/reality_gpu.py CASES.json MEASURED.json

A decoder of RMSNorm, rotary attention with grouped heads and SwiGLU, fused AdamW, 16-bit multiplications (autocast, or FSDP2's mixed precision).
Each case: steps that warm up, then five that are timed; `borderline` ones run two steps, and either fit or do not.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
)  # as `plan --emit torchrun` says: else a tenth lies between blocks

import multiprocessing as processes

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_TIMED, _WARM, _MOST_S = 5, 3, 90


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        hidden, ffn, self.heads, self.kv_heads = (case[name] for name in ("hidden", "ffn", "heads", "kv_heads"))
        self.again = bool(case["recompute"])
        self.width = hidden // self.heads
        self.before, self.between = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.kv = nn.Linear(hidden, 2 * self.kv_heads * self.width, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Any, turn: Any) -> Any:
        if self.again and self.training:
            return checkpoint(self.once, x, turn, use_reentrant=False)
        return self.once(x, turn)

    def once(self, x: Any, turn: Any) -> Any:
        batch, tokens, hidden = x.shape
        y = self.before(x)
        q = self.q(y).view(batch, tokens, self.heads, self.width).transpose(1, 2)
        k, v = self.kv(y).view(batch, tokens, 2, self.kv_heads, self.width).permute(2, 0, 3, 1, 4)
        grouped = self.heads != self.kv_heads
        attended = functional.scaled_dot_product_attention(
            _turned(q, *turn), _turned(k, *turn), v, is_causal=True, enable_gqa=grouped
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        y = self.between(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _turned(x: Any, cos: Any, sin: Any) -> Any:
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


class Model(nn.Module):  # type: ignore[misc]
    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(case["vocab"], case["hidden"])
        self.layers = nn.ModuleList(Layer(case) for _ in range(case["layers"]))
        self.last = nn.RMSNorm(case["hidden"])
        self.head = nn.Linear(case["hidden"], case["vocab"], bias=False)
        half = case["hidden"] // case["heads"] // 2
        angle = torch.arange(case["sequence"])[:, None] / 10000 ** (torch.arange(half) / half)
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)

    def forward(self, tokens: Any) -> Any:
        x = self.embedding(tokens).bfloat16()
        for layer in self.layers:
            x = layer(x, (self.cos, self.sin))
        loss = functional.cross_entropy(self.head(self.last(x)).float().flatten(0, 1), tokens.flatten())
        return loss


def _wrapped(model: Model, case: dict[str, Any]) -> Any:
    if case["compiled"]:
        for layer in model.layers:
            layer.once = torch.compile(layer.once)
    if case["wrapper"] == "ddp":
        return nn.parallel.DistributedDataParallel(model, device_ids=[0], gradient_as_bucket_view=True)
    if case["wrapper"] == "fsdp2":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model.embedding, mp_policy=policy)
        fully_shard([model.last, model.head], mp_policy=policy)
        return fully_shard(model, mp_policy=policy)
    return model


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """Adds step_s, allocated_bytes, reserved_bytes; or fits: false."""
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = Model(case)
    parameters = sum(one.numel() for one in model.parameters())
    wrapped = _wrapped(model, case)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(case["vocab"], (case["micro_batch"], case["sequence"]), device="cuda")

    def step() -> None:
        for number in range(case["accumulate"]):
            with _quiet(wrapped, case, number):
                with nullcontext() if case["wrapper"] == "fsdp2" else torch.autocast("cuda", torch.bfloat16):
                    loss = wrapped(tokens)
                (loss / case["accumulate"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    warm, timed = (2, 0) if case.get("borderline") else (_WARM, _TIMED)
    for _ in range(warm):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(timed):
        step()
    torch.cuda.synchronize()
    return {
        "fits": True,
        "parameters": parameters,
        "step_s": (time.perf_counter() - began) / timed if timed else None,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def _quiet(wrapped: Any, case: dict[str, Any], number: int) -> AbstractContextManager[Any]:
    """Gradients are reduced with the last micro-batch only."""
    if case["wrapper"] == "ddp" and number < case["accumulate"] - 1:
        quiet: AbstractContextManager[Any] = wrapped.no_sync()
        return quiet
    return nullcontext()


def _tried(case: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: what one case leaves behind is not the next one's."""
    ours, its = processes.Pipe(duplex=False)
    process = processes.get_context("fork").Process(target=_alone, args=(case, its))
    process.start()
    its.close()
    try:
        said: dict[str, Any] = (
            ours.recv() if ours.poll(_MOST_S) else {"fits": None, "error": f"took longer than {_MOST_S} s"}
        )
    except EOFError:
        said = {"fits": None, "error": "its process ended without a word"}
    process.kill() if said.get("error") else None
    process.join()
    return said


def _alone(case: dict[str, Any], out: Any) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    try:
        out.send(measured(case))
    except torch.cuda.OutOfMemoryError:
        out.send({"fits": False})
    except Exception as error:  # one case that this machine's software cannot run does not take the others along
        out.send({"fits": None, "error": f"{type(error).__name__}: {error}"[:300]})
    os._exit(0)


def main() -> int:
    cases = json.loads(Path(sys.argv[1]).read_text())
    done = []
    for case in cases:
        began = time.monotonic()
        done.append(case | _tried(case))
        said = done[-1]
        print(
            f"{time.monotonic() - began:6.1f} s",
            case["name"],
            {k: said.get(k) for k in ("step_s", "fits", "allocated_bytes", "error")},
            flush=True,
        )
        Path(sys.argv[2]).write_text(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
