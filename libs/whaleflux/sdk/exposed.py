"""How long training stood still for communication: what is seen of it from a rank's own process, on a few steps of each ten.

Collectives that a program waits for are timed where they are called; those of DistributedDataParallel, which run beside the backward pass, by its own
timers (its reducer samples each hundredth step). What FSDP and tensor parallel modules wait for happens within streams that nobody else sees,
and of a call that returns at once nobody sees here when it is waited for: of them nothing is known, and nothing is said.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from whaleflux.sdk.background import Background
from whaleflux.sdk.spans import Span, between, moment

_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "all_to_all", "all_to_all_single", "broadcast", "gather", "scatter", "barrier", "send", "recv",
    "batch_isend_irecv",
)  # fmt: skip
_NS = 1e9


class ExposedCommunication:
    """Of one model's training; the collectives of torch.distributed are wrapped between `start` and `stop`."""

    def __init__(self, model: nn.Module, world_size: int, on_gpu: bool) -> None:
        self._model, self._on_gpu = model, on_gpu
        self._is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        self.is_known = world_size == 1 or not _is_sharded(model)
        self._measures = self.is_known and world_size > 1
        self.sampling = False  # whether this step is one that is measured
        self._spans: list[tuple[bool, Span]] = []  # whether within the node
        self._whole: dict[str, Any] = {}
        self._depth = 0
        self._waits_later = False  # the program called what returns at once

    def start(self) -> None:
        """Begins to see collectives."""
        if self._measures and not self._whole:
            for name in _COLLECTIVES:
                self._whole[name] = whole = getattr(dist, name)
                setattr(dist, name, self._timed(whole))

    def stop(self) -> None:
        """Everything is as it was."""
        for name, whole in self._whole.items():
            setattr(dist, name, whole)
        self._whole = {}

    def take(self, sampled_steps: int, steps: int) -> tuple[float | None, float | None]:
        """Seconds within the node and across nodes, of `steps` steps of which `sampled_steps` were measured; None: not known."""
        waits_later, self._waits_later = self._waits_later, False
        if not self.is_known or waits_later:
            self._spans.clear()
            return None, None
        if not self._measures:
            return 0.0, 0.0
        seconds = [(here, span, span()) for here, span in self._spans]
        self._spans = [(here, span) for here, span, took in seconds if took is None]
        found = {True: 0.0, False: 0.0}
        for here, _, took in seconds:
            found[here] += (took or 0.0) * steps / max(1, sampled_steps)
        found[_is_here(None)] += self._of_ddp() * steps
        return found[True], found[False]

    def _timed(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(whole)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._depth or isinstance(
                threading.current_thread(), Background
            ):  # a save's, which training goes on beside
                return whole(*arguments, **named)
            self._depth += 1  # one collective may be made of others
            began = moment(self._on_gpu) if self.sampling else None
            try:
                answer = whole(*arguments, **named)
            finally:
                self._depth -= 1
            if isinstance(answer, dist.Work | list):
                self._waits_later |= not self._is_ddp  # whose hooks do so, and whose timers see it
            elif began is not None:
                self._spans.append((_is_here(named.get("group")), between(began, moment(self._on_gpu))))
            return answer

        return timed

    def _of_ddp(self) -> float:
        """Seconds of a step; 0 where no DDP communicates."""
        if not self._is_ddp:
            return 0.0
        seen = self._model._get_ddp_logging_data()  # its only door
        whole, beside = seen.get("backward_comm_time", 0), seen.get("backward_compute_comm_overlap_time", 0)
        return float(max(0, whole - beside) / _NS)


def _is_sharded(model: nn.Module) -> bool:
    """Whether modules or tensors of it communicate by themselves."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(one, FullyShardedDataParallel) for one in model.modules()) or any(
        isinstance(one, DTensor) for one in model.parameters()
    )


def _is_here(group: Any) -> bool:
    """Whether all ranks of a group are on this node; nodes hold ranks that follow one another."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return True
    local, first = (
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        dist.get_rank() - int(os.environ.get("LOCAL_RANK", "0")),
    )
    return all(first <= rank < first + local for rank in dist.get_process_group_ranks(group))


def on_gpu(model: nn.Module) -> bool:
    """Whether the model is on one."""
    return torch.cuda.is_available() and any(one.is_cuda for one in model.parameters())
