"""Reading the chain of manifests out of the folder: from a head, and what goes on behind it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from whaleflux_console.ledger import manifest
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.folder import Absent, Folder
from whaleflux_console.ledger.head import Head
from whaleflux_console.ledger.manifest import Checkpoint, Delta, Named, State

log = logging.getLogger(__name__)

T = TypeVar("T")
_READERS = 8  # file lists read side by side: an object store takes its time for each
_LONGEST = 10_000  # manifests behind a checkpoint


def proven(folder: Folder, named: Named, read: Callable[[bytes], T]) -> T:
    """A file whose sha256 is known. Raises Damaged for what is gone or is not that, Unavailable when nobody can say."""
    return read(proven_bytes(folder, named.path, named.sha256))


def proven_bytes(folder: Folder, path: str, sha256: str) -> bytes:
    try:
        content = folder.read(path)
    except Absent:
        raise Damaged(path, "is gone") from None
    if manifest.digest(content) != sha256:
        raise Damaged(path, f"is not what was written (sha256 is not {sha256[:12]}...)")
    return content


def load(folder: Folder, head: Head) -> State:
    """Everything that the head names."""
    if head.checkpoint.path:
        state = from_checkpoint(folder, proven(folder, head.checkpoint, manifest.checkpoint_from))
    else:
        state = State()
    advance(folder, state, head.at)
    return state


def from_checkpoint(folder: Folder, checkpoint: Checkpoint) -> State:
    with ThreadPoolExecutor(_READERS) as readers:
        lists = readers.map(lambda named: proven(folder, named, manifest.files_from), checkpoint.days.values())
        return manifest.opened(checkpoint, lists)


def advance(folder: Folder, state: State, to: Named) -> bool:
    """Applies the manifests behind the state up to `to`; whether there are any. Raises Damaged when these are not one chain."""
    steps = behind(folder, state, to)
    for delta, named in steps:
        state.apply(delta, named)
    return bool(steps)


def behind(folder: Folder, state: State, to: Named) -> list[tuple[Delta, Named]]:
    """The manifests behind the state up to `to`, oldest first. Raises Damaged when these are not one chain."""
    steps: list[tuple[Delta, Named]] = []
    at = to
    while at.path != state.at.path:
        delta = proven(folder, at, manifest.delta_from)
        if delta.number <= state.number or len(steps) >= _LONGEST:
            raise Damaged(at.path, f"does not go on from {state.at.path or 'the beginning'}")
        steps.append((delta, at))
        at = Named(delta.previous, delta.previous_sha256)
    return steps[::-1]


def continuation(folder: Folder, at: Named, number: int) -> Named:
    """The end of the longest chain of whole manifests that goes on from `at`; `at` itself: none does.

    What goes on is either a commit whose answer never came, or many that the store forgot when it went back to a backup. Both are whole,
    so both count. Of several, the longest; of equals the one of the latest leadership.
    """
    found = _behind(folder, number)
    children: dict[str, list[tuple[Named, Delta]]] = {}
    for named, delta in found:
        children.setdefault(delta.previous, []).append((named, delta))
    return max(_ends(at, number, children), key=lambda end: (end[0], end[1]))[2]


def _ends(at: Named, number: int, children: dict[str, list[tuple[Named, Delta]]]) -> list[tuple[int, int, Named]]:
    """Every end that can be reached: (number, leadership, manifest)."""
    ends, waiting = [], [(number, 0, at)]
    while waiting:
        number, _, at = end = waiting.pop()
        ends.append(end)
        for named, delta in children.get(at.path, []):
            if delta.number == number + 1 and delta.previous_sha256 == at.sha256:
                waiting.append((delta.number, int(delta.by, 16), named))
    return ends


def _behind(folder: Folder, number: int) -> list[tuple[Named, Delta]]:
    """Manifests in the folder with a higher number; what is no whole manifest is said and left."""
    paths = [found.path for found in folder.list(manifest.FOLDER) if manifest.is_link(found.path)]
    return [read for path in paths if manifest.number_of(path) > number and (read := _whole(folder, path))]


def _whole(folder: Folder, path: str) -> tuple[Named, Delta] | None:
    try:
        content = folder.read(path)
        return Named(path, manifest.digest(content)), manifest.delta_from(content)
    except (Absent, ValueError, KeyError, TypeError) as reason:
        log.warning("the ledger leaves %s alone, which is no manifest: %s", path, reason)
        return None


def newest_in(folder: Folder) -> tuple[State, Named]:
    """What the folder alone tells, and the checkpoint that this begins with (empty: the first manifest): for a store that lost the head."""
    for path in sorted((found.path for found in folder.list(manifest.CHECKPOINTS)), reverse=True):
        try:
            content = folder.read(path)
            state = from_checkpoint(folder, manifest.checkpoint_from(content))
        except (Absent, Damaged, ValueError, KeyError, TypeError) as reason:
            log.warning("the ledger leaves the checkpoint %s alone: %s", path, reason)
            continue
        advance(folder, state, continuation(folder, state.at, state.number))
        return state, Named(path, manifest.digest(content))
    state = State(_highest(folder))
    advance(folder, state, continuation(folder, state.at, state.number))
    return state, Named("", "")


def _highest(folder: Folder) -> int:
    """Above every manifest that cannot be read from its beginning; 0 when the first is there."""
    numbers = [manifest.number_of(found.path) for found in folder.list(manifest.FOLDER)]
    return 0 if not numbers or min(numbers) == 1 else max(numbers)
