"""A node whose ranks are slower than the others of their job, in more than one job: all of them wait for it in every step.

A rank's own time is its step without communication, in which it waits for others. What the job's slowest node takes longer than the next slow
one, or than the job's median rank, is waited for by everybody else: so all slow nodes of a job together never promise more than slowest - median.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from whaleflux_console.core.facts import WHOLE_PPM
from whaleflux_console.core.money import split
from whaleflux_console.core.recommend.evidence import Pace, Part, Window, share_ppm, summed
from whaleflux_console.core.recommend.recommendation import Kind, Level, Recommendation
from whaleflux_console.core.rows import CostClass

LEAST_JOBS = 2  # one job alone may be uneven by itself
WAITING = (
    CostClass.COMM_IN_NODE,
    CostClass.COMM_AVOIDABLE,
    CostClass.COMM_STRUCTURAL,
)  # what waiting for others is billed as


@dataclass(frozen=True, slots=True)
class _Waited:
    """What others of a job paid while they waited for the node."""

    job: str
    micros: int
    bill_micros: int  # in the hours in which it was slow


def find(window: Window) -> Iterator[Recommendation]:
    """Every node that was the slow one in two jobs, less what one more start of the jobs costs that are still on it."""
    paid = {spent.subject: spent for spent in (*window.jobs, *window.others)}
    for node, waited in sorted(_by_node(window.paces).items()):
        jobs = [one for one in waited if one.job in paid and one.micros > 0]
        if len(jobs) >= LEAST_JOBS:
            restarts = {spent.subject: spent.whole.of(CostClass.STARTUP) for spent in window.jobs}
            spread = {one.job: _within(paid[one.job].whole, one.micros - restarts.get(one.job, 0)) for one in jobs}
            if any(sum(saved.values()) for saved in spread.values()):
                yield _said(node, jobs, spread, {one.job: paid[one.job].whole for one in jobs})


def _said(
    node: str, jobs: Sequence[_Waited], spread: Mapping[str, Mapping[CostClass, int]], paid: Mapping[str, Part]
) -> Recommendation:
    whole = summed(paid.values())
    micros, bill = (sum(column) for column in zip(*((one.micros, one.bill_micros) for one in jobs), strict=True))
    share = share_ppm(micros, bill)
    lowest = min(share_ppm(one.micros, one.bill_micros) for one in jobs)
    return Recommendation(
        Kind.SLOW_NODE,
        node,
        f"{len(jobs)} jobs waited for its ranks for {share / 10_000:.1f} % of their time; move them away and have it looked at",
        f"whaleflux drain {node}",
        {kind: sum(saved[kind] for saved in spread.values()) for kind in WAITING},
        min(WHOLE_PPM, lowest * WHOLE_PPM // share) if share else 0,
        Level.MEDIUM,  # its GPUs are missing until it is mended
        Level.MEDIUM,
        whole.bill_micros,
        {kind: whole.of(kind) for kind in WAITING},
        0,
        spread=spread,
    )


def _within(whole: Part, micros: int) -> dict[CostClass, int]:
    """So much of what the job paid for waiting, of each class in proportion, at most all of it."""
    paid = [whole.of(kind) for kind in WAITING]
    micros = max(0, min(micros, sum(paid)))
    return dict(zip(WAITING, split(micros, paid) if micros else [0] * len(paid), strict=True))


def _by_node(paces: Iterable[Pace]) -> Mapping[str, list[_Waited]]:
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    at_once: dict[tuple[str, str, int], list[Pace]] = defaultdict(list)
    for pace in paces:
        at_once[pace.job, pace.uid, pace.hour_ms].append(pace)
    for (job, _, _), slow in at_once.items():
        slow.sort(key=lambda pace: (-pace.own_us, pace.node))
        for pace, faster_us in zip(slow, [*(each.own_us for each in slow[1:]), slow[-1].median_us], strict=True):
            late_us = min(pace.step_us, max(0, pace.own_us - max(faster_us, pace.median_us)))
            found[pace.node, job].append((pace.bill_micros * late_us // max(1, pace.step_us), pace.bill_micros))
    by_node: dict[str, list[_Waited]] = defaultdict(list)
    for (node, job), hours in sorted(found.items()):
        by_node[node].append(_Waited(job, *(sum(column) for column in zip(*hours, strict=True))))
    return by_node
