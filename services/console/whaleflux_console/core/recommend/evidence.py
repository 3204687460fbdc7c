"""What recommendations are made of: a window of the ledger, by job and by pool of GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from whaleflux_console.core.facts import HOUR_MS, WHOLE_PPM
from whaleflux_console.core.rows import CLASSES, CostClass

MONTH_MS = 730 * HOUR_MS


@dataclass(frozen=True, slots=True)
class Part:
    """What one stretch of the window cost, a day or an hour; `micros` in the order of CLASSES, summing to the bill."""

    gpu_ms: int
    micros: tuple[int, ...]

    def of(self, *kinds: CostClass) -> int:
        return sum(self.micros[CLASSES.index(kind)] for kind in kinds)

    @property
    def bill_micros(self) -> int:
        return sum(self.micros)


def summed(parts: Iterable[Part]) -> Part:
    """All of them as one."""
    found = list(parts)
    return Part(
        sum(one.gpu_ms for one in found), tuple(sum(one.micros[n] for one in found) for n in range(len(CLASSES)))
    )


@dataclass(frozen=True, slots=True)
class Spent:
    """What one subject cost in the window. `cash_ppm`: what of it is of GPUs that are paid by the hour, and can be given back."""

    subject: str  # queues/{queue}/jobs/{job}, or {site}/{gpu class} of what nobody held
    parts: tuple[Part, ...]  # by day of a job, by hour of a pool; those without cost are left out
    cash_ppm: int = 0
    owner: str = ""  # role/name; of a pool empty
    model: str = ""  # models/{model} that the job serves
    gpus: int = 0  # that it holds now
    node_gpus: int = 1  # of a pool: of its largest node

    @property
    def whole(self) -> Part:
        return summed(self.parts)


@dataclass(frozen=True, slots=True)
class Pace:
    """An hour of a run in which the ranks on one node were slower than its median rank. Times are microseconds of a step, means of the hour."""

    hour_ms: int
    job: str  # queues/{queue}/jobs/{job}
    uid: str
    node: str  # sites/{site}/nodes/{node}
    own_us: int  # of the node's ranks, without communication
    median_us: int  # the same of all ranks of the run, the lower of two in the middle
    step_us: int
    bill_micros: int  # of what the run held on other nodes in the hour


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reserved price that is on record."""

    name: str  # prices/{price}
    micros_per_hour: int  # of a GPU
    source: str  # whose figure, and its date


@dataclass(frozen=True, slots=True)
class Rented:
    """GPUs of a site and class that are paid by the hour, as {site}/{class}/on_demand by hour, and what they would cost reserved."""

    spent: Spent
    reserved: Reserved


@dataclass(frozen=True, slots=True)
class Window:
    """[start_ms, end_ms), whole hours that are in the ledger; `jobs` are those that held GPUs at its end, `others` those of `paces` beside them."""

    start_ms: int
    end_ms: int
    jobs: tuple[Spent, ...] = ()
    pools: tuple[Spent, ...] = ()
    others: tuple[Spent, ...] = ()
    paces: tuple[Pace, ...] = ()
    rented: tuple[Rented, ...] = ()
    all_micros: int = 0  # what the whole fleet cost: parts of `rented` may be of `jobs`, too; 0: the sum of all parts

    @property
    def hours(self) -> int:
        return max(1, (self.end_ms - self.start_ms) // HOUR_MS)

    def per_month(self, micros: int) -> int:
        """What an amount of the window is in a month of 730 hours."""
        return micros * MONTH_MS // (self.hours * HOUR_MS)


def share_ppm(part: int, whole: int) -> int:
    """`part` of `whole`, parts per million; of nothing 0."""
    return part * WHOLE_PPM // whole if whole > 0 else 0
