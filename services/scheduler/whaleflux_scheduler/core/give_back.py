"""Which rented machines are given back now. Pure.

Machines that may stand for one another are counted together (`idle_times`): how many of the idle ones are kept follows from how long they were
not needed, which of them go from their prices: the dearest first. A machine goes shortly before a billing unit ends, since what is paid for is
free to keep; nobody gives back what a job that waits will take, or what keeps the start that a reservation or a job was promised. A machine
that takes no work and has none is paid for nothing, and goes whatever its unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core.idle_times import IdleTimes, is_kept
from whaleflux_scheduler.core.offered import Kind, Rented

NO_TIMES = IdleTimes()
MOST_KINDS = 64  # of which idle times are remembered
CLOSED_S = 900.0  # longer than an agent's restart, a short outage, or a look at a cordoned machine


@dataclass(frozen=True, slots=True)
class End:
    """A machine to give back."""

    lease: str
    why: str


def seen(
    rented: Sequence[Rented], times: Mapping[Kind, IdleTimes], free: Mapping[str, int], now_s: float
) -> dict[Kind, IdleTimes]:
    """What is known after a look. `free`: GPUs of the fleet's own nodes that nobody has, by type; `now_s`: Unix time."""
    needed, idle = defaultdict[Kind, int](int), defaultdict[Kind, int](int)
    for one in rented:
        if not one.ending and one.closed_s is None:
            (idle if one.is_idle else needed)[one.offer.kind] += 1
    kinds = list(dict.fromkeys([*times, *needed, *idle]))[-MOST_KINDS:]
    return {
        kind: times.get(kind, NO_TIMES).seen(needed[kind], idle[kind], free.get(kind.gpu_type, 0) >= kind.gpus, now_s)
        for kind in kinds
    }


def ends(
    rented: Sequence[Rented],
    times: Mapping[Kind, IdleTimes],
    is_taken: Callable[[str], bool],
    lead_s: float,
    now_s: float,
) -> tuple[End, ...]:
    """`is_taken`: whether a job that waits will have the machine. `lead_s`: so long before a billing unit ends it is decided about."""
    alike = defaultdict[Kind, list[Rented]](list)
    for one in rented:
        if one.is_idle and not one.ending:
            alike[one.offer.kind].append(one)
    found = [End(one.lease, _why_closed(one.closed_s or 0.0)) for one in rented if _is_closed(one)]
    for kind, idle in alike.items():
        found += _of_kind(idle, times.get(kind, NO_TIMES), is_taken, lead_s, now_s)
    return tuple(found)


def _of_kind(
    idle: Sequence[Rented], times: IdleTimes, is_taken: Callable[[str], bool], lead_s: float, now_s: float
) -> list[End]:
    levels = list(times.idle_s(len(idle), now_s))
    free = [one for one in idle if not is_taken(one.lease)]
    due = [one for one in free if one.unit_left_s <= lead_s or one.offer.billing_unit_s <= lead_s]
    due.sort(key=lambda one: (-one.offer.usd_per_hour, one.unit_left_s, one.lease))
    found = list[End]()
    for one in due:
        if not levels:
            break
        idle_s, room = levels[-1]  # the one that has not been needed for longest
        step_s = max(one.offer.billing_unit_s, lead_s)
        again_s = one.offer.again_s
        seen_s = times.like(room, again_s, now_s)
        if is_kept(seen_s, idle_s, times.is_indebted(again_s), step_s, again_s):
            continue
        levels.pop()
        found.append(End(one.lease, _why(idle_s, room, len(seen_s))))
    return found


def _is_closed(one: Rented) -> bool:
    return not one.ending and one.closed_s is not None and one.closed_s >= CLOSED_S


def _why_closed(closed_s: float) -> str:
    return f"its node takes no work and has had none for {shown_duration(closed_s)}; whaleflux nodes says why"


def _why(idle_s: float, room: bool, others: int) -> str:
    since = f"nothing has run on it for {shown_duration(idle_s)}"
    if room:
        return f"{since}, and the fleet's own nodes had room for what it would take"
    known = f", as {others} idle times of such machines say" if others else ""
    return f"{since}; renting it again would cost less than keeping it{known}"
