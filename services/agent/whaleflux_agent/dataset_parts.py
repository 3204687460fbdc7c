"""Parts of datasets that exceed the cache: the same files in each epoch, beside links to the rest where it is mounted."""

from __future__ import annotations

import contextlib
import json

from whaleflux import telemetry
from whaleflux.data.manifest import ManifestWrong
from whaleflux.data.sources import Local, Source, SourceFailed
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.core.fixed_subset import fixed_subset
from whaleflux_agent.core.work import Work
from whaleflux_agent.dataset_fetch import Unkept
from whaleflux_agent.dataset_progress import Pace, Progress
from whaleflux_agent.dataset_pull import Pull, in_thread
from whaleflux_agent.dataset_reports import PARTIAL, CopyReports
from whaleflux_agent.dataset_room import Room
from whaleflux_agent.dataset_store import Copy, DatasetStore, NoRoom, part_key
from whaleflux_agent.dataset_wanted import Wanted
from whaleflux_agent.runtime.api import LaunchFailed

_log = telemetry.get_logger("whaleflux.agent")


def reads_parts(work: Work | None, source: Source) -> bool:
    """Whether a task finds the rest at the source: by links of a mounted folder, else if its code looks for it there."""
    if work is None or work.spec.require_local_data:
        return False
    return isinstance(source, Local) or work.spec.partial_data


def check_read_there(found: inventory_pb2.Dataset, why: str, work: Work | None) -> None:
    """Raises LaunchFailed, with why there is no copy, for a task that cannot read it where it is."""
    if work is None or work.spec.require_local_data:
        raise LaunchFailed(f"{found.name}: {why}", unfit=True)
    if found.HasField("credentials"):
        raise LaunchFailed(f"{found.name}: {why}; its source is shown a secret, so no task reads it there", unfit=True)


def looked_at(source: Source) -> None:
    """Scans it: only then does it say where its files are. Raises SourceFailed, OSError."""
    with contextlib.suppress(ManifestWrong):  # too many files for a copy are none too many to be read there
        source.scan()


class Parts:
    """Brings them, as far as there is room."""

    def __init__(
        self,
        store: DatasetStore,
        room: Room,
        reports: CopyReports,
        pace: Pace,
        reader: int,
    ) -> None:
        self._store, self._room, self._reports, self._pace, self._reader = store, room, reports, pace, reader

    async def bring(self, unkept: Unkept, work: Work | None, progress: Progress) -> Copy | None:
        """A fixed part of the files of what never fits; None where the task would not find the rest, or all of it might fit."""
        found, wanted, source = unkept.dataset, unkept.wanted, unkept.source
        if wanted.manifest.size_bytes <= self._store.limit_bytes or not reads_parts(work, source):
            return None
        if found.HasField("credentials"):  # no task is shown the secret, so none reads the rest
            return None
        key = part_key(found.name, json.dumps([[one.path, one.size_bytes, one.version] for one in wanted.found]))
        copy: Copy | None = await self._room.do(self._store.part, key)
        if copy is None:
            copy = await self._pulled_part(found.name, wanted, source, key, progress)
        if copy:
            share = f"{copy.size_bytes / wanted.manifest.size_bytes:.0%} of it; the rest is read at its source"
            await self._reports.say(found.name, PARTIAL, copy.size_bytes, message=share)
        return copy

    async def _pulled_part(
        self, name: str, wanted: Wanted, source: Source, key: str, progress: Progress
    ) -> Copy | None:
        room = await self._room.do(self._store.room_bytes, self._room.kept)
        paths = fixed_subset(((file.path, file.size_bytes) for file in wanted.manifest.files), room, name)
        part, partial = wanted.only(paths), self._store.partial(key)
        if not part.manifest.size_bytes:
            return None
        try:
            await self._room.take(key, part.manifest.size_bytes)
            pull = Pull(part, source, partial, pace=self._pace, progress=progress)
            made = await in_thread(pull.run)
            home, linked = source.home(), wanted.manifest.files if isinstance(source, Local) else ()
            rest = [(file.path, f"{home}/{file.path}") for file in linked if file.path not in paths]
            return await self._room.do(
                self._store.publish, name, made, partial, self._reader, progress.cost, key, rest, home
            )
        except (NoRoom, SourceFailed, OSError) as failure:
            _log.info(Event.DATASET_UNCACHED, dataset=name, reason=str(failure))
            return None
        finally:
            self._store.release(key)
