"""A folder at one of whose operations the process ends, or something fails once: before it, or after it."""

from __future__ import annotations

from whaleflux_console.ledger.folder import Folder


class Ended(BaseException):
    """The process is no more: nothing catches this."""


class EndingFolder:
    """Raises at the operation `at` that changes something (from 0 on); `after`: when it is done. Counts them in `changes`."""

    def __init__(self, inner: Folder, at: int = -1, *, after: bool = False, error: type[BaseException] = Ended) -> None:
        self._inner, self._at, self._after, self._error, self.changes = inner, at, after, error, 0
        self.read, self.list, self.local = inner.read, inner.list, inner.local

    def write(self, path: str, content: bytes) -> None:
        self._change(lambda: self._inner.write(path, content))

    def delete(self, path: str) -> None:
        self._change(lambda: self._inner.delete(path))

    def _change(self, change) -> None:
        here = self.changes == self._at
        self.changes += 1
        if here and not self._after:
            raise self._error("no room")
        change()
        if here:
            raise self._error("no room")
