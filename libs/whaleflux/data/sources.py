"""Reads originals of datasets: files and folders, web servers, and what fsspec reads. Blocking: for threads.

A source first says what is there (`scan`), then gives any stretch of any file. Its `version` of a file changes when somebody writes
it, as far as the place says so: what is read over minutes is one version, or it is no dataset. No server keeps a reader for ever: each
answer has a deadline, and bytes come at some rate at least.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from whaleflux.data import uris
from whaleflux.data.manifest import MAX_CHUNKS, ManifestWrong

STALLED_S = 60.0  # without an answer from a server
SCAN_S = 600.0  # for a driver's list of all files
MIN_BYTES_PER_S = 16 << 10  # of one stream; less, over STALLED_S, is none
MAX_ABANDONED = 16  # calls of drivers that never came back, in this process
_PIECE_BYTES = 8 << 20  # asked of fsspec at once
_SKIP_BYTES = 1 << 20
T = TypeVar("T")
ActAs = Callable[[], AbstractContextManager[None]]
"""As whom files of this machine are opened."""


class SourceFailed(Exception):
    """It cannot be read now: what, and why."""


class SourceBusy(SourceFailed):
    """It has no time now, and will have soon."""


class SourceChanged(SourceFailed):
    """Somebody writes it while it is read."""


class SourceReplaced(SourceFailed):
    """It is another one than was first read, and stays so."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} when it was first read; declare it under another name")


@dataclass(frozen=True, slots=True)
class Found:
    """One file of a source. `version` is compared, never read; "" where the place has none."""

    path: str
    size_bytes: int
    version: str = ""


class Readable(Protocol):
    """A stretch of a file, read from its begin on."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """How many bytes were read, those that are there first; 0 at the end. Raises SourceFailed, OSError."""
        ...


class Source(Protocol):
    """Where an original is."""

    ranged: bool  # any stretch costs what it is long; else one costs all that stands before it, too

    def scan(self) -> list[Found]:
        """Its files. Raises SourceFailed, ManifestWrong (too many)."""
        ...

    def home(self) -> str:
        """After a `scan`: the path or URL under which its files lie, as in the folder of a copy."""
        ...

    def lone_file(self) -> str:
        """After a `scan`: the path or URL of the file, where it is one, which may lie beside others; "" of a folder."""
        ...

    def open(self, found: Found, offset: int, length: int) -> AbstractContextManager[Readable]:
        """That stretch of a file, after a `scan`. Raises SourceFailed; OSError on the way."""
        ...


def open_source(uri: str, authorization: str = "", act_as: ActAs = contextlib.nullcontext) -> Source:
    """The source of a URI. `authorization` is shown to a web server, and not to where it may send us on. Raises SourceFailed."""
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        return Web(uri, authorization)
    if scheme in uris.BY_FSSPEC:
        return ByFsspec(uri)
    if path := uris.path_of(uri):
        return Local(Path(path), act_as)
    raise SourceFailed(uris.WANTED)


class Local:
    """A file or a folder of this machine, or mounted there. Links are followed, as who reads may."""

    ranged = True

    def __init__(self, root: Path, act_as: ActAs = contextlib.nullcontext) -> None:
        self._root, self._act_as = root, act_as
        self._single = False

    def scan(self) -> list[Found]:
        try:
            with self._act_as():
                self._single = not self._root.is_dir()
                named = [(self._root.name, self._root)] if self._single else _walk(self._root)
                return [_found(name, path) for name, path in named]
        except OSError as error:
            raise _failed(error) from None

    def home(self) -> str:
        return str(self._root.parent if self._single else self._root)

    def lone_file(self) -> str:
        return str(self._root) if self._single else ""

    @contextlib.contextmanager
    def open(self, found: Found, offset: int, length: int) -> Iterator[Readable]:
        path = self._root if self._single else self._root / found.path
        try:
            with self._act_as():
                file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed below
        except OSError as error:
            raise _failed(error) from None
        with file:
            file.seek(offset)
            yield file
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)  # the trainers' pages stay


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    seen, waiting, count = set[tuple[int, int]](), [root], 0
    while waiting:
        folder = waiting.pop()
        state = folder.stat()
        if (state.st_dev, state.st_ino) in seen:
            raise SourceFailed(f"{folder} is linked into itself; leave the link out")
        seen.add((state.st_dev, state.st_ino))
        for entry in os.scandir(folder):
            path = folder / entry.name
            if entry.is_dir():
                waiting.append(path)
            else:
                count += 1
                yield str(path.relative_to(root)), path
            if count + len(waiting) > 2 * MAX_CHUNKS:
                raise ManifestWrong(f"has more than {MAX_CHUNKS} files; pack them (tar, parquet, WebDataset)")


def _found(name: str, path: Path) -> Found:
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise SourceFailed(f"{path} is no file")
    return Found(name, state.st_size, f"{state.st_mtime_ns}-{state.st_ino}")


def _failed(error: OSError) -> SourceFailed:
    why = " (users of tasks must be able to read it)" if isinstance(error, PermissionError) else ""
    return SourceFailed(f"{error}{why}")


class Web:
    """One file of a web server, by ranges (RFC 9110, 14) where it has them."""

    def __init__(self, url: str, authorization: str = "") -> None:
        self._url, self._authorization = url, authorization
        self.ranged = False

    def scan(self) -> list[Found]:
        with self._ask(0, 1) as answer:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            self.ranged = answer.status == 206 and total.isdigit()
            said = total if self.ranged else answer.headers.get("Content-Length", "")
            size = int(said) if said.isdigit() else _length(_Steady(answer))
            name = unquote(urlsplit(self._url).path).rpartition("/")[2] or "data"
            return [Found(name, size, _version(answer))]

    def home(self) -> str:
        return self._url.rpartition("/")[0]

    def lone_file(self) -> str:
        return self._url

    @contextlib.contextmanager
    def open(self, found: Found, offset: int, length: int) -> Iterator[Readable]:
        with self._ask(offset, length) as answer:
            if found.version and _version(answer) != found.version:
                raise SourceChanged(f"{self._url} changed while it was read")
            steady = _Steady(answer)
            if answer.status != 206:
                _skip(steady, offset)
            yield steady

    @contextlib.contextmanager
    def _ask(self, offset: int, length: int) -> Iterator[Any]:
        request = urllib.request.Request(self._url)  # noqa: S310  # its scheme is checked where it is made
        request.add_header("Range", f"bytes={offset}-{offset + length - 1}")
        request.add_header("Accept-Encoding", "identity")
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            with _within(STALLED_S, lambda: urllib.request.urlopen(request, timeout=STALLED_S)) as answer:  # noqa: S310
                yield answer
        except urllib.error.HTTPError as error:
            raise SourceFailed(f"{error}") from None
        except http.client.HTTPException as error:
            raise _said(error) from None


def _version(answer: Any) -> str:
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")


class _Steady:
    """A server's answer, as long as it does not trickle: each receipt has its time-out, all of them together their rate."""

    def __init__(self, answer: Any) -> None:
        self._answer, self._waited_s, self._count = answer, 0.0, 0

    def read(self, most: int) -> bytes:
        """Up to `most` bytes, those that are there first; none at the end. Raises SourceFailed, OSError."""
        begun_s = time.monotonic()
        try:
            data: bytes = self._answer.read1(most)
        except http.client.HTTPException as error:
            raise _said(error) from None
        self._waited_s += time.monotonic() - begun_s
        self._count += len(data)
        if self._waited_s >= STALLED_S:
            self._check_rate()
        return data

    def readinto(self, buffer: memoryview, /) -> int:
        """The same, into a buffer."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _check_rate(self) -> None:
        if self._count < MIN_BYTES_PER_S * self._waited_s:
            raise SourceFailed(
                f"{self._count} bytes came in {self._waited_s:.0f} s; at least {MIN_BYTES_PER_S} a second are needed"
            )
        self._waited_s, self._count = 0.0, 0


class _Abandoned:
    """How many calls have been left to themselves and have not come back."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def add(self, more: int) -> None:
        with self._lock:
            self._count += more

    def check(self) -> None:
        if self._count >= MAX_ABANDONED:
            raise SourceFailed(f"{self._count} earlier reads have not come back; see to the source, restart the agent")


_abandoned = _Abandoned()


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """What a call returns that may never come back: after `limit_s` it is left to itself.

    Raises SourceFailed when the time is up, and when too many have been left; what the call raises.
    """
    _abandoned.check()
    made = Future[T]()

    def run() -> None:
        try:
            made.set_result(call())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, name="source", daemon=True).start()
    try:
        return made.result(limit_s)
    except TimeoutError:
        if made.done():
            raise  # the call's own
        _abandoned.add(1)
        made.add_done_callback(lambda _: _abandoned.add(-1))
        raise SourceFailed(f"no answer within {limit_s:.0f} s") from None


def _said(error: Exception) -> SourceFailed:
    return SourceFailed(f"{type(error).__name__}: {error}")


def _length(stream: _Steady) -> int:
    """Of what a server gives without saying how much it is: only who reads it knows."""
    total = 0
    while data := stream.read(_SKIP_BYTES):
        total += len(data)
    return total


def _skip(stream: _Steady, count: int) -> None:
    while count:
        read = len(stream.read(min(count, _SKIP_BYTES)))
        if not read:
            raise SourceFailed("it ended before its end")
        count -= read


class ByFsspec:
    """What fsspec reads with the driver of its scheme: s3, gs, hf. Credentials are those of the agent's environment."""

    ranged = True

    def __init__(self, uri: str) -> None:
        scheme, self._uri, self._single = urlsplit(uri).scheme, uri, False
        try:
            import fsspec

            with _said_by_driver(but=ImportError):
                self._fs, self._root = fsspec.core.url_to_fs(uri)
        except ImportError:
            package = uris.BY_FSSPEC.get(scheme, "fsspec")
            raise SourceFailed(f"{scheme}:// needs the package {package} on this node: pip install {package}") from None

    def scan(self) -> list[Found]:
        with _said_by_driver():
            details = _within(SCAN_S, lambda: self._fs.find(self._root, detail=True))
            root = str(self._root).rstrip("/")
            self._single = list(details) == [root]
            named = (
                (name.removeprefix(root).lstrip("/") or root.rpartition("/")[2], about)
                for name, about in details.items()
            )
            return [Found(name, int(about["size"]), _version_of(about)) for name, about in named]

    def home(self) -> str:
        return self._uri.rpartition("/")[0] if self._single else self._uri.rstrip("/")

    def lone_file(self) -> str:
        return self._uri if self._single else ""

    @contextlib.contextmanager
    def open(self, found: Found, offset: int, length: int) -> Iterator[Readable]:
        root = str(self._root).rstrip("/")
        path = root if self._single else f"{root}/{found.path}"
        yield io.BufferedReader(_Stretch(self._fs, path, offset, length), _PIECE_BYTES)


class _Stretch(io.RawIOBase):
    """Bytes of a remote object, asked for piece by piece: nothing is read ahead, nothing kept."""

    def __init__(self, fs: Any, path: str, offset: int, length: int) -> None:
        self._fs, self._path, self._at, self._end = fs, path, offset, offset + length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._end)
        if end <= self._at:
            return 0
        with _said_by_driver():
            data = _within(STALLED_S, lambda: self._fs.cat_file(self._path, start=self._at, end=end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextlib.contextmanager
def _said_by_driver(but: type[Exception] = SourceFailed) -> Iterator[None]:
    """Drivers raise whatever their libraries do."""
    try:
        yield
    except (SourceFailed, but):
        raise
    except Exception as error:
        raise _said(error) from None


def _version_of(about: dict[str, Any]) -> str:
    return str(
        next(
            (
                about[key]
                for key in ("ETag", "etag", "blob_id", "generation", "LastModified", "mtime")
                if about.get(key)
            ),
            "",
        )
    )
