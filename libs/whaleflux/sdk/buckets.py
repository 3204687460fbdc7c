"""DDP's buckets, as an unbroken training has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from whaleflux.sdk import generators


def stabilise_buckets(model: nn.Module, loss: Callable[[], torch.Tensor], passes: int = 2) -> None:
    """Runs throw-away passes so that DDP rebuilds its buckets before any state is loaded.

    DDP reduces in one bucket in its first iteration and in several from the second on; gloo and NCCL add in an order
    that depends on the position in the bucket. Without this, the first step after a restart differs in its last bits
    from the same step of an unbroken run. Gradients, buffers (BatchNorm's statistics) and the random generators are left as
    they were.
    """
    states = generators.capture()
    gradients = [parameter.grad for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    for parameter in model.parameters():
        parameter.grad = None
    for _ in range(passes):
        loss().backward()
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    generators.apply(states)
