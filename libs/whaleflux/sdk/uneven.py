"""Which samples each rank trains in each step, where ranks take different numbers of them. Pure: no torch, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from whaleflux.planning.whole_shares import dealt

Position = tuple[int, int]  # epoch, step in it: compared in this order


@dataclass(frozen=True, slots=True)
class Epoch:
    """How a data set's samples make global batches: `batch` samples a step, each sample in exactly one step.

    A rest that gives every rank a sample is a step of its own, a smaller one is added to the last step; `drop_last` leaves it out.
    """

    samples: int
    batch: int
    ranks: int
    drop_last: bool = False

    @property
    def steps(self) -> int:
        whole, rest = divmod(self.samples, self.batch)
        more = rest >= self.ranks and not self.drop_last
        return whole + more

    def span(self, step: int) -> range:
        """Positions of a step's samples in the epoch's order."""
        begin = step * self.batch
        if step < self.steps - 1 or self.drop_last:
            return range(begin, begin + self.batch)
        return range(begin, self.samples)

    @property
    def largest(self) -> int:
        """Samples of the largest step that can be."""
        return self.batch if self.drop_last else self.batch + self.ranks - 1


def part_of(span: range, shares: Sequence[int], rank: int) -> range:
    """A rank's part of a step's samples: parts follow one another in order of rank, so that together they are the span whatever the shares."""
    before = sum(shares[:rank])
    return span[before : before + shares[rank]]


def shares_of(size: int, shares: Sequence[int], most: Sequence[int]) -> tuple[int, ...]:
    """A step of another size, dealt out as `shares` are. Everybody gets a sample."""
    if size == sum(shares):
        return tuple(shares)
    return dealt(size, [1.0 / share for share in shares], [1] * len(shares), most)


class Timeline:
    """Which shares hold from which step on: batches are drawn ahead of the training, so a change begins behind what anybody has drawn."""

    def __init__(self, shares: Sequence[int]) -> None:
        self._changes: list[tuple[Position, tuple[int, ...]]] = [((0, 0), tuple(shares))]

    def at(self, position: Position) -> tuple[int, ...]:
        """Of a step."""
        held = [shares for since, shares in self._changes if since <= position]
        return held[-1] if held else self._changes[0][1]

    @property
    def newest(self) -> tuple[int, ...]:
        return self._changes[-1][1]

    def change(self, since: Position, shares: Sequence[int], trained: Position) -> None:
        """From a step on. What held before `trained` is forgotten."""
        now = (trained, self.at(trained))
        later = [change for change in self._changes if trained < change[0] < since]
        self._changes = [now, *later, (since, tuple(shares))]

    def restart(self, shares: Sequence[int] | None = None) -> None:
        """From here on these (the newest), wherever the training goes."""
        self._changes = [((0, 0), tuple(shares or self.newest))]
