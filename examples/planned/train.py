"""Trains a tiny transformer over the device mesh of a plan: mesh.json, written by `whaleflux plan ... --emit fsdp2`.

Start one rank for each of the plan's GPUs with torchrun, or as a WhaleFlux job. Without GPUs it runs on CPUs (gloo).
Two lines are the plan's: `device_mesh()` and `plan.shard(...)`; `parallelize_module` says which layers tensor parallelism splits.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from whaleflux.sdk import Checkpointer, PlannedMesh, device_mesh

LAYERS, HIDDEN, HEADS, VOCABULARY = 4, 64, 4, 128


class Block(nn.Module):
    """A layer: attention and a feed-forward part, whose projections tensor parallelism splits by heads and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_ffn = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False), nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        """Batch x sequence x hidden, in and out."""
        seen = self.norm(state)
        q, k, v = (part(seen).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        state = state + self.out(mixed.transpose(1, 2).flatten(2))
        return state + self.down(functional.gelu(self.up(self.norm_ffn(state))))


class Model(nn.Module):
    """Predicts the next token."""

    def __init__(self, recomputed: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.recomputed = round(recomputed * LAYERS)  # layers, from the first one

    def forward(self, tokens: Tensor) -> Tensor:
        """Batch x sequence of tokens to their logits."""
        state = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            again = number < self.recomputed
            state = checkpoint(block, state, use_reentrant=False) if again else block(state)
        return self.head(state)


def planned_model(plan: PlannedMesh, device: str) -> nn.Module:
    """The same weights on all ranks, then split as planned."""
    torch.manual_seed(0)
    model = Model(plan.recomputed).to(device)
    if plan.tp.size() > 1:
        split = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
        split |= {name: RowwiseParallel() for name in ("out", "down")}
        for block in model.blocks:
            parallelize_module(block, plan.tp, split)
    return plan.shard(model, model.blocks)


def batch(step: int, plan: PlannedMesh) -> Tensor:
    """The rank's samples of a step, micro-batches first: texts in which each token follows from the one before. Any rank count: same global batch."""
    count = plan.micro_batch * plan.micro_batches
    every = torch.Generator().manual_seed(step)
    first = torch.randint(VOCABULARY, (count * plan.data_size, 1), generator=every)
    texts = (first + 7 * torch.arange(plan.sequence + 1)) % VOCABULARY
    mine = texts[plan.data_rank * count : (plan.data_rank + 1) * count]
    return mine.view(plan.micro_batches, plan.micro_batch, -1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, plan: PlannedMesh, texts: Tensor) -> Tensor:
    """Returns the mean loss of the rank's samples."""
    total = torch.zeros((), device=texts.device)
    for number, text in enumerate(texts):
        plan.before_backward(model, number)
        logits = model(text[:, :-1]).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()) / len(texts)
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return total


def main() -> None:
    """Prints the loss over all ranks after each step. Goes on from the newest checkpoint, whatever split wrote it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--checkpoints", default="checkpoints", help="Folder; a WhaleFlux job has its own.")
    asked = parser.parse_args()
    plan = device_mesh()
    device = plan.mesh.device_type
    model = planned_model(plan, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=asked.lr)
    with Checkpointer(model=model, optimizer=optimizer, location=asked.checkpoints) as saved:
        for number, texts in saved.steps(lambda number: batch(number, plan).to(device), total=asked.steps):
            loss = step(model, optimizer, plan, texts)
            dist.all_reduce(loss)  # ranks that share a text have the same loss
            saved.report(loss / dist.get_world_size())
            if dist.get_rank() == 0:
                print(f"step {number + 1} loss {loss.item() / dist.get_world_size():.5f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
