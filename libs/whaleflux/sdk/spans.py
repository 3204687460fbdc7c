"""How long something took: by the clock, or on a GPU by events on its stream, without waiting for it.

Between two events that are recorded around something a host does lies what the GPU waited for it: nothing while it is still busy with
what it was given before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Span = Callable[[], float | None]  # seconds, or None: the GPU is not there yet
Moment = Any  # a float, or an event


def moment(on_gpu: bool, clock: Callable[[], float] = time.perf_counter) -> Moment:
    """Now: of the clock, or of the current stream of the current GPU."""
    if not on_gpu:
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(began: Any, ended: Any) -> Span:
    """From one moment to another of the same kind."""
    if isinstance(began, float):
        return lambda: ended - began
    return lambda: began.elapsed_time(ended) / 1000 if ended.query() else None
