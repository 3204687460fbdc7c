"""What to do about files that are gone or damaged: nothing is skipped silently, and nothing that is only out of reach is given up.

Reports are read from the stream again, rows and roll-ups are made again of what they were made of, facts are asked of their owners again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from whaleflux_console.ledger import manifest
from whaleflux_console.ledger.chain import proven_bytes
from whaleflux_console.ledger.damage import Damaged
from whaleflux_console.ledger.folder import Absent, Folder
from whaleflux_console.ledger.manifest import DAY_MS, File, Kind, State, day_of

log = logging.getLogger(__name__)

ASIDE = "aside"
LOOKED_AT_DAYS = 3  # at each start: the newest, where a lost volume or a copy that is too old shows


@dataclass(frozen=True, slots=True)
class Recovery:
    """`files` leave the ledger. `again`: stretches of the stream to read once more. `tell`: hours whose facts their owners have to tell again."""

    files: tuple[File, ...] = ()
    again: tuple[tuple[int, int], ...] = ()
    tell: tuple[int, ...] = ()


def damages(folder: Folder, files: Iterable[File]) -> tuple[Damaged, ...]:
    """Reads them all. Raises Unavailable when one can't be read."""
    found = []
    for file in files:
        try:
            proven_bytes(folder, file.path, file.sha256)
        except Damaged as damage:
            found.append(damage)
    return tuple(found)


def gone(folder: Folder, state: State) -> tuple[Damaged, ...]:
    """Files of the newest days that their folders do not have, or of another size; reads none."""
    newest_ms = day_of(state.watermark_ms)
    days = range(max(0, newest_ms - (LOOKED_AT_DAYS - 1) * DAY_MS), newest_ms + 2 * DAY_MS, DAY_MS)
    found = []
    for day_ms in days:
        if files := state.of_day(day_ms):
            date = manifest.date(day_ms)
            there = {each.path: each.bytes for kind in manifest.DATA for each in folder.list(f"{kind}/date={date}")}
            found += [_missing(file, there.get(file.path)) for file in files if there.get(file.path) != file.bytes]
    return tuple(found)


def _missing(file: File, size: int | None) -> Damaged:
    return Damaged(file.path, "is gone" if size is None else f"has {size} bytes instead of {file.bytes}")


def plan(state: State, found: Sequence[Damaged]) -> Recovery:
    """Pure."""
    files = [state.files[damage.path] for damage in found if damage.path in state.files]
    reports = [file for file in files if file.kind in {Kind.RAW, Kind.STEPS}]
    # All files of one append are read again together: so no report is there twice.
    stretches = {(file.first, file.last) for file in reports}
    together = [file for file in state.files.values() if stretches and (file.first, file.last) in stretches]
    tell = tuple(sorted({file.start_ms for file in files if file.kind is Kind.FACTS}))
    leaving = {file.path: file for file in (*files, *together)}
    return Recovery(tuple(leaving.values()), joined((*state.position.again, *stretches)), tell)


def joined(stretches: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """In order, without overlaps, neighbours as one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(stretches):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def set_aside(folder: Folder, found: Sequence[Damaged]) -> None:
    """Copies what is left of damaged files, for people to look at."""
    for damage in found:
        try:
            folder.write(f"{ASIDE}/{damage.path}", folder.read(damage.path))
        except Absent:
            continue
        log.warning("ledger: %s %s; set aside", damage.path, damage.what)


def strays(folder: Folder, state: State, by: str) -> list[str]:
    """Data files that earlier leaderships than `by` wrote and no manifest names. Lists the whole folder; a later leadership's are not among them."""
    found = [each.path for kind in manifest.DATA for each in folder.list(kind)]
    return [path for path in found if path not in state.files and _is_earlier(manifest.leadership_of(path), by)]


def _is_earlier(leadership: int | None, by: str) -> bool:
    return leadership is not None and leadership < int(by, 16)
