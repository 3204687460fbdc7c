"""Losses that are told of without waiting for a GPU."""

from __future__ import annotations

import torch

from whaleflux.sdk.keeper import Loss


class Losses:
    """Losses that may still be on their way from a GPU.

    Page-locked memory is taken once: CUDA may wait for all of the GPU's work when it is asked for more. Who reads a loss more than
    `_SLOTS` steps late gets a RuntimeError: a later one lies there.
    """

    _SLOTS = 64

    def __init__(self) -> None:
        self._slots: torch.Tensor | None = None
        self._count = 0

    def later(self, loss: float | torch.Tensor) -> Loss:
        """The value, to be read by whoever wants it; one on a GPU is copied beside what the GPU does."""
        if not isinstance(loss, torch.Tensor) or not loss.is_cuda:
            value = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
            return lambda: value
        if self._slots is None:
            self._slots = torch.empty(self._SLOTS, dtype=torch.float64, pin_memory=True)
        number, self._count = self._count, self._count + 1
        host = self._slots[number % self._SLOTS]
        host.copy_(loss.detach().reshape(()).to(torch.float64), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> float:
            copied.synchronize()
            value = float(host)
            if self._count - number > self._SLOTS:
                raise RuntimeError(f"{self._count - number - 1} losses came since, and {self._SLOTS} are kept")
            return value

        return read
