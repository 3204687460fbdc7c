"""How long a rank computes, without what it waits for others: forward passes, timed where nothing is exchanged within them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from whaleflux.sdk.spans import Moment, Span, between, moment

_KEPT = 256  # measurements


def timed_modules(model: nn.Module) -> list[nn.Module]:
    """Those whose forward passes do not wait for other ranks: of an FSDP2 model the innermost ones that gather weights, else the model within DDP."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    inner = [one for one in sharded if not any(other is not one and other in sharded for other in one.modules())]
    return list(inner) or [model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model]


class ForwardTimer:
    """Measures forward passes that train (not those under `no_grad`); on a GPU by events on its stream, never waiting for it.

    Backward passes take about twice as long on every kind of GPU, so that forward passes alone tell ranks apart.
    """

    def __init__(self, model: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._open: dict[int, Any] = {}
        self._spans: list[Span] = []
        self._done: deque[tuple[list[Span], int]] = deque(maxlen=_KEPT)
        for module in timed_modules(model):
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, prepend=True)

    def _begin(self, module: nn.Module, _inputs: Any) -> None:
        if torch.is_grad_enabled() and module.training:
            self._open[id(module)] = self._now(module)

    def _end(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        began = self._open.pop(id(module), None)
        if began is not None:
            self._spans.append(between(began, self._now(module)))

    def _now(self, module: nn.Module) -> Moment:
        return moment(next((one.is_cuda for one in module.parameters()), False), self._clock)

    def trained(self, samples: int) -> None:
        """What was measured since the last call was of so many samples."""
        if self._spans:
            self._done.append((self._spans, samples))
        self._spans = []

    def sample_s(self) -> float | None:
        """Seconds a sample takes, the median since the last call; None: nothing was measured. What a GPU has not finished is left out."""
        found = []
        while self._done:
            spans, samples = self._done.popleft()
            seconds = [span() for span in spans]
            if samples and None not in seconds:
                found.append(sum(one for one in seconds if one is not None) / samples)
        return statistics.median(found) if found else None
