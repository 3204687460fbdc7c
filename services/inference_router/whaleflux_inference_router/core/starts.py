"""What the starts of replicas take, as their jobs' phases tell it: how fast weights come, how long an engine needs. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_S = 0.5  # a pull that was seen for less says nothing of its rate


@dataclass(slots=True)
class Start:
    """One start that is watched from its beginning. `peer`: the site had the weights already."""

    peer: bool
    looked: tuple[float, int] | None = None  # at the pull last: when (monotonic), and how many bytes were there
    pulled_s: float = 0.0
    pulled_bytes: float = 0.0
    engine_at_s: float | None = None

    def pulls(self, now_s: float, done_bytes: int, bytes_per_s: float) -> None:
        """So many bytes of the weights are there, and they come at this rate; what other copies on the node gave is in the first alone."""
        then_s, before = self.looked or (now_s, done_bytes)
        self.looked = now_s, done_bytes
        stands = bool(self.pulled_bytes) and done_bytes == before
        if bytes_per_s or stands:
            self.pulled_s += now_s - then_s
            self.pulled_bytes += bytes_per_s * (now_s - then_s)

    def runs(self, now_s: float) -> None:
        """The engine's process runs."""
        self.engine_at_s = self.engine_at_s if self.engine_at_s is not None else now_s

    @property
    def bytes_per_s(self) -> float:
        """0: not known."""
        return self.pulled_bytes / self.pulled_s if self.pulled_s >= LEAST_S else 0.0

    def engine_s(self, now_s: float) -> float:
        """From the process to its first token; 0: not known."""
        return 0.0 if self.engine_at_s is None else now_s - self.engine_at_s
