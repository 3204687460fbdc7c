"""Batches of a loader, one pass over the data after another, and where in them a training stands."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from whaleflux.sdk import generators
from whaleflux.sdk.errors import CheckpointError, WorldChanged
from whaleflux.sdk.state import Stateful

log = logging.getLogger(__name__)
B = TypeVar("B")
# "pass", "batches" drawn in it, "generators" at its beginning, "at_once": samples of a batch of all ranks
Position = dict[str, Any]


def beginning() -> Position:
    """Where every training starts."""
    return {"pass": 0, "batches": 0, "generators": None}


class Passes(Generic[B]):
    """An endless iterator; `position` is what a later run needs to go on behind the last batch given.

    A loader that keeps its own position (`data`) is only asked for more. Any other one is read again from the beginning of the
    pass, with the random generators as they were then, so that it gives the same batches: those already used are skipped.
    """

    def __init__(self, loader: Iterable[B], data: Stateful | None, start: Position, fresh: Any = None) -> None:
        """`fresh`: the state of `data` before anything was read or restored."""
        self._loader, self._data, self._fresh = loader, data, fresh
        self._number, self._given = int(start["pass"]), int(start["batches"])
        self._generators = start["generators"]
        self._batches: Iterator[B] | None = None

    @property
    def position(self) -> Position:
        """Where it stands; a dictionary that can be saved."""
        return {
            "pass": self._number, "batches": self._given, "generators": self._generators, "at_once": _at_once(self._loader)
        }  # fmt: skip

    @property
    def shares_out(self) -> bool:
        """Whether another number of ranks can go on from here: its sampler deals out one order, or nothing of the pass is used."""
        return self._given == 0 or _replicas(self._loader) > 0

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        if self._batches is None:
            self._batches = self._resumed()
        try:
            batch = next(self._batches)
        except StopIteration:
            batch = self._next_pass()
        self._given += 1
        return batch

    def _resumed(self) -> Iterator[B]:
        now = generators.capture()
        if self._generators is not None and self._data is None:
            generators.apply(self._generators)
        batches = self._begin()
        if self._given == 0 or self._data is not None:
            return batches
        log.info("reading over %d batches of pass %d that were used before", self._given, self._number)
        for _ in range(self._given):
            next(batches, None)
        generators.apply(now)
        return batches

    def _begin(self) -> Iterator[B]:
        self._generators = generators.capture() if self._data is None else None
        for part in _parts(self._loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._number)
        return iter(self._loader)

    def _next_pass(self) -> B:
        if self._given == 0:
            raise CheckpointError(f"{_name(self._loader)} gives no batch at all: is its data set empty?")
        self._number, self._given = self._number + 1, 0
        self._batches = self._begin()
        for batch in self._batches:
            return batch
        if self._data is not None:  # it stays at its end: back to where it began
            self._data.load_state_dict(self._fresh)
            self._batches = self._begin()
            for batch in self._batches:
                return batch
        raise CheckpointError(
            f"{_name(self._loader)} gives no batch in pass {self._number + 1}: it can be read only once. "
            "Give the loader itself instead of an iterator over it, or end at a lower total"
        )


def moved_to_world(start: Position, loader: Iterable[Any], old_world: int, world: int) -> Position:
    """The position for another number of ranks. Raises WorldChanged for a loader that does not share its samples out.

    A sampler that deals out one order to all ranks in turn (torch's DistributedSampler) has used up the beginning of that
    order: as many batches as all ranks have drawn. Each of the new ranks leaves out its share of them. Ranks that share a model draw the
    same batch, and batches may be of another size now: what is drawn at once (`at_once`, samples) counts, where the loader tells.
    """
    before, now = int(start.get("at_once") or 0), _at_once(loader)
    if not (before and now):  # of an older version, or no sampler that tells: ranks are all that is known
        before, now = old_world, world
    used = int(start["batches"]) * before
    if used == 0 or before == now:
        return start
    if not _replicas(loader):
        raise WorldChanged(
            f"{old_world} ranks wrote this checkpoint in the middle of a pass over {_name(loader)}, {world} ranks read it, and "
            "the loader does not tell how it shares its samples out. Use torch's DistributedSampler, or a loader with "
            "load_world_state(states, rank, world_size) as data=; or accept that samples of this pass are seen again or left "
            'out, with Checkpointer(on_world_change="restart_pass"); or run on as many ranks as before'
        )
    share, again = divmod(used, now)
    if again:
        log.warning("%d of the %d samples or batches used in this pass will be seen again", again, used)
    return {**start, "batches": share}


def _replicas(loader: Iterable[Any]) -> int:
    """To how many its sampler deals out one order; 0: nobody knows."""
    return next((int(part.num_replicas) for part in _parts(loader) if hasattr(part, "num_replicas")), 0)


def _at_once(loader: Iterable[Any]) -> int:
    """Samples that all data-parallel ranks draw with a batch each; 0: the loader does not tell."""
    size = getattr(loader, "batch_size", None)
    return _replicas(loader) * size if isinstance(size, int) else 0


def _parts(loader: Iterable[Any]) -> list[Any]:
    """The loader and what it is made of, as far as it is made like torch's."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    parts.append(getattr(loader, "dataset", None))
    return list({id(part): part for part in parts if part is not None}.values())


def _name(loader: Iterable[Any]) -> str:
    return f"the loader ({type(loader).__name__})"
