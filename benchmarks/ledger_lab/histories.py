"""Random histories of small fleets, as a ledger is told of them: late, twice, with mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

from whaleflux_console.core.facts import (
    HOUR_MS,
    WHOLE_PPM,
    Adjustment,
    Attempt,
    Facts,
    Fragmented,
    Holding,
    Plan,
    Presence,
    PriceKind,
    PriceSpan,
    Sample,
    Steps,
)

START_MS = 490_000 * HOUR_MS  # a whole hour in 2025
CLASSES = ("H200", "RTX-4090")
MIG_PARTS = ((142_857,) * 7, (500_000, 250_000, 125_000), (WHOLE_PPM,), (WHOLE_PPM,), (WHOLE_PPM,))


@dataclass(frozen=True, slots=True)
class History:
    """What happened, over so many hours from START_MS."""

    facts: Facts
    hours: tuple[int, ...]


def history(random: Random) -> History:
    """One history: prices that change and are missing, MIG and fractions, restarts, repeated and overlapping reports, credits, clock steps."""
    hours = random.randint(1, 3)
    end = START_MS + hours * HOUR_MS
    presences = [one for card in range(random.randint(1, 4)) for one in _card(random, card, end)]
    jobs = [_job(random, number, presences, end) for number in range(random.randint(0, 4))]
    facts = Facts(
        presences=tuple(presences),
        holdings=tuple(one for job in jobs for one in job.holdings),
        attempts=tuple(one for job in jobs for one in job.attempts),
        steps=tuple(one for job in jobs for one in _reports(random, job)),
        samples=tuple(_samples(random, presences)),
        fragmented=tuple(
            Fragmented(one.device, *_within(random, one.start_ms, one.end_ms))
            for one in presences
            if random.random() < 0.3
        ),
        prices=tuple(_prices(random, presences, end)),
    )
    return History(facts, tuple(START_MS + i * HOUR_MS for i in range(hours)))


def large_hour(cards: int) -> Facts:
    """An hour of many cards, ten to an attempt, with a report of ten steps and a sample a minute and card."""
    names = [f"GPU-{i:06d}" for i in range(cards)]
    end, minute = START_MS + HOUR_MS, HOUR_MS // 60
    jobs = [(f"queues/q/jobs/j{i // 10}", f"uid-{i // 10}") for i in range(cards)]
    begun = [START_MS + i * minute for i in range(60)]
    return Facts(
        presences=tuple(Presence(n, n, f"sites/s/nodes/n{i // 8}", "H200", WHOLE_PPM, START_MS, end) for i, n in enumerate(names)),
        holdings=tuple(Holding(n, *jobs[i], 1, WHOLE_PPM, START_MS, end - i % 10 * minute) for i, n in enumerate(names)),
        attempts=tuple(
            Attempt(job, uid, 1, "queues/q", "researcher/r", "", START_MS, START_MS, START_MS, None,
                    communication_s=1.0, best_free_communication_s=0.5, cross_node=True, plan=Plan())
            for job, uid in dict.fromkeys(jobs)
        ),
        steps=tuple(
            Steps(jobs[i][1], 1, i % 10, n, at, at + minute, 10 * k + 1, 10 * k + 10, 3_000, 1_000, 0, 6_000, 6_000)
            for i, n in enumerate(names)
            for k, at in enumerate(begun)
        ),
        samples=tuple(Sample(n, at, at + minute, 500_000, 800_000, False, "simulated") for n in names for at in begun),
        prices=tuple(PriceSpan(n, START_MS - 1, end, 3_500_000, PriceKind.ON_DEMAND, "a list") for n in names),
    )  # fmt: skip


def adjustments(random: Random, hours: tuple[int, ...]) -> tuple[Adjustment, ...]:
    """What invoices say over some of the hours: more, or less."""
    return tuple(
        Adjustment(
            f"adjustments/a{number}",
            random.choice([-1, 1]) * random.randint(0, 20_000_000),
            *_within(random, hours[0], hours[-1] + HOUR_MS),
            site=random.choice(["", "a", "b", "nowhere"]),
            gpu_class=random.choice(["", *CLASSES]),
        )
        for number in range(random.randint(0, 3))
    )


def told_otherwise(random: Random, facts: Facts) -> Facts:
    """The same facts in another order, some of them several times."""
    told: dict[str, Any] = {one.name: _again(random, getattr(facts, one.name)) for one in fields(Facts)}
    return Facts(**told)


def _again(random: Random, items: Sequence[Any]) -> tuple[Any, ...]:
    twice = [*items, *(one for one in items if random.random() < 0.5)]
    random.shuffle(twice)
    return tuple(twice)


def _within(random: Random, start: int, end: int) -> tuple[int, int]:
    first, last = sorted((random.randint(start, end), random.randint(start, end)))
    return first, max(last, first + 1)


def _card(random: Random, number: int, end: int) -> Iterator[Presence]:
    """A card, whole or in instances, there for all or part of the time, out of order for a while."""
    card, site = f"GPU-{number}", random.choice("ab")
    node, gpu_class = f"sites/{site}/nodes/n{number // 2}", random.choice(CLASSES)
    start, until = (START_MS, end) if random.random() < 0.6 else _within(random, START_MS, end)
    parts = random.choice(MIG_PARTS)
    for i, part in enumerate(parts):
        device = card if parts == (WHOLE_PPM,) else f"MIG-{number}-{i}"
        there = Presence(card, device, node, gpu_class, part, start, until)
        yield there
        if random.random() < 0.2:
            out = _within(random, start, until)
            yield replace(there, start_ms=out[0], end_ms=out[1], available=False)


def _prices(random: Random, presences: list[Presence], end: int) -> Iterator[PriceSpan]:
    for card in sorted({one.card for one in presences}):
        at = START_MS - random.choice([0, 1, 1_234_567, 30 * HOUR_MS])
        while at < end:
            until = at + random.choice([random.randint(1, HOUR_MS), 100 * HOUR_MS])
            if random.random() < 0.9:
                kind, micros = (
                    random.choice(list(PriceKind)),
                    random.choice([0, 1, 1_199_999, 3_500_000, 9_999_999_999]),
                )
                yield PriceSpan(card, at, until, micros, kind, f"list {random.randint(1, 2)}")
            at = until


@dataclass(frozen=True, slots=True)
class _Job:
    attempts: tuple[Attempt, ...]
    holdings: tuple[Holding, ...]


def _job(random: Random, number: int, presences: list[Presence], end: int) -> _Job:
    """A job with one to three attempts, each behind the one before, on devices that may be another's too."""
    job, uid, queue = f"queues/q{number % 2}/jobs/j{number}", f"uid-{number}", f"queues/q{number % 2}"
    times = sorted(random.randint(START_MS - HOUR_MS, end) for _ in range(6))
    count = random.randint(1, 3)
    attempts: list[Attempt] = []
    holdings: list[Holding] = []
    for i in range(count):
        start, until = times[2 * i], times[2 * i + 1]
        last = i == count - 1
        attempts.append(
            Attempt(
                job,
                uid,
                i + 1,
                queue,
                "researcher/r",
                random.choice(["", "", "models/m"]),
                start,
                run_ms=random.choice([None, start + 20_000]),
                first_step_ms=random.choice([None, start + 60_000]),
                end_ms=None if last and random.random() < 0.5 else until,
                failed=not last or random.random() < 0.3,
                restored_step=random.choice([None, 10 * i]),
                last_step=random.choice([None, 10 * i + 25]),
                last_saved_step=random.choice([None, 10 * i + 10]),
                last_saved_ms=random.choice([None, (start + until) // 2]),
                communication_s=random.choice([None, 0.5]),
                best_communication_s=random.choice([None, 0.2]),
                best_free_communication_s=random.choice([None, 0.3, 0.7]),
                cross_node=random.random() < 0.5,
                plan=random.choice([None, Plan(), Plan(4, 1, 8, 250_000)]),
            )
        )
        devices = random.sample(presences, random.randint(1, len(presences)))
        holdings += [
            Holding(one.device, job, uid, i + 1, random.choice([WHOLE_PPM, 500_000, 250_000, 333_333]), start, until)
            for one in devices
        ]
    return _Job(tuple(attempts), tuple(holdings))


def _reports(random: Random, job: _Job) -> Iterator[Steps]:
    """Reports of ten steps: some lost, some again, some by a clock that stepped, some that claim more than there was."""
    for rank, held in enumerate(job.holdings):
        at, step = held.start_ms + 60_000, 1
        length = random.choice([120_000, 400_000, 1_500_000])
        while at < held.end_ms and random.random() < 0.95:
            until = at + random.randint(length // 2, length)
            if random.random() < 0.85:
                shift = random.choice([0, 0, 0, -90_000, 90_000])
                said = [random.choice([None, 0, random.randint(0, length // 4)]) for _ in range(5)]
                yield Steps(held.uid, held.attempt, rank, held.device, at + shift, until + shift, step, step + 9, *said)
            at, step = until + random.choice([0, 0, 0, 700_000]), step + 10


def _samples(random: Random, presences: list[Presence]) -> Iterator[Sample]:
    for one in presences:
        at = one.start_ms
        while at < one.end_ms and random.random() < 0.97:
            until = at + 150_000
            busy = random.random() < 0.5
            tensor = random.choice([None, 600_000 if busy else 0])
            yield Sample(
                one.device,
                at,
                until,
                tensor,
                random.choice([None, 800_000 if busy else 0]),
                random.choice([None, not busy]),
                "simulated",
            )
            at = until + random.choice([0, 0, 0, 400_000])
