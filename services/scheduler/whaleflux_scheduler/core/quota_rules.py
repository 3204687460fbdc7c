"""What queues may say of one another: a tree without cycles, and guarantees that can be kept at every level. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.manifests.values import number
from whaleflux_scheduler.core.model import Queue

MOST_LEVELS = 8
MOST_GPUS = 100_000_000
MOST_DATA_BYTES = 10**18


def check_queue(queue: Queue) -> None:
    """Raises InvalidArgument for a weight, a guarantee or limits that make no sense by themselves."""
    lends = queue.lending_limit_gpus
    found = [
        *number("queue.weight", queue.weight, 0.0, 1e6),
        *number("queue.max_gpus", queue.max_gpus, 0, MOST_GPUS),
        *number("queue.guaranteed_gpus", queue.guaranteed_gpus, 0, MOST_GPUS),
        *number("queue.lending_limit_gpus", lends or 0, 0, MOST_GPUS),
        *number("queue.data_quota_bytes", queue.data_quota_bytes, 0, MOST_DATA_BYTES),
    ]
    if 0 < queue.max_gpus < queue.guaranteed_gpus:
        most = f"is {queue.guaranteed_gpus}, but it may hold at most {queue.max_gpus} GPUs; raise that limit, or lower this"
        found.append(FieldViolation("queue.guaranteed_gpus", most))
    if found:
        raise InvalidArgument(found)


def check_tree(queues: Mapping[str, Queue], changed: str) -> None:
    """Raises InvalidArgument when the queue `changed` may not be as it is among all `queues`, by id."""
    below = _below(queues)
    above = _check_place(queues, changed)
    _check_levels(above, _levels(below, changed))
    for up in above:
        _check_sum(queues, below, names.last(up.name), changed)


def _check_place(queues: Mapping[str, Queue], changed: str) -> list[Queue]:
    """The queue and those above it."""
    queue = queues[changed]
    if queue.parent and queue.parent not in queues:
        raise _violation(
            "parent", f"{names.queue(queue.parent)} does not exist; list what does with: whaleflux queue ls"
        )
    above = list(path(queues, changed))
    if above[-1].parent:  # it came back to one that it had seen
        raise _violation(
            "parent", f"{names.queue(queue.parent)} is below {names.queue(changed)}, or the same; use another"
        )
    return above


def _check_levels(above: Sequence[Queue], below: int) -> None:
    levels = len(above) - 1 + below
    if levels > MOST_LEVELS:
        raise _violation("parent", f"there would be {levels} queues above one another; use at most {MOST_LEVELS}")


def check_all(queues: Mapping[str, Queue]) -> None:
    """The same for all of them, each once; the violations name the queue: queues.ID.FIELD."""
    below = _below(queues)

    def place(id_: str) -> None:
        check_queue(queues[id_])
        _check_levels(_check_place(queues, id_), 1)

    for check in (place, lambda id_: _check_sum(queues, below, id_, id_)):  # sums are of a tree
        for id_ in queues:
            try:
                check(id_)
            except InvalidArgument as wrong:
                fields = [(found.field.removeprefix("queue."), found.description) for found in wrong.violations]
                told = [FieldViolation(f"queues.{id_}.{field}", said) for field, said in fields]
                raise InvalidArgument(told) from None


def _check_sum(queues: Mapping[str, Queue], below: Mapping[str, list[str]], id_: str, changed: str) -> None:
    queue, promised = queues[id_], sum(guaranteed(queues, below, child) for child in below.get(id_, ()))
    own = queue.guaranteed_gpus
    field = "guaranteed_gpus" if queues[changed].guaranteed_gpus else "parent"
    if own and promised > own:
        raise _violation(
            field,
            f"queues below {queue.name} would be guaranteed {promised} GPUs together, and it is guaranteed {own}; lower one of them, or "
            f"raise that with: whaleflux queue set {id_} --guaranteed {promised}",
        )
    if 0 < queue.max_gpus < promised:
        raise _violation(
            field,
            f"queues below {queue.name} would be guaranteed {promised} GPUs together, and it may hold at most {queue.max_gpus}; lower "
            f"one of them, or raise that with: whaleflux queue set {id_} --max-gpus {promised}",
        )


def guaranteed(queues: Mapping[str, Queue], below: Mapping[str, list[str]], id_: str) -> int:
    """GPUs that it is guaranteed: its own number, or what those below it are guaranteed together."""
    return queues[id_].guaranteed_gpus or sum(guaranteed(queues, below, child) for child in below.get(id_, ()))


def children(queues: Mapping[str, Queue], id_: str) -> list[str]:
    """Ids of the queues right below it."""
    return sorted(child for child, queue in queues.items() if queue.parent == id_)


def path(queues: Mapping[str, Queue], id_: str) -> Iterator[Queue]:
    """The queue and those above it, up to one without a parent, or one whose parent was there already."""
    seen: set[str] = set()
    while id_ in queues and id_ not in seen:
        seen.add(id_)
        yield queues[id_]
        id_ = queues[id_].parent


def _below(queues: Mapping[str, Queue]) -> dict[str, list[str]]:
    below: dict[str, list[str]] = {}
    for id_, queue in queues.items():
        below.setdefault(queue.parent, []).append(id_)
    return below


def _levels(below: Mapping[str, list[str]], id_: str) -> int:
    return 1 + max((_levels(below, child) for child in below.get(id_, ())), default=0)


def _violation(field: str, said: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(f"queue.{field}", said))
