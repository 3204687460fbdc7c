"""Files of the ledger as programs of this machine read them: proven by their sha256 first, fetched into the scratch folder if they lie elsewhere."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from whaleflux_console.ledger.chain import proven_bytes
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.manifest import File


def table_of(folder: Folder, file: File) -> Any:
    """Its Arrow table. Raises Damaged for a file that is gone or is not what was written, Unavailable when nobody can say."""
    return pq.read_table(io.BytesIO(proven_bytes(folder, file.path, file.sha256)), partitioning=None)


@contextlib.contextmanager
def local_files(folder: Folder, files: Sequence[File], scratch: Path) -> Iterator[list[Path]]:
    """Paths of this machine, while the block lasts. Raises as `table_of`."""
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as fetched:
        yield [_local(folder, file, Path(fetched) / f"{place}.parquet") for place, file in enumerate(files)]


def _local(folder: Folder, file: File, copy: Path) -> Path:
    content = proven_bytes(folder, file.path, file.sha256)
    if there := folder.local(file.path):
        return there
    copy.write_bytes(content)
    return copy


def rows_in(paths: Sequence[Path]) -> str:
    """SQL of the rows of at least one file; a column that only some have is null in the others."""
    listed = ", ".join("'" + str(path).replace("'", "''") + "'" for path in paths)
    return f"SELECT * FROM read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"
