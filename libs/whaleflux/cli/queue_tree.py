"""Queues as a tree, with what they and those below them hold. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whaleflux import names


@dataclass(frozen=True, slots=True)
class QueueRow:
    """A queue at its level; counts are of GPUs, of its own jobs and of those below it."""

    queue: Any  # whaleflux.v1.Queue
    level: int  # 0: no queue above it
    held: int
    guaranteed: int

    @property
    def borrowed(self) -> int:
        return max(0, self.held - self.guaranteed)

    @property
    def share(self) -> str:
        """What counts when queues take turns, by weight; "-" where the answering replica does not know it."""
        use = self.queue.use if self.queue.HasField("use") else None
        return "-" if use is None else f"{use.fair_share_gpus / (self.queue.weight or 1.0):.1f}"


def rows(queues: Sequence[Any], held: Mapping[str, int]) -> list[QueueRow]:
    """Each queue, then those below it by name. `held`: GPUs by id of the queue whose jobs hold them.

    Those whose parent is not among them stand at the top: a caller may not see all. What the leader counted is taken where it says so.
    """
    known = {queue.name for queue in queues}
    below: dict[str, list[Any]] = {}
    for queue in sorted(queues, key=lambda queue: queue.name):
        below.setdefault(queue.parent if queue.parent in known else "", []).append(queue)
    return [row for queue in below.get("", ()) for row in _rows(queue, below, held, 0)]


def stuck(queues: Sequence[Any]) -> list[str]:
    """Jobs of all of them that can never start under the limits as they are, as far as the leader says so."""
    return [name for queue in sorted(queues, key=lambda queue: queue.name) for name in queue.use.stuck_jobs]


def _rows(queue: Any, below: Mapping[str, Sequence[Any]], held: Mapping[str, int], level: int) -> Iterator[QueueRow]:
    under = [list(_rows(child, below, held, level + 1)) for child in below.get(queue.name, ())]
    direct = [found[0] for found in under]
    holds = held.get(names.last(queue.name), 0) + sum(row.held for row in direct)
    yield QueueRow(
        queue,
        level,
        queue.use.held_gpus if queue.HasField("use") else holds,
        queue.guaranteed_gpus or sum(row.guaranteed for row in direct),
    )
    for found in under:
        yield from found
