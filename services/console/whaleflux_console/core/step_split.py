"""Into which classes the time of steps goes, from what their ranks report of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from whaleflux_console.core.facts import WHOLE_PPM, Attempt, Plan, Steps
from whaleflux_console.core.money import split
from whaleflux_console.core.rows import CLASSES, CostClass

PLACE = {kind: i for i, kind in enumerate(CLASSES)}


@dataclass(slots=True)
class Split:
    """Milliseconds in the order of CLASSES, and what they rest on."""

    ms: list[int] = field(default_factory=lambda: [0] * len(CLASSES))
    measured: bool = False  # something said what it did while it worked
    modelled: bool = False  # some of it is a model's
    blind: bool = False  # of some of the time that it worked nothing is known

    def add(self, kind: CostClass, ms: int) -> None:
        self.ms[PLACE[kind]] += ms

    def unknown(self, ms: int) -> None:
        self.add(CostClass.UNKNOWN, ms)
        self.blind = self.blind or ms > 0


@dataclass(slots=True)
class Parts:
    """Of whole reports that say and leave unsaid the same: milliseconds in all, and of each kind, in the order of `of_report`."""

    whole_ms: int = 0
    steps: int = 0
    tensor_ms: int = 0  # worked at least, by counters
    seen_ms: int = (
        0  # of which counters say whether anything ran; asked where nobody says how long the host was waited for
    )
    ran_ms: int = 0  # of these, something did
    idle_ms: int = 0  # within steps that took far longer than others
    said_ms: list[int] = field(default_factory=lambda: [0] * 5)


Said = tuple[int | None, int | None, int | None, int | None, int | None]
_AS_SAID = (CostClass.DATA, CostClass.HOST, CostClass.SAVE, CostClass.COMM_IN_NODE)
_DATA, HOST, _SAVE, _IN_NODE, _CROSS = range(5)


def of_report(report: Steps, *, alone: bool, cross_node: bool) -> Said:
    """Its data, host, save, in-node and cross-node milliseconds. What the attempt cannot have is 0: one GPU talks to nobody."""
    in_node, cross = report.comm_in_node_ms, report.comm_cross_ms
    return (
        report.data_ms,
        report.host_ms,
        report.save_ms,
        0 if in_node is None and alone else in_node,
        0 if cross is None and not cross_node else cross,
    )


def bounded(said: Said, whole_ms: int, ms: int) -> list[int]:
    """What it says, for `ms` of its `whole_ms`, and never more than that together. Unsaid is 0."""
    parts = [max(0, part or 0) for part in said]
    if sum(parts) > whole_ms:
        parts = split(whole_ms, parts)
    return parts if ms == whole_ms else [part * ms // whole_ms for part in parts]


def classify(parts: Parts, said: tuple[bool, ...], attempt: Attempt, *, alone: bool, into: Split) -> None:
    """Divides these steps. `said`: which of the five kinds were reported."""
    into.measured = into.measured or any(said)
    said_ms, complete = _with_communication(parts, said, attempt, into)
    for kind, ms in zip(_AS_SAID, said_ms, strict=False):
        into.add(kind, ms)
    _across(said_ms[_CROSS], attempt, into)
    rest = parts.whole_ms - sum(said_ms)
    idle = min(rest, parts.idle_ms)
    into.add(CostClass.ALLOCATED_IDLE, idle)
    rest -= idle
    if complete and (alone or attempt.plan is not None):
        if not said[HOST]:
            rest = _stalled(rest, said_ms[_DATA] + said_ms[_SAVE] + idle, parts, into)
        _computed(rest, rest + said_ms[_IN_NODE], attempt.plan, into)
    else:
        at_least(min(rest, parts.tensor_ms), rest, attempt.plan, into)


def _with_communication(parts: Parts, said: tuple[bool, ...], attempt: Attempt, into: Split) -> tuple[list[int], bool]:
    """Milliseconds of each kind, with a model's where communication is unsaid, and whether all of them are then known."""
    said_ms, modelled_s = list(parts.said_ms), _known(attempt.communication_s) if attempt.of_its_model else None
    if modelled_s is None or (said[_IN_NODE] and said[_CROSS]):
        return said_ms, all(said[place] for place in (_DATA, _SAVE, _IN_NODE, _CROSS))
    more = round(modelled_s * 1000) * parts.steps - said_ms[_IN_NODE] - said_ms[_CROSS]
    unsaid = _CROSS if not said[_CROSS] and (said[_IN_NODE] or attempt.cross_node) else _IN_NODE
    said_ms[unsaid] += max(0, min(parts.whole_ms - sum(said_ms), more))
    into.modelled = True
    return said_ms, said[_DATA] and said[_SAVE]


def _known(score_s: float | None) -> float | None:
    """A score that is one."""
    return score_s if score_s is not None and isfinite(score_s) and score_s >= 0 else None


def _across(cross: int, attempt: Attempt, into: Split) -> None:
    """Communication across nodes: what the best free placement would have had too, and what not."""
    actual, best = _known(attempt.communication_s), _known(attempt.best_free_communication_s)
    if not cross:
        return
    if not actual or best is None:
        into.unknown(cross)
        return
    structural = cross * round(min(best, actual) * WHOLE_PPM) // max(1, round(actual * WHOLE_PPM))
    into.add(CostClass.COMM_STRUCTURAL, structural)
    into.add(CostClass.COMM_AVOIDABLE, cross - structural)
    into.modelled = True


def _stalled(rest: int, told_ms: int, parts: Parts, into: Split) -> int:
    """What of the rest it worked, where nobody says how long the host was waited for.

    While nothing ran it stood still, for a reason that is known for `told_ms` alone. Where no counter tells either, waiting is in the rest.
    """
    unexplained = min(rest, max(0, parts.seen_ms - parts.ran_ms - told_ms))
    into.unknown(unexplained)
    into.modelled = True
    return rest - unexplained


def _computed(rest: int, in_pipeline: int, plan: Plan | None, into: Split) -> None:
    """What is left of steps that say everything else: stages that wait, work done again, useful work.

    1F1B with p stages, v virtual stages a GPU and m micro-batches is busy for m v of m v + p - 1 slots; communication within the node happens
    in them. See Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
    """
    bubble = min(rest, in_pipeline * _idle_slots(plan) // (_idle_slots(plan) + _busy_slots(plan)))
    into.add(CostClass.BUBBLE, bubble)
    into.modelled = into.modelled or bubble > 0
    _compute(rest - bubble, plan, into)


def _idle_slots(plan: Plan | None) -> int:
    return max(0, plan.pipeline - 1) if plan else 0


def _busy_slots(plan: Plan | None) -> int:
    return max(1, plan.micro_batches * plan.virtual_stages) if plan else 1


def _compute(ms: int, plan: Plan | None, into: Split) -> None:
    again = ms * plan.recompute_share_ppm // WHOLE_PPM if plan else 0
    into.add(CostClass.RECOMPUTE, again)
    into.add(CostClass.USEFUL, ms - again)
    without_plan = plan is None and ms > 0  # work done again is in useful then
    into.modelled = into.modelled or again > 0 or without_plan


def at_least(tensor_ms: int, whole_ms: int, plan: Plan | None, into: Split) -> None:
    """Time of which only counters tell: while tensor pipes worked it computed, the rest is unknown."""
    if tensor_ms:
        _compute(tensor_ms, plan, into)
        into.measured = into.modelled = True
    into.unknown(whole_ms - tensor_ms)
