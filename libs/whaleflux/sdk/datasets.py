"""Reads a job's dataset wherever it is: the copy or the part that its node has, and the rest at the source."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from whaleflux.data.division import LISTING, part_of


class Dataset:
    """The files of a dataset that the job names under `data`, by their paths below its source.

        corpus = Dataset("corpus")
        for path in corpus.paths():
            with corpus.open(path) as file: ...

    What is at the source is read by fsspec with the task's own credentials, and compared with nothing. Of one that the job names under
    `data_by_rank` this rank reads `corpus.part()`, and no other.
    """

    def __init__(self, name: str, environment: Mapping[str, str] = os.environ) -> None:
        self.name, variable = name, name.upper().replace("-", "_")
        try:
            where = environment[f"WHALEFLUX_DATASET_{variable}"]
        except KeyError:
            raise LookupError(f"the job has no dataset {name!r}; add it to its file: data: dataset:{name}") from None
        listing, self._environment = environment.get(f"WHALEFLUX_DATAFILES_{variable}"), environment
        self._files: list[str] | None = json.loads(Path(listing, LISTING).read_text()) if listing else None
        self.folder = Path(where) if "://" not in where else None
        """What the node has of it; None where there was no room for anything, and all of it is read at its source."""
        rest = environment.get(f"WHALEFLUX_DATASOURCE_{variable}", "" if self.folder else where)
        self.source = "" if os.path.isabs(rest) else rest
        """Where the rest of it is, a URL; "" where the folder has all of it, be it as links."""
        below = rest.startswith(f"{where.rstrip('/')}/")
        self._lone = unquote(urlsplit(rest).path).rpartition("/")[2] if below else ""  # one file, beside others

    def paths(self) -> list[str]:
        """All files, in order. Asks the source where the rest of them is there."""
        if self._files is not None:
            return list(self._files)
        if self._lone:
            return [self._lone]
        if not self.source:
            assert self.folder is not None
            return sorted(_below(self.folder))
        files, root = self._at_source()
        found = (name.removeprefix(root).lstrip("/") for name in files.find(root))
        return sorted(found)

    def part(self, rank: int | None = None, world_size: int | None = None) -> list[str]:
        """The files that are this rank's (`whaleflux.data.division`): together those of all ranks are all, each once.

        Without arguments as RANK and WORLD_SIZE say, as torchrun sets them. Raises ValueError where a rank is none of so many.
        """
        rank = int(self._environment["RANK"]) if rank is None else rank
        world_size = int(self._environment["WORLD_SIZE"]) if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is none of {world_size}; give one from 0 to {world_size - 1}")
        return list(part_of(self.paths(), rank, world_size))

    def is_here(self, path: str) -> bool:
        """Whether the node has the file itself."""
        return self.folder is not None and self._lone in ("", path) and (self.folder / _checked(path)).is_file()

    def open(self, path: str) -> BinaryIO:
        """One file, to be read as bytes. Raises FileNotFoundError, and what fsspec's driver raises."""
        if self._lone not in ("", path):
            raise FileNotFoundError(f"{path!r} is no file of {self.name}, which is one: {self._lone}")
        if self.folder is not None and (not self.source or self.is_here(path)):
            return open(self.folder / _checked(path), "rb")
        files, root = self._at_source()
        return cast("BinaryIO", files.open(root if self._lone else f"{root}/{_checked(path)}", "rb"))

    def _at_source(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError:
            raise ImportError("the rest of the dataset is at its source; to read it: pip install fsspec") from None
        files, root = fsspec.core.url_to_fs(self.source)
        return files, str(root).rstrip("/")


def _below(folder: Path) -> list[str]:
    return [os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names]


def _checked(path: str) -> str:
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise ValueError(f"{path!r} leads out of the dataset; use paths as Dataset.paths() gives them")
    return path
