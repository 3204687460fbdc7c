"""Looks at single steps of a training with PyTorch's profiler: what it waited for there cannot be seen from outside, whatever its modules do.

A look traces two steps and reads the second: the first one fills the queue of the GPU again. All ranks look at the same steps, as each waits for the
slowest: one of each EVERY steps, by chance, so that what a program does at round ones (logs, saves) is seen as often as it is done. What a look has cost
this rank says in how many of these it looks: a thousandth of the time, in powers of two, so that those of one rank are among those of another.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.profiler import profile

from whaleflux.sdk.trace import Event, Interval, Places, TracedStep, of_cpu, of_gpu

log = logging.getLogger(__name__)

FIRST, EVERY = 37, 500  # steps
MOST_SHARE = 0.001
_MOST_EVERY = 1 << 24
_FIRST_CUDA = (12, 6)  # before, CUPTI crashed programs that use CUDA graphs


class Looks:
    """Of one training. `newest` is what the last step that was looked at was made of, None: not known; `cost_s` what looking has cost."""

    def __init__(self, world_size: int, on_gpu: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._on_gpu, self._clock = on_gpu, clock
        self._measures = _can_trace() if on_gpu else world_size > 1
        self._first = self._since = 0
        self._since_s = self._usual_s = self._began_s = self._begin_s = 0.0
        self._trace: profile | None = None
        self._traced: list[int] = []  # when the steps that are traced began and ended
        self._waits: list[Interval] = []
        self._names = False  # operators are recorded too, which say what a kernel of NCCL is of
        self._places = Places(None)
        self._whole: Callable[[profile], None] | None = None
        self.every = EVERY
        self.newest: TracedStep | None = None
        self.cost_s: float | None = None

    def start(self, step: int) -> None:
        """Steps begin, `step` of them done before."""
        self._first = self._since = step
        self._since_s = self._clock()
        if self._measures and self._whole is None:
            self._whole = whole = profile._prepare_trace
            profile._prepare_trace = functools.partialmethod(_prepared, self, whole)

    def stop(self) -> None:
        """Steps are over; everything is as it was."""
        self.spoil()
        if self._whole is not None:
            profile._prepare_trace, self._whole = self._whole, None

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        done = step - self._first
        if self._trace is not None:
            self._traced.append(time.time_ns())
            if len(self._traced) > 1:
                self._end(step)
        elif self._measures and is_due(done, self.every):
            self._begin(step)

    def waited(self, begin_ns: int, end_ns: int) -> None:
        """For data, by the clock of `time.time_ns`."""
        if self._trace is not None:
            self._waits.append((begin_ns, end_ns))

    def spoil(self) -> None:
        """This step is none like others: it has a save, or somebody else looks at it."""
        if self._trace is not None:
            trace, self._trace = self._trace, None
            self._guarded(lambda: trace.__exit__(None, None, None))

    def give_way(self, other: profile) -> None:
        """The program profiles itself, and two cannot: from now on nobody looks here."""
        if other is not self._trace:
            self._measures = False
            self.spoil()
            self.newest = None  # what the last look saw would be told for ever

    def _begin(self, step: int) -> None:
        if torch.autograd._profiler_enabled():
            return
        self._began_s = self._clock()
        self._usual_s = (self._began_s - self._since_s) / max(1, step - self._since)
        self._guarded(self._prepare)
        self._begin_s = self._clock() - self._began_s

    def _prepare(self) -> None:
        self._traced, self._waits, self._places = [], [], places()
        by_group = self._on_gpu and (self._names or self._places.common is None)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each look is two lines of output
        trace = profile(
            use_kineto=True, use_cpu=by_group or not self._on_gpu, use_device="cuda" if self._on_gpu else None
        )
        self._trace = trace  # before it is prepared: it is ours
        trace.__enter__()

    def _end(self, step: int) -> None:
        trace, self._trace = self._trace, None
        assert trace is not None
        if self._on_gpu:
            torch.cuda.synchronize()  # what was still queued is no cost of the look, as the GPU would have to do it anyway
        read_s = self._clock()
        self._guarded(lambda: self._read(trace))
        self._since, self._since_s = step, self._clock()
        slower_s = self.newest.whole_s - self._usual_s if self.newest else 0.0
        self.cost_s = self._begin_s + self._since_s - read_s + len(self._traced) * max(0.0, slower_s)
        self.every = steps_between(self.cost_s, self._usual_s)

    def _read(self, trace: profile) -> None:
        trace.__exit__(None, None, None)
        told = [(_event(one), one.is_user_annotation()) for one in trace.kineto_results.events()]
        events = [one for one, is_label in told if not (one.on_gpu and is_label)]  # a label on a GPU ran nothing
        of = of_gpu if self._on_gpu else of_cpu
        found = of(events, self._traced[0], self._traced[1], self._waits, self._places)
        self.newest = found if found is None or _is_seen(self._on_gpu) else replace(found, in_node_s=None, cross_s=None)
        self._names |= any("SendRecv" in one.name for one in events)

    def _guarded(self, work: Callable[[], object]) -> None:
        """A profiler that fails costs the knowledge, not the training."""
        try:
            work()
        except Exception as error:
            log.info("steps are not looked at, since PyTorch's profiler fails: %s", error)
            self._measures, self._trace, self.newest = False, None, None


def steps_between(cost_s: float, step_s: float) -> int:
    """So many that a look that costs this takes at most MOST_SHARE of the time; EVERY times a power of two."""
    every = EVERY
    while every < _MOST_EVERY and every * step_s * MOST_SHARE < cost_s:
        every *= 2
    return every


def is_due(done: int, every: int) -> bool:
    """Whether a look begins after `done` steps; the same on all ranks."""
    block, at = divmod(done, EVERY)
    return block % (every // EVERY) == 0 and at == _place_in(block)


@functools.lru_cache(maxsize=4)
def _place_in(block: int) -> int:
    return Random(block).randrange(EVERY) if block else FIRST


def places() -> Places:
    """Of the groups that this rank is in."""
    if not dist.is_initialized():
        return Places(True)
    named = {name: _is_here(group) for group, name in dist.distributed_c10d._world.pg_names.items() if group.size() > 1}
    different = set(named.values())
    return Places(different.pop() if len(different) == 1 else None, named)


def _is_seen(on_gpu: bool) -> bool:
    """Whether collectives would be in a trace: NCCL's are kernels, gloo's are told by their names."""
    seen = "cuda:nccl" if on_gpu else "cpu:gloo"
    return not dist.is_initialized() or seen in str(dist.get_backend_config())


def _is_here(group: Any) -> bool:
    """Whether all ranks of a group are on this node; nodes hold ranks that follow one another."""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return True
    local, first = (
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        dist.get_rank() - int(os.environ.get("LOCAL_RANK", "0")),
    )
    return all(first <= rank < first + local for rank in dist.get_process_group_ranks(group))


def _prepared(other: profile, looks: Looks, whole: Callable[[profile], None]) -> None:
    looks.give_way(other)
    whole(other)


def _can_trace() -> bool:
    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    return version >= _FIRST_CUDA


def _event(one: Any) -> Event:
    """Of Kineto's."""
    on_gpu = one.device_type() != torch.autograd.DeviceType.CPU
    named = one.name() == "record_param_comms" and hasattr(one, "extra_meta")  # PyTorch 2.11 has it not
    meta = one.extra_meta() if named else {}
    return Event(
        name=one.name(),
        start_ns=one.start_ns(),
        end_ns=one.start_ns() + one.duration_ns(),
        on_gpu=on_gpu,
        is_async=one.is_async(),
        thread=one.start_thread_id(),
        call=one.correlation_id(),
        operator=one.linked_correlation_id() if on_gpu else 0,
        group=meta.get("Process Group Name", "").strip('"'),
        collective=meta.get("Collective name", "").strip('"'),
    )


def is_on_gpu(model: nn.Module) -> bool:
    """Whether the model is on one."""
    return torch.cuda.is_available() and any(one.is_cuda for one in model.parameters())
