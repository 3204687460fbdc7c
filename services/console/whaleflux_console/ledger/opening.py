"""Opening the ledger as its leader: what the head names, what goes on behind it, and what to do when head and folder disagree."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from whaleflux import names
from whaleflux.store.api import Store
from whaleflux.store.election import Leader
from whaleflux_console.ledger import chain, manifest
from whaleflux_console.ledger.damage import Damaged, OtherFolder
from whaleflux_console.ledger.folder import Absent, Folder
from whaleflux_console.ledger.head import Head, read_head, swap_head
from whaleflux_console.ledger.manifest import Checkpoint, Named, State
from whaleflux_console.ledger.writer import Writer

log = logging.getLogger(__name__)

MARKER = "folder"  # its content tells this folder from every other; a volume that is not mounted has none
_NOTHING = Named("", "")


@dataclass(frozen=True, slots=True)
class Opened:
    """`notes` say what was not as it was left."""

    writer: Writer
    notes: tuple[str, ...]


async def open_writer(folder: Folder, store: Store, leader: Leader, *, rebuild: bool = False) -> Opened:
    """Raises OtherFolder for a folder that is not the head's, unless `rebuild`: then it begins anew with what is there."""
    head, entry = await read_head(store)
    mark = await asyncio.to_thread(_mark, folder)
    if head and mark != head.folder and not rebuild:
        raise OtherFolder(head.folder, mark)
    if not mark:
        mark = names.ulid()
        await asyncio.to_thread(folder.write, MARKER, mark.encode())
    state, start, notes = await asyncio.to_thread(_read, folder, head if head and head.folder == mark else None)
    found = Head(state.number, state.at, start, mark)
    if head != found:
        entry = await swap_head(store, leader, found, entry)
    for note in notes:
        log.warning("ledger: %s", note)
    writer = Writer(folder, store, leader, state, found, entry)
    writer.knows(await asyncio.to_thread(_checkpoint, folder, start))
    return Opened(writer, notes)


def _mark(folder: Folder) -> str:
    try:
        return folder.read(MARKER).decode()
    except Absent:
        return ""


def _read(folder: Folder, head: Head | None) -> tuple[State, Named, tuple[str, ...]]:
    if head is None or head.number == 0:
        state, start = chain.newest_in(folder)
        found = f"no head in the store that names any: taken up at manifest {state.number} of the folder"
        return state, start, (found,) if state.number else ()
    try:
        state = chain.load(folder, head)
    except Damaged as damage:
        state, start = chain.newest_in(folder)
        return state, start, (_instead(head.number, state.number, damage),)
    end = chain.continuation(folder, state.at, state.number)
    went_on = chain.advance(folder, state, end)
    note = f"manifests {head.number + 1} to {state.number} go on from the head, which did not name them: taken up"
    return state, head.checkpoint, (note,) if went_on else ()


def _instead(headed: int, found: int, damage: Damaged) -> str:
    if found > headed:
        return f"the head in the store (manifest {headed}) is older than the folder: went on with manifest {found}"
    return (
        f"{damage.path} {damage.what}: went back from manifest {headed} to {found}, and what came since is read again"
    )


def _checkpoint(folder: Folder, start: Named) -> Checkpoint | None:
    return chain.proven(folder, start, manifest.checkpoint_from) if start != _NOTHING else None
