"""The node's folder of datasets: which versions are there whole, what room they take, and which of them make room. Blocking: for threads.

    root/<id>@<digest>-<made>/    a whole copy; the name is its dataset's, its version's, and says when that dataset was declared: who may read
                                  an earlier or later one of its name has no right to these bytes
    root/<id>@<source>~part/      a fixed part of what exceeds the cache, and links to the rest; named after what its source had
    root/<id>@<digest>-<made>~ranks/   of a version files that ranks here read (`dataset_division`); more may come to them
    root/.lists/<same>/           of that version a list of all files, for these ranks
    root/.manifests/<same>        what it consists of; a copy without is none
    root/.costs/<same>            seconds for each byte that it was pulled in, and what it is worth to stay
    root/.homes/<same>            of a part: the path or URL where the rest is
    root/.partial/<same>/         on its way (`dataset_pull`)
    root/.trash/                  on its way out

What is there is read once and kept in memory: nobody else writes there. A manifest that cannot be read says nothing of its copy: that stays
and counts, is given to nobody, and is looked at again. One thread at a time: the cache sees to that (`DatasetCache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whaleflux import names
from whaleflux.data import manifest
from whaleflux.data.division import LISTING
from whaleflux.data.manifest import Manifest
from whaleflux.quantities import shown_bytes
from whaleflux.v1 import inventory_pb2
from whaleflux_agent import dataset_files

_PART, RANKS = "~part", "~ranks"
_LIST_STAYS_S = 86400.0  # of what is not here itself, for who reads it at its source
_DIGITS = 16  # of a digest, in names of folders; the manifest holds all of it
_SPARE_SHARE, _MOST_SPARE_BYTES = 0.02, 10 << 30  # of the disk, for whoever else writes there


class NoRoom(Exception):
    """It does not fit: nothing was written, and nothing removed."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A whole copy. `dataset`: datasets/{dataset}, and `made`: which of that name (`made_of`); `used_s`: when a task was last given it.

    `cost`: seconds for each byte to have it again. `worth`: the least goes first, by GreedyDual-Size (Cao and Irani, 1997): what it
    cost, on top of what the last one that went was worth when this one was last used.
    """

    dataset: str
    folder: Path
    manifest: Manifest
    used_s: float
    cost: float = 0.0
    worth: float = 0.0
    part: bool = False  # of a dataset: `manifest` is of the files that are here
    made: str = ""

    @property
    def size_bytes(self) -> int:
        return self.manifest.size_bytes


@dataclass(frozen=True, slots=True)
class Held:
    """What is here of one version. `have`, `coming`: bitmaps of its chunks; `settled`: its files are as `dataset_files.finish` left them."""

    manifest: Manifest
    folder: Path
    have: int
    settled: bool
    coming: int = 0
    made: str = ""  # of which dataset of the name


def made_of(dataset: inventory_pb2.Dataset) -> str:
    """Which of all datasets of this name it is: when it was declared."""
    return f"{dataset.create_time.ToNanoseconds():x}" if dataset.HasField("create_time") else ""


def key_of(dataset: str, digest: str, made: str = "") -> str:
    """The folder's name of a version; `digest` "": of one that is not known yet."""
    return f"{names.last(dataset)}@{digest[:_DIGITS] or 'new'}{made and f'-{made}'}"


def ranks_key(dataset: inventory_pb2.Dataset) -> str:
    """Of the version that it has, the folder of what ranks read."""
    return f"{key_of(dataset.name, dataset.manifest_digest, made_of(dataset))}{RANKS}"


class DatasetStore:
    """Everything below `root`, at most `limit_bytes` of it."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._reserved: dict[str, int] = {}  # bytes by key, of what is on its way
        self._copies: dict[str, Copy] = {}  # by the folder's name
        self._floor = 0.0  # what the last copy that made room was worth
        self._unread: dict[str, int] = {}  # bytes by the folder's name, of what cannot be read

    def open(self) -> None:
        """Makes the folders, and takes out what an earlier agent had begun to. Raises OSError."""
        for name in (".manifests", ".costs", ".homes", ".lists", ".partial", ".trash"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for left in (self.root / ".trash").iterdir():
            shutil.rmtree(left, ignore_errors=True)
        for folder in list(self.root.iterdir()):
            if folder.name.endswith(RANKS) and not (self.root / ".manifests" / folder.name).exists():
                shutil.rmtree(
                    folder, ignore_errors=True
                )  # its first files came, and the agent ended before it could say so
            elif "@" in folder.name:
                self._look_at(folder)
        self._floor = min((copy.worth for copy in self._copies.values()), default=0.0)
        for listing in (self.root / ".lists").iterdir():
            if listing.name not in self._copies and listing.stat().st_mtime + _LIST_STAYS_S < time.time():
                shutil.rmtree(listing, ignore_errors=True)

    def copies(self) -> list[Copy]:
        """All whole copies, those first that are worth least; of equal ones those longest unused."""
        for name in list(self._unread):
            self._look_at(self.root / name)
        return sorted(self._copies.values(), key=lambda copy: (copy.worth, copy.used_s))

    def find(self, dataset: str, digest: str = "", made: str = "") -> Copy | None:
        """The whole copy of a version that is as it was left; one that somebody wrote to is taken out.

        `digest` "": of any version, and of any dataset of the name. Looks at each of its files. Raises OSError for one that cannot be looked at.
        """
        for copy in self.copies():
            if _is_whole_of(copy, dataset, digest, made):
                if dataset_files.unchanged(copy.folder, copy.manifest):
                    return copy
                self.remove(copy)
        return None

    def whole_of(self, found: inventory_pb2.Dataset) -> Copy | None:
        """The same, of the version that the dataset has. Raises OSError."""
        return self.find(found.name, found.manifest_digest, made_of(found))

    def holding(self, dataset: str, digest: str = "", made: str = "") -> Copy | None:
        """The same, without a look at its files: one that is gone as a whole is noticed, no more."""
        for copy in self.copies():
            if _is_whole_of(copy, dataset, digest, made):
                if copy.folder.exists():
                    return copy
                self._forget(copy)
        return None

    def known(self, dataset: str, digest: str) -> Copy | None:
        """The whole copy of a version, that of the newest dataset of the name, as far as memory says; for any thread."""
        copies = [
            copy for copy in tuple(self._copies.values()) if digest and _is_whole_of(copy, dataset, digest, copy.made)
        ]
        return max(copies, key=lambda copy: (len(copy.made), copy.made), default=None)

    def part(self, key: str) -> Copy | None:
        """A part that is as it was left; one that somebody wrote to, or whose rest nobody knows, is taken out. Raises OSError."""
        copy = self._copies.get(key)
        there = copy and (self.root / ".homes" / key).exists() and dataset_files.unchanged(copy.folder, copy.manifest)
        if copy and not there:
            self.remove(copy)
            return None
        return copy

    def room_bytes(self, kept: Callable[[str], bool]) -> int:
        """What one dataset could have if everything went that is not `kept`."""
        going = sum(copy.size_bytes for copy in self.copies() if not kept(copy.dataset))
        return max(0, going - self._missing("none@", 0, self.copies()))

    def _look_at(self, folder: Path) -> None:
        """Notes what a folder holds, as far as that can be read."""
        self._unread.pop(folder.name, None)
        try:
            message = inventory_pb2.DatasetManifest.FromString((self.root / ".manifests" / folder.name).read_bytes())
            used_s, found = folder.stat().st_mtime, manifest.from_proto(message, part=folder.name.endswith(RANKS))
        except (FileNotFoundError, ValueError):  # ValueError: ManifestWrong, and what is no message
            return
        except OSError:
            self._unread[folder.name] = allocated(folder)
            return
        dataset, part = names.dataset(folder.name.partition("@")[0]), folder.name.endswith((_PART, RANKS))
        made = folder.name.rpartition("@")[2].partition("~")[0].partition("-")[2]
        if part or key_of(dataset, found.digest, made) == folder.name:
            self._copies[folder.name] = Copy(dataset, folder, found, used_s, *self._cost_of(folder.name), part, made)

    def _cost_of(self, key: str) -> tuple[float, float]:
        """Cost and worth, as written; a copy without is the first to go."""
        try:
            cost, worth = map(float, (self.root / ".costs" / key).read_text().split())
        except (OSError, ValueError):
            return 0.0, 0.0
        return cost, worth

    def _valued(self, copy: Copy) -> Copy:
        """Used now: worth what it cost, on top of what goes now."""
        made = replace(copy, worth=self._floor + copy.cost)
        with contextlib.suppress(OSError):  # then it goes sooner
            (self.root / ".costs" / copy.folder.name).write_text(f"{made.cost!r} {made.worth!r}")
        return made

    def partial(self, key: str) -> Path:
        return self.root / ".partial" / key

    def reserve(self, key: str, size_bytes: int, kept: Callable[[str], bool]) -> list[Copy]:
        """Keeps room for what comes, if need be of copies that are not `kept` (by dataset); returns those. Raises NoRoom."""
        gone = self.leaving(key, size_bytes, kept)
        for copy in gone:
            self._floor = max(self._floor, copy.worth)
            self.remove(copy)
        self._reserved[key] = size_bytes
        return gone

    def leaving(self, key: str, size_bytes: int, kept: Callable[[str], bool]) -> list[Copy]:
        """Copies that have to go, those worth least first; partial ones that nobody goes on with go at once. Raises NoRoom."""
        copies = self.copies()
        missing = self._missing(key, size_bytes, copies)
        if missing > 0:
            self._drop_partials(key)
            missing = self._missing(key, size_bytes, copies)
        gone = list[Copy]()
        for copy in copies:
            if missing <= 0:
                break
            if not kept(copy.dataset):
                gone.append(copy)
                missing -= copy.size_bytes
        if missing > 0:
            raise NoRoom(
                f"{shown_bytes(size_bytes)} do not fit: {shown_bytes(missing)} more are needed than the cache "
                f"({shown_bytes(self.limit_bytes)}, --dataset-bytes) and its disk have beside what is in use"
            )
        return gone

    def _missing(self, key: str, size_bytes: int, copies: list[Copy]) -> int:
        """Bytes that are short, by the limit and by the disk; of the latter a partial copy has its part already."""
        held = sum(copy.size_bytes for copy in copies) + sum(self._unread.values())
        allowed = self.limit_bytes - held - sum(self._reserved.values())
        return size_bytes - min(allowed, self._free_bytes() + allocated(self.partial(key)))

    def _drop_partials(self, but: str) -> None:
        """Removes what nobody pulls."""
        for folder in (self.root / ".partial").iterdir():
            if folder.name != but and folder.name not in self._reserved:
                shutil.rmtree(folder, ignore_errors=True)

    def _free_bytes(self) -> int:
        """Of the disk, beside what is left to others; what is on its way has its room there already, or is about to."""
        state = shutil.disk_usage(self.root)
        # A copy: pulls begin and end on the event loop while this is asked in a thread.
        coming = sum(max(0, size - allocated(self.partial(key))) for key, size in dict(self._reserved).items())
        return int(state.free - min(_SPARE_SHARE * state.total, _MOST_SPARE_BYTES) - coming)

    def release(self, key: str) -> None:
        """Nobody pulls it any more."""
        self._reserved.pop(key, None)

    def publish(
        self,
        dataset: str,
        found: Manifest,
        partial: Path,
        reader: int,
        cost: float = 0.0,
        part: str = "",
        links: Sequence[tuple[str, str]] = (),
        home: str = "",
        made: str = "",
    ) -> Copy:
        """Makes a whole copy of what was pulled: there for everybody at once. Raises OSError.

        `part`: its key, where it is a part only; `links` are paths of the rest, and where each is; `home` is where all of it is.
        """
        key = part or key_of(dataset, found.digest, made)
        if part:
            (self.root / ".homes" / key).write_text(home)
        for path, original in links:
            _link(partial / "files" / path, original)
        self._write_manifest(key, found)
        target = self.root / key
        dataset_files.finish(partial, target, reader)
        self._unread.pop(key, None)
        copy = Copy(dataset, target, found, target.stat().st_mtime, cost, part=bool(part), made=made)
        self._copies[key] = self._valued(copy)
        return self._copies[key]

    def _write_manifest(self, key: str, found: Manifest) -> None:
        known = self.root / ".manifests" / key
        written = known.with_name(f".{key}")
        written.write_bytes(found.to_proto().SerializeToString())
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        written.rename(known)
        dataset_files.sync(known.parent)

    def of_ranks(self, key: str) -> Copy | None:
        """Files of a version that are here for ranks, as they were left; where somebody wrote to one, all are taken out. Raises OSError."""
        copy = self._copies.get(key)
        if copy and not dataset_files.unchanged(copy.folder, copy.manifest):
            self.remove(copy)
            return None
        return copy

    def add_for_ranks(self, key: str, dataset: str, found: Manifest, partial: Path, reader: int, cost: float) -> Copy:
        """Files that were pulled come to those that are there: told of only when each is whole and on the disk. Raises OSError."""
        before, target = self._copies.get(key), self.root / key
        dataset_files.finish_beside(partial, target, reader)
        files = {file.path: file for file in (*(before.manifest.files if before else ()), *found.files)}
        together = Manifest(found.chunk_bytes, tuple(files[path] for path in sorted(files)))
        self._write_manifest(key, together)
        made = key.rpartition("@")[2].partition("~")[0].partition("-")[2]
        copy = Copy(
            dataset,
            target,
            together,
            target.stat().st_mtime,
            max(cost, before.cost if before else 0.0),
            part=True,
            made=made,
        )
        self._copies[key] = self._valued(copy)
        return self._copies[key]

    def listing(self, key: str, paths: Sequence[str] | None, reader: int) -> str:
        """The folder with the list of all files of a version; "" where there is none and `paths` None. Raises OSError."""
        folder = self.root / ".lists" / key
        if not folder.exists() and paths is not None:
            partial = self.partial(f"{key}~list")
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "files").mkdir(parents=True)
            (partial / "files" / LISTING).write_text(json.dumps(list(paths)))
            dataset_files.finish(partial, folder, reader)
        return str(folder) if folder.exists() else ""

    def home_of(self, copy: Copy) -> str:
        """Where the rest of a part is; "" of a whole copy. Raises OSError."""
        return (self.root / ".homes" / copy.folder.name).read_text() if copy.folder.name.endswith(_PART) else ""

    def remove(self, copy: Copy) -> None:
        """Not there from now on; whoever reads it reads on."""
        out = self.root / ".trash" / names.ulid()
        with contextlib.suppress(FileNotFoundError):
            copy.folder.rename(out)
        self._forget(copy)
        shutil.rmtree(out, ignore_errors=True)

    def _forget(self, copy: Copy) -> None:
        for kind in (".manifests", ".costs", ".homes"):
            (self.root / kind / copy.folder.name).unlink(missing_ok=True)
        shutil.rmtree(self.root / ".lists" / copy.folder.name, ignore_errors=True)
        self._copies.pop(copy.folder.name, None)

    def touch(self, copy: Copy) -> None:
        """It is used now: others go before it."""
        os.utime(copy.folder)
        if copy.folder.name in self._copies:
            self._copies[copy.folder.name] = self._valued(replace(copy, used_s=copy.folder.stat().st_mtime))


def _is_whole_of(copy: Copy, dataset: str, digest: str, made: str) -> bool:
    same = not digest or (copy.manifest.digest, copy.made) == (digest, made)
    return copy.dataset == dataset and same and not copy.part


def part_key(dataset: str, source: str) -> str:
    """The folder's name of a part; `source`: what its source had (`Wanted.identity`)."""
    return f"{names.last(dataset)}@{hashlib.sha256(source.encode()).hexdigest()[:_DIGITS]}{_PART}"


def _link(path: Path, home: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(home)


def cache_bytes(root: Path, limit_bytes: int) -> int:
    """Most bytes that a cache there can hold: its limit, or its disk less what is left to others."""
    below = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    total = shutil.disk_usage(below).total
    return int(min(limit_bytes, total - min(_SPARE_SHARE * total, _MOST_SPARE_BYTES)))


def allocated(partial: Path) -> int:
    """Bytes that a partial copy has on the disk; 0 where there is none."""
    total = 0
    for root, _, found in os.walk(partial):
        for name in found:
            with contextlib.suppress(OSError):  # removed meanwhile, or cannot be looked at
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total
