"""How long is too long: every time limit of failure detection, in seconds, with its reason."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

HEARTBEAT_S = 0.5  # the interval of agents, and what the defaults below are made for
LONGEST_HEARTBEAT_S = 30.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Limits for agents that send a heartbeat every 0.5 s; `scaled` stretches those that count heartbeats."""

    probe_s: float = 1.25  # silence after which an agent is probed at the latest
    probe_least_s: float = 0.75  # ... and at the earliest: one missing heartbeat means nothing
    suspect_s: float = 1.75  # silence that makes a node suspect: the last heartbeat was up to 0.5 s before the failure
    fence_s: float = 5.0  # silence of agent and ranks that fences it
    restart_s: float = 60.0  # the same, when the agent announced a restart
    slowest_step_s: float = 60.0  # how long a paused agent's slow ranks are waited for at most
    reconnect_s: float = 0.3  # an agent whose stream broke redials within this; else it is under suspicion
    probe_answer_s: float = 1.0  # a probe that is under way is waited for so long after a broken stream
    reprobe_s: float = 0.5  # pause between probes of one node
    grace_s: float = 3.25  # added to the silence of agents that have not yet found a new leader
    pause_s: float = 0.5  # a gap between two ticks from which on the monitor itself was asleep
    together_s: float = 5.0  # silences that begin within this may have one cause
    breaker_window_s: float = 300.0
    breaker_share: float = 0.5  # of the fleet that may be fenced within the window without a person
    breaker_least: int = 2  # nodes that may always be fenced within it

    def scaled(self, interval_s: float) -> Timing:
        """The limits for an agent that sends one every `interval_s` (at least every 0.5 s, at most every 30 s)."""
        factor = min(max(interval_s, HEARTBEAT_S), LONGEST_HEARTBEAT_S) / HEARTBEAT_S
        if factor == 1.0:
            return self
        return replace(
            self,
            probe_s=self.probe_s * factor,
            probe_least_s=self.probe_least_s * factor,
            suspect_s=self.suspect_s * factor,
            fence_s=self.fence_s * factor,
        )


class Arrivals:
    """Times between an agent's heartbeats, and the silence from which on the next one is overdue.

    Overdue is mean + 6 standard deviations of the last 64: for a steady agent a little more than its interval, for one
    behind a jittery link more, always within the limits of `Timing`. What is overdue is probed, not suspected.
    """

    KEPT = 64

    def __init__(self, interval_s: float) -> None:
        self._gaps: deque[float] = deque([interval_s], maxlen=self.KEPT)
        self._sum, self._squares = interval_s, interval_s**2

    def add(self, gap_s: float) -> None:
        """Notes one gap; what a suspicion or a pause of ours stretched does not belong here."""
        if len(self._gaps) == self.KEPT:
            oldest = self._gaps[0]
            self._sum, self._squares = self._sum - oldest, self._squares - oldest**2
        self._gaps.append(gap_s)
        self._sum, self._squares = self._sum + gap_s, self._squares + gap_s**2

    def overdue_s(self, timing: Timing) -> float:
        """Silence in seconds after which a probe is worth its price."""
        count = len(self._gaps)
        mean = self._sum / count
        deviation = math.sqrt(max(0.0, self._squares / count - mean**2))
        return min(max(mean + 6 * deviation, timing.probe_least_s), timing.probe_s)
