"""When an attempt started, worked, and worked in vain: from what is known of the attempts of one job.

A failure costs what was done since the step that the next attempt begins behind, the wait until it is noticed, and the start of the next
attempt. The steps that are then done again count once: as lost where they were done first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from whaleflux_console.core.facts import Attempt, Steps

Key = tuple[str, int]  # uid, attempt
_NOTHING = -1  # no step was kept


@dataclass(frozen=True, slots=True)
class Phases:
    """An attempt's time: it starts until `started_ms`, works, and from `lost_from_ms` on works in vain. None: does not come, or not yet."""

    started_ms: int | None
    start_is_lost: bool = False  # it started again because the attempt before it failed
    lost_from_ms: int | None = None
    lost_is_modelled: bool = False  # since the commit of the checkpoint or the like: at most so much was lost


def newest(attempts: Iterable[Attempt]) -> dict[Key, Attempt]:
    """Of each attempt the record that knows most: records come as it goes on, in any order. What it served is known once one of them says it."""
    found: dict[Key, Attempt] = {}
    for one in attempts:
        known = found.setdefault((one.uid, one.attempt), one)
        if known != one:
            most = max(known, one, key=_knowledge)
            found[one.uid, one.attempt] = replace(most, model=most.model or known.model or one.model)
    return found


def _knowledge(one: Attempt) -> tuple[bool, int, int, bool, bool, str]:
    began = (one.first_step_ms is not None, one.run_ms is not None)
    return (one.end_ms is not None, _step(one.last_step), _step(one.last_saved_ms), *began, repr(one))


def phases(attempts: Mapping[Key, Attempt], steps: Mapping[Key, Sequence[Steps]]) -> dict[Key, Phases]:
    """Phases of each attempt. `steps` are the reports there are, of any ranks in any order."""
    found: dict[Key, Phases] = {}
    for _, group in groupby((attempts[key] for key in sorted(attempts)), key=lambda one: one.uid):
        found |= _of_job(list(group), steps)
    return found


def _of_job(attempts: Sequence[Attempt], steps: Mapping[Key, Sequence[Steps]]) -> dict[Key, Phases]:
    found: dict[Key, Phases] = {}
    kept: int | None = None  # the lowest step that a later attempt began behind; None: there is no later one
    for i in range(len(attempts) - 1, -1, -1):
        one = attempts[i]
        reports = steps.get((one.uid, one.attempt), ())
        after_failure = i > 0 and attempts[i - 1].failed and attempts[i - 1].attempt == one.attempt - 1
        lost, modelled = _lost_from(one, kept, reports)
        found[one.uid, one.attempt] = Phases(_started(one, reports), after_failure, lost, modelled)
        began = _step(one.restored_step)
        kept = began if kept is None else min(kept, began)
    return found


def _step(step: int | None) -> int:
    return _NOTHING if step is None else step


def _started(one: Attempt, reports: Sequence[Steps]) -> int | None:
    """When its first step began; without steps, when its program ran; None: it never did so far."""
    first = (one.restored_step or 0) + 1  # steps may count from 0 or from 1
    firsts = [report.start_ms for report in reports if report.first_step <= first]
    if one.first_step_ms is not None:
        firsts.append(one.first_step_ms)
    return min(firsts, default=one.run_ms)


def _lost_from(one: Attempt, kept: int | None, reports: Sequence[Steps]) -> tuple[int | None, bool]:
    """Since when it worked in vain, and whether that is only modelled."""
    if one.model:
        return None, False  # what it served is served
    if kept is None:
        kept = max(_step(one.last_saved_step), _step(one.restored_step)) if one.failed else _step(one.last_step)
    if not one.failed and _step(one.last_step) <= kept:
        return None, False
    if kept <= _step(one.restored_step):
        return (
            one.allocate_ms,
            one.last_step is None and one.run_ms is not None,
        )  # nothing of it was kept, as far as is known
    return _done(one, kept, reports)


def _done(one: Attempt, step: int, reports: Sequence[Steps]) -> tuple[int, bool]:
    """When it had done that step, and whether that is only modelled."""
    there = [report for report in reports if report.first_step <= step <= report.last_step]
    if there:
        return max(_done_within(report, step) for report in there), False
    bounds = [report.start_ms for report in reports if report.first_step > step]
    if one.last_saved_ms is not None and one.last_saved_step == step:
        bounds.append(one.last_saved_ms)
    after = [report.end_ms for report in reports if report.last_step < step]
    earliest = max([one.allocate_ms, *after])
    return max(earliest, min(bounds, default=earliest)), True


def _done_within(report: Steps, step: int) -> int:
    """Steps of one report take equally long."""
    steps = report.last_step - report.first_step + 1
    return report.start_ms + (report.end_ms - report.start_ms) * (step - report.first_step + 1) // steps
