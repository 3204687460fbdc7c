"""The ledger's files in an object store (S3 and what speaks like it), through Arrow's file systems.

An object appears whole and durable when its upload ends, so nothing is renamed. No conditional writes are needed: names are never used
twice for different content, and which files count is decided by the head in the store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs

from whaleflux.errors import FieldViolation, InvalidArgument, Unavailable
from whaleflux_console.ledger.folder import Absent, Folder, Found, LocalFolder

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
SCHEME = "s3://"


class ObjectFolder:
    """Objects below `base` ("bucket/prefix") of an Arrow file system."""

    def __init__(self, filesystem: Any, base: str) -> None:
        self._fs, self._base = filesystem, base.strip("/")

    def read(self, path: str) -> bytes:
        with _explained(f"read {path}"):
            try:
                with self._fs.open_input_file(self._at(path)) as file:
                    return bytes(file.read())
            except FileNotFoundError:
                raise Absent(path) from None

    def write(self, path: str, content: bytes) -> None:
        with _explained(f"write {path}"), self._fs.open_output_stream(self._at(path)) as file:
            file.write(content)

    def delete(self, path: str) -> None:
        with _explained(f"delete {path}"), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._at(path))

    def list(self, prefix: str) -> tuple[Found, ...]:
        chosen = fs.FileSelector(self._at(prefix), recursive=True, allow_not_found=True)
        with _explained(f"list {prefix}"):
            files = [info for info in self._fs.get_file_info(chosen) if info.type == fs.FileType.File]
        found = (Found(info.path.removeprefix(self._base + "/"), info.size) for info in files)
        return tuple(sorted(found, key=lambda each: each.path))

    def local(self, path: str) -> Path | None:
        return None

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}"


def open_folder(place: str, *, endpoint: str = "", region: str = "") -> Folder:
    """`s3://bucket/prefix`, or a path of this machine. Keys come from where AWS's tools look (environment, instance role).

    `endpoint`: host:port or URL of another store that speaks S3. Raises InvalidArgument for a place that is neither.
    """
    if place.startswith(SCHEME):
        return ObjectFolder(s3(endpoint=endpoint, region=region), place.removeprefix(SCHEME))
    if "://" in place or not Path(place).is_absolute():
        raise InvalidArgument(
            FieldViolation(
                "ledger_folder", f"{place!r}: use an absolute path, or s3://bucket/prefix for an object store"
            )
        )
    return LocalFolder(Path(place))


def s3(*, endpoint: str = "", region: str = "") -> Any:
    """Arrow's S3 file system with deadlines."""
    scheme, _, host = endpoint.rpartition("://")
    return fs.S3FileSystem(
        region=region or None,
        endpoint_override=host or None,
        scheme=scheme or "https",
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        background_writes=False,
    )


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # what Arrow raises for every answer that is none
        raise Unavailable(
            f"the ledger's object store: could not {what}: {str(error)[:300]}; check its address and rights, it is tried again",
            retry_after_s=10.0,
        ) from error
