"""DuckDB as an engine alone: it owns nothing that is not in the ledger's files, so it may be thrown away at any time.

Limits are given when it is opened; what does not fit into memory goes to `scratch`. Tables of Arrow are read in place.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import duckdb

MEMORY_BYTES = 512 << 20
THREADS = 2


class Engine:
    """One database in memory. `cursor()` per thread; a query runs without Python's lock."""

    def __init__(
        self, *, memory_bytes: int = MEMORY_BYTES, threads: int = THREADS, scratch: Path | None = None
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="whaleflux-ledger-", dir=scratch, ignore_cleanup_errors=True)
        limits: dict[str, Any] = {
            "memory_limit": f"{memory_bytes >> 10}KiB",
            "threads": threads,
            "temp_directory": self._scratch.name,
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "enable_external_access": True,  # of the scratch folder
        }
        self._connection = duckdb.connect(":memory:", config=limits)
        self._lock = threading.Lock()

    def cursor(self) -> Any:
        with self._lock:
            return self._connection.cursor()

    def table(self, query: str, parameters: list[Any] | None = None, **tables: Any) -> Any:
        """The answer as an Arrow table; `tables` are Arrow tables by the names that the query has for them."""
        cursor = self.cursor()
        try:
            for name, table in tables.items():
                cursor.register(name, table)
            return cursor.sql(query, params=parameters or []).to_arrow_table()
        finally:
            cursor.close()

    @property
    def scratch(self) -> Path:
        """For files that need not outlive the engine."""
        return Path(self._scratch.name)

    def close(self) -> None:
        self._connection.close()
        self._scratch.cleanup()
