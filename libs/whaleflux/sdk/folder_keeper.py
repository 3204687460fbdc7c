"""Checkpoints in one folder that all ranks can reach, for scripts that run by themselves."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from whaleflux.checkpoint_storage import found_storage, storage_id, sync, write_durably
from whaleflux.sdk.errors import RestoreFailed
from whaleflux.sdk.files import SavedPiece
from whaleflux.sdk.keeper import Loss, Refused, StepReport, Target
from whaleflux.sdk.resharding import Resharding

log = logging.getLogger(__name__)

_NAME = re.compile(r"s\d{12}-n\d{6}")


class FolderKeeper:
    """Each save has a folder of its own: s{step}-n{serial}.

    Every rank leaves the list of its files there, with sizes and checksums, when they are durable; a folder with the lists of
    all ranks is a checkpoint. What a killed run left behind has fewer, and is never restored.
    """

    every_steps = 0

    def __init__(self, root: Path, world_size: int, keep: int = 3) -> None:
        self._root, self._world_size, self._keep = root, world_size, keep
        self._storage = ""  # that this job saves on
        self._refused: set[str] = set()  # could not be restored here

    def newest(self, refused: Sequence[Refused] = ()) -> Target | None:
        folders = self._folders()
        complete = [target for folder in folders if (target := self._complete(folder)) is not None]
        unfinished = len(folders) - len(complete)
        if unfinished:
            log.warning("%d saves in %s were never finished; they are left out", unfinished, self._root)
        self._refused = {one.name for one in refused}
        usable = [target for target in complete if target.name not in self._refused]
        if complete and not usable:
            said = "; ".join(f"{one.name}: {one.fault.message}" for one in refused[:3])
            raise RestoreFailed(f"none of the {len(complete)} checkpoints in {self._root} can be restored: {said}")
        if not usable:
            return None
        self._storage = usable[-1].storage
        return usable[-1]

    def intact(self, target: Target) -> None:
        """Nobody remembers that it was taken for lost."""

    def start(
        self, step: int, serial: int, layout: str, data_position: bytes, resharding: Resharding | None = None
    ) -> Target:
        storage = self._storage = found_storage(self._root, self._storage)
        self._collect()
        name = f"s{step:012d}-n{serial:06d}"
        return Target(name, self._root / name, storage=storage)

    def finish(self, target: Target, rank: int, pieces: Sequence[SavedPiece]) -> None:
        listed = {"world_size": self._world_size, "pieces": [asdict(piece) for piece in pieces]}
        write_durably(target.folder / f"pieces-{rank}.json", json.dumps(listed).encode())

    def give_up(self, target: Target | None, step: int, why: str) -> None:
        """The checkpointer says so itself."""

    def progress(self, rank: int, step: int, loss: Loss | None) -> None:
        """Nobody watches."""

    def steps(self, rank: int, report: StepReport) -> None:
        """Nobody watches."""

    def close(self) -> None:
        """Nothing is under way."""

    def _collect(self) -> None:
        """Deletes what is older than the newest checkpoints that are kept, finished or not.

        What could not be restored is none of those: it must not crowd out what is saved in its place.
        """
        folders = self._folders()
        finished = [folder for folder in folders if self._complete(folder) is not None]
        kept = [folder for folder in finished if folder.name not in self._refused][-self._keep :]
        for folder in folders:
            if kept and folder < kept[0]:
                for listed in folder.glob("pieces-*.json"):
                    listed.unlink(missing_ok=True)  # first: what is left is not a checkpoint any more
                sync(folder)
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if not self._root.exists():
            return []
        return sorted(folder for folder in self._root.iterdir() if _NAME.fullmatch(folder.name))

    def _complete(self, folder: Path) -> Target | None:
        """The checkpoint in a folder; None when a rank's list is missing. Raises OSError when it cannot be told."""
        lists = [name for name in os.listdir(folder) if name.startswith("pieces-")]
        listed = {name: json.loads((folder / name).read_bytes()) for name in lists}
        worlds = {content["world_size"] for content in listed.values()}
        if len(worlds) != 1 or {f"pieces-{rank}.json" for rank in range(worlds.pop())} != listed.keys():
            return None
        pieces = tuple(SavedPiece(**piece) for content in listed.values() for piece in content["pieces"])
        return Target(folder.name, folder, pieces, storage_id(self._root))
