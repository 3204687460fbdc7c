"""What a pull is to bring: as a manifest says, or as the source has it now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from whaleflux.data import manifest
from whaleflux.data.manifest import File, Manifest
from whaleflux.data.sources import Found, Source


@dataclass(frozen=True, slots=True)
class Wanted:
    """`manifest` without digests: what it consists of is found out, provided that the source stays as `found` says meanwhile."""

    manifest: Manifest
    found: tuple[Found, ...] = ()  # of the source, by path
    part: bool = False  # the source has more files than are wanted

    def still(self, found: Iterable[Found]) -> bool:
        """Whether the source has what was found there before."""
        wanted = {one.path for one in self.found}
        return tuple(by_path(one for one in found if not self.part or one.path in wanted)) == self.found

    def only(self, paths: AbstractSet[str]) -> Wanted:
        """A part of it."""
        files = tuple(file for file in self.manifest.files if file.path in paths)
        found = tuple(one for one in self.found if one.path in paths)
        return Wanted(Manifest(self.manifest.chunk_bytes, files), found, part=True)

    @property
    def known(self) -> bool:
        return all(file.chunks for file in self.manifest.files if file.size_bytes)

    def identity(self) -> str:
        """What a partial copy must be of to be gone on with."""
        versions = [] if self.known else [[one.path, one.size_bytes, one.version] for one in self.found]
        return json.dumps([self.manifest.digest, versions])


def go_on_with(ahead: Path, partial: Path, wanted: Wanted) -> None:
    """Makes what was pulled ahead the begin of a pull of a version that is known now; without, where it is of another one.

    It is believed like what a killed pull left: each chunk that it says is there is read and compared first.
    """
    blank = tuple(File(file.path, file.size_bytes) for file in wanted.manifest.files)
    before = Wanted(Manifest(wanted.manifest.chunk_bytes, blank), wanted.found)
    plan = ahead / "plan"
    if not partial.exists() and plan.exists() and plan.read_text() == before.identity():
        plan.write_text(wanted.identity())
        ahead.rename(partial)
    shutil.rmtree(ahead, ignore_errors=True)


def by_path(found: Iterable[Found]) -> list[Found]:
    """In the order of a manifest."""
    return sorted(found, key=lambda one: one.path)


def found_out(source: Source) -> Wanted:
    """What a source has now, digests to come. Raises SourceFailed, ManifestWrong."""
    found = tuple(by_path(source.scan()))
    return Wanted(manifest.draft((one.path, one.size_bytes) for one in found), found)
