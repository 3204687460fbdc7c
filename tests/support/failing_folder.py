"""A folder whose process ends at one of its operations: before it, or after it."""

from __future__ import annotations

from whaleflux_console.ledger.folder import Folder


class Ended(BaseException):
    """The process is no more: nothing catches this."""


class EndingFolder:
    """Ends at the operation `at` that changes something (from 0 on); `after`: when it is done. Counts them in `changes`."""

    def __init__(self, inner: Folder, at: int = -1, *, after: bool = False) -> None:
        self._inner, self._at, self._after, self.changes = inner, at, after, 0
        self.read, self.list, self.local = inner.read, inner.list, inner.local

    def write(self, path: str, content: bytes) -> None:
        self._change(lambda: self._inner.write(path, content))

    def delete(self, path: str) -> None:
        self._change(lambda: self._inner.delete(path))

    def _change(self, change) -> None:
        here = self.changes == self._at
        self.changes += 1
        if here and not self._after:
            raise Ended
        change()
        if here:
            raise Ended
