"""Ranks that agree: what one of them meets, all of them hear, before a deadline."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from whaleflux.sdk.errors import CheckpointError, RankSilent

T = TypeVar("T")


class Agreement:
    """A group of its own, since saves run in a thread beside the collectives of the training. One rank: no group.

    Every call is a collective. A failure of one rank never keeps another one waiting: it takes part all the same and says
    what went wrong. A rank that says nothing at all ends the wait of the others after `timeout_s`.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.group = self._new_group()

    def renew(self) -> None:
        """After a rank fell silent: what is left in the old group's connections must not be taken for something new.

        Raises RankSilent when not all ranks come.
        """
        self._together(lambda: setattr(self, "group", self._new_group()))

    def _new_group(self) -> Any:
        return dist.new_group(backend="gloo", timeout=self._timeout) if self.world_size > 1 else None

    def ask(self, answer: Callable[[], T], failure: type[CheckpointError]) -> T:
        """Rank 0 answers, all ranks get its answer. Raises `failure` on all ranks when it cannot."""
        box: list[Any] = [None, ""]
        if self.rank == 0:
            try:
                box[0] = answer()
            except Exception as error:
                box[1] = _said(error)
        if self.group is not None:
            self._together(lambda: dist.broadcast_object_list(box, src=0, group=self.group))
        if box[1]:
            raise failure(box[1])
        found: T = box[0]
        return found

    def each(self, act: Callable[[], T], failure: type[CheckpointError]) -> T:
        """Each rank acts, and gets its own result once all have one. Raises `failure` on all ranks when one cannot."""
        result: T | None = None
        said = ""
        try:
            result = act()
        except Exception as error:
            said = _said(error)
        failed = [f"rank {rank}: {why}" for rank, why in enumerate(self.gather(said)) if why]
        if failed:
            raise failure("; ".join(failed[:3]) + (f" and {len(failed) - 3} more ranks" if len(failed) > 3 else ""))
        return result  # type: ignore[return-value]  # no failure: it was set

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in order of rank."""
        if self.group is None:
            return [mine]
        everybody: list[Any] = [None] * self.world_size
        self._together(lambda: dist.all_gather_object(everybody, mine, group=self.group))
        return everybody

    def _together(self, collective: Callable[[], None]) -> None:
        try:
            collective()
        except RuntimeError as error:
            limit_s = self._timeout.total_seconds()
            raise RankSilent(f"a rank said nothing within {limit_s:g} s, or is gone: {error}") from error


def _said(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"
