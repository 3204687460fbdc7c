"""Rented machines that come, or are idle, as they are given to who waits before anybody rents. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from whaleflux_scheduler.core.offered import Kind, Offered, Rented, Waiting, fits, gpus_on, machines_for

TAKES_WITHIN_S = 300.0  # an idle machine has the job by then that it fits


class Spare:
    """GPUs of machines that come, or are idle, as they are given to who waits."""

    def __init__(self, rented: Sequence[Rented]) -> None:
        there = [one for one in rented if not one.ending and (one.coming or one.is_idle)]
        awaited = _awaited(there)
        self._free = {one.lease: (one.offer, float(one.offer.gpus)) for one in there if one.offer.kind in awaited}
        self._idle = [one for one in there if one.offer.kind not in awaited]
        self._taken: set[str] = set()

    def is_taken(self, lease: str) -> bool:
        return lease in self._taken

    def passed_by(self, job: Waiting) -> str:
        """A machine on which it could be, and is not, for a reason that is not known here; "": there is none."""
        return next(
            (one.lease for one in self._idle if fits(job, one.offer) and gpus_on(job, one.offer) <= one.offer.gpus), ""
        )

    def part(self, job: Waiting, offer: Offered) -> tuple[str, ...]:
        """Whole machines, of the offer's kind, of a gang that needs more than there are: what is left of one that lost some, or was not all rented."""
        alike = (
            (lease, one) for lease, (one, free) in self._free.items() if one.kind == offer.kind and free >= one.gpus
        )
        return tuple(lease for lease, one in alike if fits(job, one))[: machines_for(job, offer) - 1]

    def keep(self, leases: Iterable[str]) -> None:
        """They are taken, whole."""
        for lease in leases:
            self._free[lease] = self._free[lease][0], 0.0
            self._taken.add(lease)

    def give(self, job: Waiting) -> bool:
        """Whether the job fits on what comes anyway, which is its own from now on."""
        left = {lease: free for lease, (offer, free) in self._free.items() if free > 0 and fits(job, offer)}
        wanted = {lease: gpus_on(job, self._free[lease][0]) for lease in left}
        enough = [lease for lease in left if job.min_nodes <= 1 and left[lease] >= wanted[lease]]
        one = [min(enough, key=lambda lease: (left[lease], lease))] if enough else []
        chosen = one or ([] if job.one_node else self._together(left, wanted, job.min_nodes))
        rest = wanted[chosen[0]] if chosen else 0.0
        for lease in chosen:
            offer, free = self._free[lease]
            taken = min(free, rest)
            rest -= taken
            self._free[lease] = offer, free - taken
            self._taken.add(lease)
        return bool(chosen)

    def _together(self, left: Mapping[str, float], wanted: Mapping[str, float], min_nodes: int) -> list[str]:
        """Machines of one kind that have enough GPUs together."""
        alike = defaultdict[Kind, list[str]](list)
        for lease in sorted(left, key=lambda lease: (-left[lease], lease)):
            found = alike[self._free[lease][0].kind]
            found.append(lease)
            if sum(left[one] for one in found) >= wanted[lease] and len(found) >= min_nodes:
                return found
        return []


def _awaited(there: Iterable[Rented]) -> set[Kind]:
    """Kinds of which one comes, or has been idle for no longer than a start takes: a gang may wait for that one beside those that came before.

    Others are idle while jobs wait that they seemed to fit: they are not for these, and nobody waits for them.
    """
    return {one.offer.kind for one in there if one.coming or (one.idle_s or 0.0) <= TAKES_WITHIN_S}
