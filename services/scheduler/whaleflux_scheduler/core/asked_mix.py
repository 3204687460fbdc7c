"""What is asked for lately: kinds of requests with how often they came, half as much for each half-life that passed since. Pure, bounded.

Each job counts once, at its first attempt, which its record says: so a new leader learns the same from the jobs that are there.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from whaleflux.manifests.job_fields import Spec
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.core.placement.fragmentation import Ask, Mix

HALF_LIFE_S = 7 * 86_400.0
MOST_KINDS, MOST_SEEN = 1_024, 20_000
TYPICAL, MOST_TYPICAL = 0.95, 32  # the most frequent kinds that together make up so much, at most so many
USUAL_GPUS = 8  # of a node: what a larger gang asks of each


class AskedMix:
    """`learn` says when `mix` may have changed by enough to matter."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, renew_after: int = 16) -> None:
        self._half_life_s, self._renew_after = half_life_s, renew_after
        self._counts: dict[Ask, tuple[float, float]] = {}  # with when it was counted up to
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._since = 0

    @property
    def kinds(self) -> int:
        """How many are remembered."""
        return len(self._counts)

    def learn(self, job: Job) -> bool:
        """The job as it is stored; one that was never placed tells nothing."""
        first, key = next(job.attempts(), None), job.uid or job.name
        if first is None or not job.spec.gpus or key in self._seen:
            return False
        self._seen[key] = None
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        kind = ask_of(job.spec)
        is_new, self._since = kind not in self._counts, (self._since + 1) % self._renew_after
        self._count(kind, first.allocate_time.timestamp())
        return is_new or not self._since

    def _count(self, kind: Ask, at_s: float) -> None:
        known, then_s = self._counts.get(kind, (0.0, at_s))
        newest_s = max(at_s, then_s)
        self._counts[kind] = (self._faded(known, newest_s - then_s) + self._faded(1.0, newest_s - at_s), newest_s)
        if len(self._counts) > MOST_KINDS:
            for rare in sorted(
                self._counts, key=lambda one: self._faded(self._counts[one][0], newest_s - self._counts[one][1])
            )[: MOST_KINDS // 2]:
                del self._counts[rare]

    def _faded(self, count: float, for_s: float) -> float:
        return count * math.exp2(-max(0.0, for_s) / self._half_life_s)

    def mix(self) -> Mix:
        """The typical kinds; none while nobody asks for shares: whole GPUs alone are packed as well without it."""
        if not any(kind.share_bytes for kind in self._counts):
            return ()
        now_s = max(then_s for _, then_s in self._counts.values())
        counts = {kind: self._faded(count, now_s - then_s) for kind, (count, then_s) in self._counts.items()}
        total, covered, typical = sum(counts.values()), 0.0, list[tuple[Ask, float]]()
        for kind in sorted(counts, key=lambda one: (-counts[one], one))[:MOST_TYPICAL]:
            if covered >= TYPICAL * total:
                break
            covered += counts[kind]
            typical.append((kind, counts[kind]))
        return tuple((kind, count / covered) for kind, count in typical)


def ask_of(spec: Spec) -> Ask:
    """What it asks of one node."""
    ranks = 1 if spec.share_memory_bytes else min(spec.gpus, USUAL_GPUS)
    cpu, memory = ranks * spec.counted_cpu_millicores, ranks * spec.memory_bytes_per_rank
    return Ask(ranks, spec.share_memory_bytes, cpu, memory)
