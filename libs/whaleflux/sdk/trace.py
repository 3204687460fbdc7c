"""What a step was made of, read from a profiler's trace of it. Pure; times of a trace are whole nanoseconds since 1970.

Communication is exposed while no kernel (on a CPU: no operator) runs beside it: the union of the ones less the union of the others, as in
Holistic Trace Analysis. A stage of a pipeline that waits for another one does not communicate, though its kernel runs: that is left in the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Interval = tuple[int, int]
_NS = 1e9
_BETWEEN_TWO = ("gloo:send", "gloo:recv")


@dataclass(frozen=True, slots=True)
class Event:
    """Of a trace: an operator or a call of the CPU, a collective, or what a GPU ran."""

    name: str
    start_ns: int
    end_ns: int
    on_gpu: bool = False
    is_async: bool = False
    thread: int = 0
    call: int = 0  # of the CUDA call that launched it, and of that call
    operator: int = 0  # of the operator that launched it; 0: operators were not recorded
    group: str = ""  # of a collective's operator
    collective: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """Which groups of ranks are within one node. `common`: all of them are (True), or none; None: by group."""

    common: bool | None
    by_group: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TracedStep:
    """Seconds; None: not known."""

    whole_s: float  # without waits for data
    host_s: float | None  # the GPU had nothing to do otherwise
    in_node_s: float | None
    cross_s: float | None


def of_gpu(
    events: Sequence[Event], begin_ns: int, end_ns: int, waits: Sequence[Interval], places: Places
) -> TracedStep | None:
    """The step that the program did from `begin_ns` to `end_ns`, waiting for data meanwhile; None: no GPU ran anything.

    On the GPU it lasts from the end of what was launched before to the end of what was launched in it.
    """
    calls = {one.call: one for one in events if not one.on_gpu and one.name.startswith("cu")}
    ran = [one for one in events if one.on_gpu and calls.get(one.call, one).start_ns < end_ns]
    if not ran:
        return None
    before = (one.end_ns for one in ran if calls.get(one.call, one).start_ns < begin_ns)
    window = [(max(before, default=begin_ns), max(one.end_ns for one in ran))]
    idle, asleep = without(window, merged((one.start_ns, one.end_ns) for one in ran)), merged(waits)
    ready = {one.start_ns: calls.get(one.call, one).end_ns for one in ran}
    host = without(
        [(start, end) for start, end in idle if ready[end] > start], asleep
    )  # else the GPU only changes over
    operators = {one.call: one for one in events if not one.on_gpu and one.collective}
    kinds = _Kinds()
    for one in ran:
        kinds.add(one, _kind_of_kernel(one, operators.get(one.operator), places))
    whole_ns = length_ns(window) - length_ns(common(idle, asleep))
    return TracedStep(whole_ns / _NS, length_ns(host) / _NS, *kinds.exposed(window, merged(kinds.computing)))


def of_cpu(
    events: Sequence[Event], begin_ns: int, end_ns: int, waits: Sequence[Interval], places: Places
) -> TracedStep | None:
    """The same of a training on a CPU, over gloo: no device waits for it. None: it ran no operator."""
    own = [one for one in events if not one.is_async]
    if not own:
        return None
    thread = min(own, key=lambda one: one.start_ns).thread
    kinds, waiting = _Kinds(), []
    for one in events:
        if one.name.startswith("gloo:"):
            if one.name not in _BETWEEN_TWO:
                kinds.add(one, _placed(places.common))
        elif one.thread == thread and one.name.startswith("aten::"):
            kinds.add(one, _COMPUTES)
        elif one.thread == thread and one.name.endswith("::wait_tensor"):
            waiting.append((one.start_ns, one.end_ns))  # also within an operator, which then is no computation
    window = [(begin_ns, end_ns)]
    computing = without(merged(kinds.computing), merged(waiting))
    whole_ns = length_ns(without(window, merged(waits)))
    return TracedStep(whole_ns / _NS, None, *kinds.exposed(window, computing))


_COMPUTES, _IN_NODE, _CROSS, _UNTOLD, _OTHER = range(5)


class _Kinds:
    """Intervals by what ran in them."""

    def __init__(self) -> None:
        self._of: list[list[Interval]] = [[] for _ in range(5)]

    def add(self, event: Event, kind: int) -> None:
        self._of[kind].append((event.start_ns, event.end_ns))

    @property
    def computing(self) -> list[Interval]:
        return self._of[_COMPUTES]

    def exposed(self, window: list[Interval], computing: list[Interval]) -> tuple[float | None, float | None]:
        """Seconds within the node and across; both at once count as across. None: some of it cannot be told."""
        free = without(window, computing)
        in_node, cross, untold = (common(free, merged(self._of[kind])) for kind in (_IN_NODE, _CROSS, _UNTOLD))
        if untold:
            return None, None
        return length_ns(without(in_node, cross)) / _NS, length_ns(cross) / _NS


def _kind_of_kernel(one: Event, operator: Event | None, places: Places) -> int:
    """By NCCL's names. Its kernel of sends and receives is also that of all-to-all: which one it was the operator says."""
    if not one.name.startswith("nccl"):
        return _OTHER if one.name.startswith(("Memcpy", "Memset")) else _COMPUTES
    if "SendRecv" in one.name and (operator is None or "all_to_all" not in operator.collective):
        return _UNTOLD if operator is None else _OTHER
    if places.common is not None or operator is None:
        return _placed(places.common)
    return _placed(places.by_group.get(operator.group))


def _placed(is_here: bool | None) -> int:
    return _UNTOLD if is_here is None else _IN_NODE if is_here else _CROSS


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union: disjoint, in order, none empty."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif end > start:
            found.append((start, end))
    return found


def without(whole: Sequence[Interval], parts: Sequence[Interval]) -> list[Interval]:
    """What of `whole` is in none of `parts`; both as `merged` returns them."""
    found, at = [], 0
    for start, end in whole:
        while at < len(parts) and parts[at][1] <= start:
            at += 1
        place = at
        while place < len(parts) and parts[place][0] < end:
            if parts[place][0] > start:
                found.append((start, parts[place][0]))
            start = max(start, parts[place][1])
            place += 1
        if start < end:
            found.append((start, end))
    return found


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What is in both; both as `merged` returns them."""
    return without(one, without(one, other))


def length_ns(intervals: Iterable[Interval]) -> int:
    """Of disjoint ones."""
    return sum(end - start for start, end in intervals)
