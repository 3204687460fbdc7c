"""What the starts of replicas take, as their jobs' phases tell it: how fast weights come, how long an engine needs. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_S = 0.5  # a pull that was seen for less says nothing of its rate


@dataclass(slots=True)
class Start:
    """One start that is watched from its beginning. `peer`: the site had the weights already."""

    peer: bool
    pull_from: tuple[float, float] | None = None  # when (monotonic), and how many bytes were there
    pull_to: tuple[float, float] | None = None
    engine_at_s: float | None = None

    def pulls(self, now_s: float, done_bytes: float) -> None:
        """So many bytes of the weights are there."""
        self.pull_from = self.pull_from or (now_s, done_bytes)
        if self.pull_to is None or done_bytes > self.pull_to[1]:
            self.pull_to = now_s, done_bytes

    def runs(self, now_s: float) -> None:
        """The engine's process runs."""
        self.engine_at_s = self.engine_at_s if self.engine_at_s is not None else now_s

    @property
    def bytes_per_s(self) -> float:
        """0: not known."""
        if self.pull_from is None or self.pull_to is None or self.pull_to[0] - self.pull_from[0] < LEAST_S:
            return 0.0
        return (self.pull_to[1] - self.pull_from[1]) / (self.pull_to[0] - self.pull_from[0])

    def engine_s(self, now_s: float) -> float:
        """From the process to its first token; 0: not known."""
        return 0.0 if self.engine_at_s is None else now_s - self.engine_at_s
