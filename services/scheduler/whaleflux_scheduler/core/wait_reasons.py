"""Why a job waits, in the words that users read. Who goes first is decided in `planner`, what does not fit is counted by the engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime

from whaleflux import names
from whaleflux.manifests.gpu_values import GpuChoice
from whaleflux.quantities import shown_duration
from whaleflux_scheduler.core import dependencies
from whaleflux_scheduler.core.budget_stops import BudgetStop
from whaleflux_scheduler.core.data_quota import DataLimit
from whaleflux_scheduler.core.model import Claim, ClaimPurpose, Job, SchedulingDecision
from whaleflux_scheduler.core.patience import Waits
from whaleflux_scheduler.core.pending import Ahead
from whaleflux_scheduler.core.placement.api import NoPlacement
from whaleflux_scheduler.core.queue_order import ArrayLimit
from whaleflux_scheduler.core.quota import QueueLimit
from whaleflux_scheduler.core.reservations import Reservation, ReservationState
from whaleflux_scheduler.core.soon_over import LetsEnd

_IN_THE_FILE = {  # the engine's words, and those of who writes job files
    "excluded by name": "avoided after a failure",
    "without exclude_nodes": "on a node that it avoids for a while after a failure",
    "with soft data locality": "without require_local_data",
    "without min_nodes": "without nodes.min",
    "without max_nodes": "without nodes.max",
    "without required subgroups": "without the groups of place",
    " (level)": " (place)",
    "without cpu_millicores_per_gpu": "without cpus_per_rank",
    "without host_memory_bytes_per_gpu": "without memory_per_rank",
    "without min_compute_capability": "without gpu.compute_capability",
    "without min_memory_bytes": "without gpu.memory",
    "without its conditions on the node": "without nodes.labels, nodes.nvme and nodes.spot",
    "cores per GPU": "cores per rank",
    "GiB per GPU": "GiB per rank",
}
_MOST_NAMES = 3
_MOST_AHEAD = 10


def does_not_fit(no: NoPlacement, now: datetime, avoided: Collection[str] = ()) -> SchedulingDecision:
    """It cannot be placed now. `avoided`: nodes that it does not get because they failed it."""
    return SchedulingDecision(
        time=now,
        placed=False,
        summary=f"waits: {'' if no.ever or avoided else 'for capacity: '}{in_the_file(_summary(no)) or 'no room'}",
        reasons=tuple(_reasons(no, avoided)),
        exclusions=tuple((in_the_file(b.constraint), b.nodes) for b in no.blocked),
        smallest_change=in_the_file(no.smallest_change),
    )


def queue_is_full(limit: QueueLimit, now: datetime) -> SchedulingDecision:
    """Its queue may not take that many GPUs now, or nobody knows how many it may."""
    if limit.most is None:
        return _held_back(
            f"the record of queue {limit.queue} is missing or cannot be read, so its limit is not known", now
        )
    if limit.kept:
        why = f"{limit.kept} idle GPUs are kept for queues that are guaranteed them and do not lend them"
        return _held_back(
            why, now, "wait until more are idle, or let those queues lend more: whaleflux queue set NAME --lend N"
        )
    why = f"queue {limit.queue} holds {limit.held} of at most {limit.most} GPUs"
    return _held_back(
        why,
        now,
        f"wait until work of the queue has ended, or raise the limit: whaleflux queue set {limit.queue} --max-gpus N",
    )


def data_is_full(limit: DataLimit, now: datetime) -> SchedulingDecision:
    """Its queue may not hold its data on the nodes where it could start, and it may not read it elsewhere."""
    return _held_back(
        limit.words,
        now,
        f"wait until jobs of the queue have ended, take pins away, or raise it: whaleflux queue set {limit.queue} --data-quota SIZE",
    )


def array_is_full(limit: ArrayLimit, now: datetime) -> SchedulingDecision:
    """As many members run as its file lets."""
    return _held_back(f"{limit.running} members of {limit.array} run, at most {limit.most} at a time (array)", now)


def never_in_queue(limit: QueueLimit, gpus: int, now: datetime) -> SchedulingDecision:
    """However long it waits, its queue may not hold as many GPUs as it asks for."""
    return _held_back(
        f"{gpus} GPUs are asked for, and queue {limit.queue} may hold at most {limit.most} at once: it can never start under this limit",
        now,
        f"raise the limit: whaleflux queue set {limit.queue} --max-gpus {gpus}, or submit it again with at most {limit.most} GPUs",
    )


def never_beside(gpus: int, there: int, kept: int, now: datetime) -> SchedulingDecision:
    """However long it waits, too many of the fleet's GPUs are kept for others who do not lend them."""
    return _held_back(
        f"{gpus} GPUs are asked for, and of the fleet's {there} other queues are guaranteed {kept} that they do not lend: it can never start "
        "under these limits",
        now,
        f"let those queues lend more: whaleflux queue set NAME --lend N, or submit it again with at most {max(0, there - kept)} GPUs",
    )


def queue_is_small(limit: QueueLimit, gpus: int) -> str:
    """Its queue may never hold as many GPUs as the job asks for."""
    return (
        f"{gpus} GPUs are asked for, and queue {limit.queue} may hold at most {limit.most} at once; use another queue, or let an "
        f"operator raise it: whaleflux queue set {limit.queue} --max-gpus {gpus}"
    )


def no_nodes(now: datetime) -> SchedulingDecision:
    """Nothing has joined."""
    return _held_back("the fleet has no nodes yet", now, "admit one with: whaleflux token create --site NAME")


def kept_back(job: Job, now: datetime) -> SchedulingDecision | None:
    """What keeps a queued job from being looked at at all: a hold, or jobs that have to end first."""
    if hold := job.hold:
        why = f"held by {hold.by}" + (f": {hold.reason}" if hold.reason else "")
        return _held_back(why, now, f"whaleflux release {job.name}")
    if job.awaits:
        first, more = job.awaits[0], len(job.awaits) - 1
        if more < dependencies.FEW:
            why = f"for {first.job} {dependencies.words(first)}" + (f", and for {more} more" if more else "")
        else:  # not each end is stored at once
            why = f"for up to {more + 1} jobs, such as {first.job} {dependencies.words(first)}"
        return _held_back(why, now)
    return None


def budget_is_spent(stop: BudgetStop, over: datetime, now: datetime) -> SchedulingDecision:
    """The month has cost all of a budget that starts no new work then."""
    return _held_back(
        f"{_spent(stop)}, so nothing new of {_scope(stop)} starts before {_minute(over)}",
        now,
        f"an operator may raise it, or let new work start: whaleflux budget set {stop.budget}{_option(stop)} --usd N [--stop]",
    )


def closed_by_budget(stop: BudgetStop) -> str:
    """It may start anywhere but in that site."""
    return f"it may not start in site {stop.site}: {_spent(stop)}; see: whaleflux budget ls"


def _spent(stop: BudgetStop) -> str:
    amounts = f"${stop.spent_micros / 1e6:,.2f} of ${stop.micros_per_month / 1e6:,.2f}"
    seen = f" by {_minute(stop.time)}" if stop.time is not None else ""
    return f"budget {stop.budget} is spent ({amounts} in {stop.month}{seen})"


def _scope(stop: BudgetStop) -> str:
    named = (("queue", stop.queue), ("", stop.user), ("site", stop.site))
    return next((f"{kind} {value}".strip() for kind, value in named if value), "the fleet")


def _option(stop: BudgetStop) -> str:
    named = (("queue", stop.queue), ("user", stop.user), ("site", stop.site))
    return next((f" --{option} {value}" for option, value in named if value), "")


def others_alike_go_first(now: datetime) -> SchedulingDecision:
    return _held_back("others of its kind go first", now)


def pauses(until: datetime, now: datetime) -> SchedulingDecision:
    return _held_back(f"pauses until {until.isoformat()} after a failure", now)


def is_next(now: datetime) -> SchedulingDecision:
    """It fits: the next round places it."""
    return _held_back("it is its turn any moment", now)


def for_cheaper(waits: Waits, now: datetime) -> SchedulingDecision:
    """It could start on GPUs that cost more than those that come free in time."""
    summary = (
        f"cheaper GPUs are in sight: {waits.model} for ${waits.usd:.2f} are expected at {_minute(waits.start)}, instead of {waits.dear_model} for "
        f"${waits.dear_usd:.2f} now"
    )
    return replace(
        _held_back(summary, now),
        reasons=(f"it starts on {waits.dear_model} at {_minute(waits.until)} at the latest, to keep its deadline",),
    )


def for_its_place(nodes: Sequence[str], now: datetime) -> SchedulingDecision:
    """Where it goes on is not lost, and takes no work at this moment."""
    more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return _held_back(f"it goes on at its new place when {nodes[0]}{more} takes work again", now)


def _minute(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M UTC")


def cannot_be_asked(why: str, now: datetime) -> SchedulingDecision:
    """The engine refuses its shape, which an older version took."""
    return _held_back(why, now, "cancel it and submit it in another shape")


def cannot_be_stored(why: str, now: datetime) -> SchedulingDecision:
    """The record of its placement is larger than the store takes."""
    return _held_back(why, now)


def in_the_file(text: str) -> str:
    """The engine's words for conditions, as job files say them."""
    for engines, files in _IN_THE_FILE.items():
        text = text.replace(engines, files)
    return text


def with_victims(
    decision: SchedulingDecision, victims: Collection[str], *, reclaimed: bool = False
) -> SchedulingDecision:
    """It starts as soon as these jobs have stopped, which is a matter of seconds. `reclaimed`: not all are of lower priority."""
    if not victims:
        return decision
    several = len(victims) > 1
    which = (
        ("that hold" if several else "that holds") + " what its queue is guaranteed"
        if reclaimed
        else "of lower priority"
    )
    summary = f"starts when {len(victims)} job{'s' * several} {which} {'have' if several else 'has'} stopped"
    return replace(decision, summary=summary, preempts=tuple(victims)[:_MOST_AHEAD], exclusions=(), smallest_change="")


def lets_end(decision: SchedulingDecision, waits: LetsEnd, now: datetime) -> SchedulingDecision:
    """Others would be stopped for it, who are about to end by themselves."""
    many = len(waits.victims)
    named = ", ".join(waits.victims[:_MOST_NAMES]) + f" and {many - _MOST_NAMES} more" * (many > _MOST_NAMES)
    ends, stops = (shown_duration(math.ceil(max(0.0, (at - now).total_seconds()))) for at in (waits.ends, waits.stops))
    why = (
        f"would stop {named} in {stops} unless {'they end' if many > 1 else 'it ends'} before: expected in {ends}, and a stop costs more GPU time "
        "than this wait"
    )
    return replace(decision, reasons=(why, *decision.reasons))


def with_quota(decision: SchedulingDecision, kept: Collection[GpuChoice], job: Job) -> SchedulingDecision:
    """Of these GPU types its queue may not take as many as it would need."""
    types = ", ".join(f"{job.spec.gpus * choice.per_unit} x {choice.model}" for choice in kept)
    return replace(decision, reasons=(*decision.reasons, f"{types} would be more than queue {job.queue} may take now"))


def promised(claim: Claim, now: datetime) -> SchedulingDecision:
    """GPUs are kept for it, or will be, and it starts then at the latest."""
    return with_promise(SchedulingDecision(time=now, placed=False, summary="waits"), claim)


def with_expected_start(decision: SchedulingDecision, likely: datetime, safe: datetime) -> SchedulingDecision:
    """With when it probably starts: half of all such jobs by `likely`, nine of ten by `safe`."""
    first, last = (at.isoformat(timespec="minutes") for at in (likely, max(likely, safe)))
    return replace(
        decision,
        reasons=(
            *decision.reasons,
            f"expected to start {first} to {last} (p50 to p90), as those end who run and those ahead",
        ),
    )


def with_promise(decision: SchedulingDecision, claim: Claim | None) -> SchedulingDecision:
    """With the start that it was promised, if it was."""
    if claim is None or claim.purpose is not ClaimPurpose.RESERVATION or claim.start_time is None:
        return decision
    nodes = ", ".join(names.last(node) for node, _ in claim.nodes[:_MOST_NAMES]) + ", ..." * (
        len(claim.nodes) > _MOST_NAMES
    )
    summary = f"starts at {claim.start_time.isoformat(timespec='seconds')} at the latest (promised), on {nodes}"
    reasons = (
        (*decision.reasons, f"suspended for its promise: {', '.join(claim.victims[:_MOST_NAMES])}")
        if claim.victims
        else decision.reasons
    )
    return replace(decision, summary=summary, reasons=reasons)


def with_claims(decision: SchedulingDecision, claimants: Collection[str]) -> SchedulingDecision:
    """GPUs that look idle are kept for these jobs."""
    if not claimants:
        return decision
    names = ", ".join(sorted(claimants)[:_MOST_NAMES]) + (" and more" if len(claimants) > _MOST_NAMES else "")
    return replace(decision, reasons=(*decision.reasons, f"idle GPUs may be kept for {names}, for which others stop"))


def for_reservation(why: str, now: datetime, change: str = "") -> SchedulingDecision:
    """It waits for GPUs that are reserved for it."""
    return _held_back(why, now, change)


def with_reservations(decision: SchedulingDecision, kept: Collection[Reservation]) -> SchedulingDecision:
    """With what keeps idle GPUs from it: those that have begun have theirs for themselves, before others it may not be over in time."""
    begun = [one for one in kept if one.state is ReservationState.ACTIVE or one.start <= decision.time]
    to_come = [one for one in kept if one not in begun]
    closed, members = [one for one in begun if one.maintenance], [one for one in begun if not one.maintenance]
    told = []
    if closed:
        told.append(f"nodes take no work for {_some_reservations(closed)}: they do again when it is over")
    if members:
        told.append(f"GPUs are kept for {_some_reservations(members)}: until they end, only their members use them")
    if to_come:
        until = "until they begin, jobs may use them that are over by then (time_limit, expected)"
        told.append(f"GPUs are kept for {_some_reservations(to_come)}; {until}")
    return replace(decision, reasons=(*decision.reasons, *told)) if told else decision


def _some_reservations(kept: Sequence[Reservation]) -> str:
    told = [f"{one.name} ({'maintenance' if one.maintenance else 'reserved'} {one.window})" for one in kept]
    many = f" and {len(told) - _MOST_NAMES} more" if len(told) > _MOST_NAMES else ""
    return ", ".join(told[:_MOST_NAMES]) + many


def in_line(decision: SchedulingDecision, ahead: Ahead, queues: Sequence[str] = ()) -> SchedulingDecision:
    """With its position in its queue, and who goes first and why. `queues`: whose turn it is before its own, the first one first."""
    earlier = ahead.many - ahead.above
    whys = [f"{ahead.above} of higher priority"] * (ahead.above > 0) + [f"{earlier} submitted before it"] * (
        earlier > 0
    )
    reasons = [f"{' and '.join(whys)} {'goes' if ahead.many == 1 else 'go'} first in its queue"] * bool(whys)
    if queues:
        more = f" and {len(queues) - _MOST_NAMES} more" * (len(queues) > _MOST_NAMES)
        several = len(queues) > 1
        reasons.append(
            f"queue{'s' * several} {', '.join(queues[:_MOST_NAMES])}{more} {'are' if several else 'is'} due before its own: "
            f"{'they hold' if several else 'it holds'} less for {'their' if several else 'its'} weight or guarantee, or it is of higher priority"
        )
    return replace(
        decision, ahead=ahead.names[:_MOST_AHEAD], position=ahead.many + 1, reasons=(*decision.reasons, *reasons)
    )


def sooner(decision: SchedulingDecision, over_in_s: float | None, priority: int | None) -> SchedulingDecision:
    """With what would start it now: to be over in so many seconds, on GPUs that are promised to others then; to be of that priority."""
    ways = []
    if over_in_s is not None:
        ways.append(
            f"sooner: over within {shown_duration(over_in_s)} (expected or time_limit) it could start now, on GPUs that are promised to others"
        )
    if priority is not None:
        ways.append(
            f"sooner: from priority {priority} on, work of lower priority may be suspended for it (set-priority)"
        )
    return replace(decision, reasons=(*decision.reasons, *ways))


def _held_back(why: str, now: datetime, change: str = "") -> SchedulingDecision:
    return SchedulingDecision(time=now, placed=False, summary=f"waits: {why}", smallest_change=change)


def _summary(no: NoPlacement) -> str:
    counts = ", ".join(f"{b.constraint}: {b.nodes} node{'s' * (b.nodes != 1)}" for b in no.blocked)
    return "; ".join(part for part in (no.nearest_miss, counts, no.smallest_change) if part)


def _reasons(no: NoPlacement, avoided: Collection[str]) -> list[str]:
    if avoided:
        names = ", ".join(sorted(avoided)[:_MOST_NAMES]) + (" and more" if len(avoided) > _MOST_NAMES else "")
        return [f"it avoids {names} for a while, since work of it failed there"]
    return [] if no.ever else ["the fleet could not hold it even if it were empty"]
