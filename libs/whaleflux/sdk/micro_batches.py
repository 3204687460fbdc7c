"""A step's batch in parts that fit into memory, whose gradients are exchanged once, with the last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def samples_of(batch: Any) -> int:
    """Length of the first dimension of its first tensor. Raises ValueError where there is none."""
    found = next((tensor.shape[0] for tensor in _tensors(batch) if tensor.dim()), None)
    if found is None:
        raise ValueError(
            "micro_batch cuts batches along the first dimension of their tensors, and this one has none: let collate_fn stack samples into "
            "tensors, or leave micro_batch out"
        )
    return int(found)


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)


def piece(batch: Any, span: slice, count: int) -> Any:
    """Some of the `count` samples: tensors of that length are cut, also within tuples, lists and mappings, and lists of as many other things."""
    if isinstance(batch, torch.Tensor):
        return batch[span] if batch.dim() and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {key: piece(value, span, count) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(piece(value, span, count) for value in batch))
    if isinstance(batch, (list, tuple)):
        if len(batch) == count and not any(True for _ in _tensors(batch)):
            return batch[span]
        return type(batch)(piece(value, span, count) for value in batch)
    return batch


def without_exchange(model: nn.Module | None, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """While it is open: gradients of `model` (DDP or FSDP2) stay on their rank, unless it is the last part of a step.

    Ranks have different numbers of parts, so nothing may be exchanged within one: FSDP2 keeps the weights that it gathered in the first part
    until the last (as ZeRO-2 has them), whatever `reshard_after_forward` said.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_forward(False)
        model.set_reshard_after_backward(last)
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        unsynced: contextlib.AbstractContextManager[Any] = model.no_sync()
        return unsynced
    return contextlib.nullcontext()
