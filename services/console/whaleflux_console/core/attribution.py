"""What each device-millisecond that was held went into.

The first of these that applies: unavailable, lost, startup, allocated idle, what steps say, unknown; what nobody held is decided in `bill`.
What no signal tells is unknown, and nothing else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median_low

from whaleflux_console.core.facts import Attempt, Facts, Steps
from whaleflux_console.core.intervals import disjoint
from whaleflux_console.core.lost_work import Key, Phases, newest, phases
from whaleflux_console.core.rows import CostClass
from whaleflux_console.core.signals import Counters
from whaleflux_console.core.step_split import HOST, Parts, Said, Split, at_least, bounded, classify, of_report

SILENCE_MS = 60_000  # no step for so long, and for so many usual steps, is idle
SILENCE_STEPS = 10


class Attribution:
    """Everything that is known of work, by device and attempt. Building it costs once over what the facts hold."""

    def __init__(self, facts: Facts) -> None:
        self._attempts = newest(facts.attempts)
        reports, by_attempt = _unique_reports(facts.steps)
        self._phases = phases(self._attempts, by_attempt)
        devices: dict[Key, set[str]] = defaultdict(set)
        for held in facts.holdings:
            devices[held.uid, held.attempt].add(held.device)
        self._alone = {key for key, names in devices.items() if len(names) == 1}
        samples = defaultdict(list)
        for sample in facts.samples:
            samples[sample.device].append(sample)
        self._samples = samples
        self._counters: dict[str, Counters] = {}
        self._reports = reports
        self._working: dict[tuple[str, Key], Working] = {}

    def attempt(self, key: Key) -> Attempt | None:
        """The attempt, where its record is known."""
        return self._attempts.get(key)

    def of(self, device: str, key: Key, start_ms: int, end_ms: int) -> Split:
        """What the device did for that attempt within [start_ms, end_ms), which the attempt held it for."""
        found = Split()
        attempt = self._attempts.get(key)
        if attempt is None:
            found.unknown(end_ms - start_ms)
            return found
        began, ended = _outer(self._phases[key], start_ms, end_ms, found)
        if began < ended:
            self._work(device, key, attempt).add(began, ended, found)
        return found

    def _work(self, device: str, key: Key, attempt: Attempt) -> Working:
        found = self._working.get((device, key))
        if found is None:
            counters = self._counters.get(device)
            if counters is None:
                counters = self._counters[device] = Counters(self._samples.get(device, ()))
            reports = self._reports.get((device, key), ())
            found = self._working[device, key] = Working(attempt, reports, counters, alone=key in self._alone)
        return found


def _unique_reports(steps: Iterable[Steps]) -> tuple[dict[tuple[str, Key], list[Steps]], dict[Key, list[Steps]]]:
    """By device and attempt, and by attempt; what a rank said of the same steps counts once."""
    unique: dict[tuple[str, int, int, int, int], Steps] = {}
    for one in steps:
        key = (one.uid, one.attempt, one.rank, one.first_step, one.last_step)
        known = unique.setdefault(key, one)
        if known != one:
            unique[key] = min(known, one, key=repr)
    by_device: dict[tuple[str, Key], list[Steps]] = defaultdict(list)
    by_attempt: dict[Key, list[Steps]] = defaultdict(list)
    for one in unique.values():
        by_device[one.device, (one.uid, one.attempt)].append(one)
        by_attempt[one.uid, one.attempt].append(one)
    return by_device, by_attempt


def _outer(times: Phases, start_ms: int, end_ms: int, into: Split) -> tuple[int, int]:
    """Adds what is lost and what is startup; the interval between in which it worked."""
    ended = end_ms
    if times.lost_from_ms is not None:
        ended = min(end_ms, max(start_ms, times.lost_from_ms))
        into.add(CostClass.LOST, end_ms - ended)
        into.modelled = times.lost_is_modelled and ended < end_ms
    started = ended if times.started_ms is None else min(ended, max(start_ms, times.started_ms))
    into.add(CostClass.LOST if times.start_is_lost else CostClass.STARTUP, started - start_ms)
    return started, ended


class Working:
    """What one device did for one attempt while that worked."""

    def __init__(self, attempt: Attempt, reports: Sequence[Steps], counters: Counters, *, alone: bool) -> None:
        self._attempt, self._counters, self._alone = attempt, counters, alone
        self._reports = [(start, end, one, self._said(one)) for start, end, one in disjoint(reports)]
        self._ends = [end for _, end, _, _ in self._reports]
        self._usual_rest_ms = _usual(
            [(end - start - sum(p or 0 for p in said)) // _count(one) for start, end, one, said in self._reports]
        )
        usual_ms = _usual([(end - start) // _count(one) for start, end, one, _ in self._reports])
        self._silence_ms = max(SILENCE_MS, SILENCE_STEPS * usual_ms)

    def _said(self, report: Steps) -> Said:
        return of_report(report, alone=self._alone, cross_node=self._attempt.cross_node)

    def add(self, start_ms: int, end_ms: int, into: Split) -> None:
        """Adds what it did within [start_ms, end_ms)."""
        groups: dict[tuple[bool, ...], Parts] = defaultdict(Parts)
        at = start_ms
        for i in range(bisect_right(self._ends, start_ms), len(self._reports)):
            start, end, report, said = self._reports[i]
            if start >= end_ms:
                break
            if start > at:
                self._silent(at, start, i, into)
                at = start
            self._report(at, min(end, end_ms), report, said, groups)
            at = min(end, end_ms)
        if at < end_ms:
            self._silent(at, end_ms, bisect_right(self._ends, at), into)
        for kinds, parts in groups.items():
            classify(parts, kinds, self._attempt, alone=self._alone, into=into)

    def _report(self, start: int, end: int, report: Steps, said: Said, groups: dict[tuple[bool, ...], Parts]) -> None:
        whole, ms = report.end_ms - report.start_ms, end - start
        kinds = tuple(part is not None for part in said)
        parts = groups[kinds]
        for i, part in enumerate(bounded(said, whole, ms)):
            parts.said_ms[i] += part
        parts.whole_ms += ms
        parts.steps += _count(report) if ms == whole else _count(report) * ms // whole
        if not all(kinds) or (self._attempt.plan is None and not self._alone):
            parts.tensor_ms += self._counters.tensor_ms(start, end)
        if not kinds[HOST]:
            seen_ms, ran_ms = self._counters.ran_ms(start, end)
            parts.seen_ms += seen_ms
            parts.ran_ms += ran_ms
        more = whole - sum(part or 0 for part in said) - _count(report) * self._usual_rest_ms
        if more > self._silence_ms and all(kind for place, kind in enumerate(kinds) if place != HOST):
            parts.idle_ms += min(more * ms // whole, ms - self._counters.busy_ms(start, end))

    def _silent(self, start: int, end: int, following: int, into: Split) -> None:
        """Time without report, before the one at place `following`: idle where no step is missing or counters say so, else what counters tell."""
        idle = self._idle_between(following, start, end)
        if not idle:
            idle = self._counters.idle_ms(start, end)
        into.add(CostClass.ALLOCATED_IDLE, idle)
        into.measured = into.measured or idle > 0
        at_least(
            min(end - start - idle, self._counters.tensor_ms(start, end)), end - start - idle, self._attempt.plan, into
        )

    def _idle_between(self, following: int, start: int, end: int) -> int:
        """Of a silence in which no step was done, and which is far longer than steps take: what counters do not show to be busy."""
        if not 0 < following < len(self._reports):
            return 0
        _, before, last, _ = self._reports[following - 1]
        after, _, first, _ = self._reports[following]
        if first.first_step != last.last_step + 1 or first.rank != last.rank or after - before <= self._silence_ms:
            return 0
        return max(0, end - start - self._counters.busy_ms(start, end))


def _count(report: Steps) -> int:
    return max(1, report.last_step - report.first_step + 1)


def _usual(times: Sequence[int]) -> int:
    return max(0, median_low(times)) if times else 0
