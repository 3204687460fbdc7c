"""Which files are the ledger: a chain of small manifests, each of which says what it adds to and takes from the one before.

Pure. A manifest is as large as its change. Every so many of them a checkpoint names one file list per day, of which only those of changed
days are written anew: so neither a commit nor a checkpoint costs more for a longer history, and a restart reads a checkpoint and the few
manifests behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from whaleflux_console.core.facts import HOUR_MS

DAY_MS = 24 * HOUR_MS
FOLDER = "manifest"
LISTS, CHECKPOINTS = f"{FOLDER}/days", f"{FOLDER}/checkpoints"


class Kind(StrEnum):
    """What a file holds; the name of its folder."""

    RAW = "raw"  # samples as agents reported them
    STEPS = "steps"  # steps as ranks reported them
    FACTS = "facts"  # who was there, who held it, attempts, prices
    MINUTES = "minutes"  # samples, rolled up
    WORK = "work"  # steps, rolled up
    PROGRESS = "progress"  # steps, by attempt
    HOURS = "hours"  # ledger rows
    RUNS = "runs"  # what runs served in an hour, and how they ended
    DAYS = "days"  # ledger rows of a day, rolled up


INPUTS = (Kind.RAW, Kind.STEPS, Kind.FACTS)
DATA = tuple(Kind)


@dataclass(frozen=True, slots=True)
class File:
    """One immutable file. `commit` is the manifest that added it; `made_of` the newest one that what it was made of was read from."""

    path: str
    kind: Kind
    start_ms: int  # of its hour, of DAYS its day
    rows: int
    bytes: int
    sha256: str
    commit: int
    version: int = 0
    made_of: int = 0
    first: int = 0  # place in the stream of the first and last report in it
    last: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """How far the stream was read. `id` is that report's, which tells a stream that began anew; `missed` were gone before they were read.

    `again` are stretches before it, first and last, whose files are gone: they are read once more as long as the stream has them.
    """

    sequence: int = 0
    id: str = ""
    taken_ms: int = 0
    missed: int = 0
    again: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """One commit."""

    number: int
    by: str  # leadership that wrote it, in hexadecimal: the later, the greater
    previous: str  # path of the manifest before, empty: the first
    previous_sha256: str
    watermark_ms: int
    position: Position
    added: tuple[File, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"{FOLDER}/{commit_id(self.number, self.by)}.json"


@dataclass(frozen=True, slots=True)
class Named:
    """A file of the manifest's own, by what proves it."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything as of the manifest `at`: per day the list of its files."""

    number: int
    at: Named
    watermark_ms: int
    position: Position
    days: Mapping[str, Named]


def commit_id(number: int, by: str) -> str:
    return f"{number:012}-{by}"


def is_link(path: str) -> bool:
    """Whether it is a manifest of the chain."""
    return path.startswith(f"{FOLDER}/") and path.count("/") == 1


def number_of(path: str) -> int:
    """Of a manifest's or checkpoint's path; 0 when it is none."""
    digits = path.rpartition("/")[2].partition("-")[0]
    return int(digits) if digits.isdigit() and path.endswith(".json") else 0


def leadership_of(path: str) -> int | None:
    """Which leadership wrote a file, by its name; None: none of ours."""
    word = path.rpartition("-")[2].partition(".")[0]
    try:
        return int(word, 16)
    except ValueError:
        return None


def hour_of(instant_ms: int) -> int:
    return instant_ms // HOUR_MS * HOUR_MS


def day_of(instant_ms: int) -> int:
    return instant_ms // DAY_MS * DAY_MS


def date(instant_ms: int) -> str:
    return datetime.fromtimestamp(instant_ms / 1000, UTC).strftime("%Y-%m-%d")


def place(kind: Kind, start_ms: int, stem: str) -> str:
    """The path of a data file; folders are what other engines take as columns."""
    hour = "" if kind is Kind.DAYS else f"hour={start_ms % DAY_MS // HOUR_MS:02}/"
    return f"{kind}/date={date(start_ms)}/{hour}{stem}.parquet"


@dataclass(slots=True)
class State:
    """All files as of one manifest, by path and by what they are of."""

    number: int = 0
    at: Named = Named("", "")
    watermark_ms: int = 0
    position: Position = Position()
    files: dict[str, File] = field(default_factory=dict)
    spans: dict[tuple[Kind, int], dict[str, File]] = field(default_factory=lambda: defaultdict(dict))
    unsettled: set[int] = field(default_factory=set)  # hours of which more is told than their rows are made of
    unrolled: set[int] = field(default_factory=set)  # days whose roll-up is older than one of its hours
    changed_days: set[int] = field(default_factory=set)  # since the last checkpoint

    def of(self, kind: Kind, start_ms: int) -> tuple[File, ...]:
        """Oldest first."""
        return tuple(sorted(self.spans.get((kind, start_ms), {}).values(), key=lambda file: (file.commit, file.path)))

    def newest(self, kind: Kind, start_ms: int) -> File | None:
        """Of files with versions the one that counts."""
        return max(self.spans.get((kind, start_ms), {}).values(), key=lambda file: file.version, default=None)

    def all_files(self, kind: Kind) -> tuple[File, ...]:
        """Every file of a kind, in order of time."""
        found = (file for file in self.files.values() if file.kind is kind)
        return tuple(sorted(found, key=lambda file: (file.start_ms, file.commit)))

    def all_of(self, kind: Kind) -> tuple[File, ...]:
        """The files of a kind that count, in order of time."""
        found = (self.newest(kind, start) for each, start in self.spans if each is kind)
        return tuple(sorted((file for file in found if file), key=lambda file: file.start_ms))

    def told(self, hour_ms: int) -> int:
        """The newest commit that brought something which an hour's rows are made of; 0: none."""
        return max((file.commit for kind in INPUTS for file in self.spans.get((kind, hour_ms), {}).values()), default=0)

    def apply(self, delta: Delta, named: Named) -> None:
        """Takes the next manifest of the chain."""
        for path in delta.removed:
            self._drop(path)
        for file in delta.added:
            self.add(file)
        self.number, self.at = delta.number, named
        self.watermark_ms, self.position = delta.watermark_ms, delta.position

    def add(self, file: File) -> None:
        self.files[file.path] = file
        self.spans[file.kind, file.start_ms][file.path] = file
        self._changed(file)

    def _drop(self, path: str) -> None:
        if (file := self.files.pop(path, None)) is None:
            return
        span = self.spans[file.kind, file.start_ms]
        del span[path]
        if not span:
            del self.spans[file.kind, file.start_ms]
        self._changed(file)

    def _changed(self, file: File) -> None:
        day_ms = day_of(file.start_ms)
        self.changed_days.add(day_ms)
        if file.kind is not Kind.DAYS:
            (self.unsettled.discard if self._is_settled(file.start_ms) else self.unsettled.add)(file.start_ms)
        if file.kind in {Kind.HOURS, Kind.DAYS}:
            (self.unrolled.discard if self.is_rolled(day_ms) else self.unrolled.add)(day_ms)

    def _is_settled(self, hour_ms: int) -> bool:
        """Its rows are made of all that is told of it, and what was reported is rolled up."""
        rows = self.newest(Kind.HOURS, hour_ms)
        if rows is None:
            return self.told(hour_ms) == 0
        if not rows.version:  # those of an hour that is still open, of which nothing new need have been told
            return False
        if self.told(hour_ms) > rows.made_of:
            return False
        rolls = ((Kind.RAW, Kind.MINUTES), (Kind.STEPS, Kind.WORK), (Kind.STEPS, Kind.PROGRESS))
        return all((roll, hour_ms) in self.spans or (kind, hour_ms) not in self.spans for kind, roll in rolls)

    def hours_of_day(self, day_ms: int) -> list[File]:
        """Of each closed hour the file that counts."""
        starts = range(day_ms, day_ms + DAY_MS, HOUR_MS)
        return [file for hour in starts if (file := self.newest(Kind.HOURS, hour))]

    def is_rolled(self, day_ms: int) -> bool:
        """The day's roll-up holds the newest version of each of its hours, or has outlived them."""
        roll = self.newest(Kind.DAYS, day_ms)
        return all(roll is not None and file.commit <= roll.made_of for file in self.hours_of_day(day_ms))

    def of_day(self, day_ms: int) -> list[File]:
        """Every file of a day."""
        starts = range(day_ms, day_ms + DAY_MS, HOUR_MS)
        return [file for start in starts for kind in DATA for file in self.of(kind, start)]


def opened(checkpoint: Checkpoint, lists: Iterable[Iterable[File]]) -> State:
    """The state that a checkpoint and its lists tell."""
    state = State(checkpoint.number, checkpoint.at, checkpoint.watermark_ms, checkpoint.position)
    for files in lists:
        for file in files:
            state.add(file)
    state.changed_days.clear()
    return state


def encoded(record: Delta | Checkpoint | list[File]) -> bytes:
    value = [asdict(file) for file in record] if isinstance(record, list) else asdict(record)
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def delta_from(content: bytes) -> Delta:
    """Raises ValueError, KeyError or TypeError for what is no manifest."""
    value = json.loads(content)
    added = tuple(_file(each) for each in value.pop("added"))
    removed = tuple(value.pop("removed"))
    return Delta(
        **_known(Delta, value) | {"position": _position(value["position"]), "added": added, "removed": removed}
    )


def checkpoint_from(content: bytes) -> Checkpoint:
    value = json.loads(content)
    days = {day: Named(**named) for day, named in value["days"].items()}
    return Checkpoint(value["number"], Named(**value["at"]), value["watermark_ms"], _position(value["position"]), days)


def files_from(content: bytes) -> list[File]:
    return [_file(each) for each in json.loads(content)]


def _file(value: dict[str, Any]) -> File:
    return File(**_known(File, value) | {"kind": Kind(value["kind"])})


def _position(value: dict[str, Any]) -> Position:
    again = tuple((first, last) for first, last in value.get("again", ()))
    return Position(**_known(Position, value) | {"again": again})


def _known(kind: Any, value: dict[str, Any]) -> dict[str, Any]:
    """Without what a newer version wrote beside it."""
    return {name: value[name] for name in kind.__dataclass_fields__ if name in value}
