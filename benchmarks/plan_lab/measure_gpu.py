"""Measures training steps and their memory on one GPU, as a table for `plan_accuracy`: python -m benchmarks.plan_lab.measure_gpu > h200_measured.csv.

A decoder of RMSNorm, attention without grouped heads and SwiGLU, in PyTorch under autocast to bfloat16 with fused AdamW; with and without
recomputation of each layer, eager and compiled. Five steps after three
that warm it up. `h200_measured.csv` was made with it; its last three lines are missing, since the machine was lent for ten minutes.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

VOCABULARY = 32_000
SHAPES = (  # layers, hidden, ffn, micro-batch, sequence
    (24, 2048, 5632, 4, 2048), (24, 2048, 5632, 16, 2048), (24, 2048, 5632, 1, 16384), (16, 4096, 11008, 2, 4096), (16, 4096, 11008, 8, 2048),
    (12, 5120, 13824, 4, 4096),
)  # fmt: skip
_HEADER = (
    "gpu,gpus,precision,hidden,heads,kv_heads,layers,ffn,vocab,seq_len,micro_batch,global_batch,tp,act_ckpt,compiled,step_time_s,allocated_bytes,"
    "reserved_bytes,parameters"
)


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.heads = hidden // 128
        self.before, self.between = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Any) -> Any:
        batch, tokens, hidden = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, hidden))
        gate, up = self.up(self.between(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def measured(layers: int, hidden: int, ffn: int, micro_batch: int, sequence: int, again: bool, compiled: bool) -> str:
    """One line of the table."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    embedding, head = nn.Embedding(VOCABULARY, hidden).cuda(), nn.Linear(hidden, VOCABULARY, bias=False).cuda()
    blocks = nn.ModuleList(Layer(hidden, ffn) for _ in range(layers)).cuda()
    weights = [*embedding.parameters(), *blocks.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, fused=True)
    runs = [torch.compile(one) if compiled else one for one in blocks]
    tokens = torch.randint(VOCABULARY, (micro_batch, sequence), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            x = embedding(tokens).bfloat16()
            for one in runs:
                x = checkpoint(one, x, use_reentrant=False) if again else one(x)
            loss = functional.cross_entropy(head(x).float().view(-1, VOCABULARY), tokens.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = _timed(step)
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    memory = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), sum(one.numel() for one in weights))
    heads = hidden // 128
    cells = (
        gpu, 1, "bf16", hidden, heads, heads, layers, ffn, VOCABULARY, sequence, micro_batch, micro_batch, 1, again, compiled, round(seconds, 5), *memory
    )  # fmt: skip
    return ",".join(map(str, cells))


def _timed(step: Any) -> float:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / 5


def main() -> int:
    print(_HEADER)
    for compiled in (False, True):
        for shape in SHAPES:
            for again in (False, True):
                print(measured(*shape, again, compiled), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
