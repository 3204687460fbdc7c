"""A small character-level GPT: 128 ASCII codes in, 128 out. Used by train.py and serve.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; 4 layers x 128 is 0.83 M parameters."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.grow = nn.Linear(shape.width, 4 * shape.width)
        self.shrink = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.shrink(functional.gelu(self.grow(self.norm2(x))))


class Gpt(nn.Module):
    """Tokens (batch, length) to logits (batch, length, 128)."""

    def __init__(self, shape: Shape = Shape()) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(
        self, prompt: str, length: int, temperature: float = 0.8, seed: int | None = None, top_p: float = 1.0
    ) -> Iterator[str]:
        """Yields one character at a time, from the likeliest that make up `top_p` together."""
        generator = torch.Generator().manual_seed(seed if seed is not None else 0)
        tokens = [ord(c) for c in prompt if ord(c) < VOCABULARY] or [ord("\n")]
        for _ in range(length):
            logits = self(torch.tensor([tokens[-self.shape.context :]]))[0, -1]
            if temperature <= 0:
                token = int(logits.argmax())
            else:
                chances, order = (logits / temperature).softmax(0).sort(descending=True)
                chances[1:][chances.cumsum(0)[:-1] >= top_p] = 0
                token = int(order[torch.multinomial(chances, 1, generator=generator)])
            tokens.append(token)
            yield chr(token)
