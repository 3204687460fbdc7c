"""From the bytes that a rank writes to whole lines, so that lines of several ranks can be shown together. Pure.

Output comes in pieces that end anywhere; only a newline ends a line. A progress bar writes states of one line with
carriage returns between them: the newest counts. A line that grows over the bound is shown in parts.
"""

from __future__ import annotations

MAX_LINE_BYTES = 16 * 1024


class LineCutter:
    """One rank's output. Whatever it gives is whole lines, each with its newline."""

    def __init__(self) -> None:
        self._rest = b""  # what no newline has ended yet
        self._shown = b""  # of the progress bar

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes."""
        whole, newline, rest = (self._rest + data).rpartition(b"\n")
        lines = b"".join(_bounded(_newest_state(line)) for line in whole.split(b"\n")) if newline else b""
        states = rest.split(b"\r")
        self._rest = b"\r".join(states[-2:])
        if len(states) == 1 and len(rest) > MAX_LINE_BYTES:
            parts = _parts(rest)
            self._rest = parts.pop()
            lines += b"".join(part + b"\n" for part in parts)
        elif len(self._rest) > 2 * MAX_LINE_BYTES:
            self._rest = self._rest[-MAX_LINE_BYTES:]
        return lines

    @property
    def held_bytes(self) -> int:
        """How much of what was fed is not given yet."""
        return len(self._rest)

    def progress(self) -> bytes:
        """The newest complete state of a progress bar as a line; empty when there is no new one."""
        before, _, _ = self._rest.rpartition(b"\r")
        if not before.strip() or before == self._shown:
            return b""
        self._shown = before
        return _bounded(before)

    def flush(self) -> bytes:
        """The last line, when nothing more will come."""
        rest, self._rest = self._rest, b""
        state = _newest_state(rest)
        return _bounded(state) if state else b""


def _newest_state(line: bytes) -> bytes:
    """What a terminal would show in the end."""
    if b"\r" not in line:
        return line
    return next((state for state in reversed(line.split(b"\r")) if state), b"")


def _bounded(line: bytes) -> bytes:
    return b"".join(part + b"\n" for part in _parts(line))


def _parts(line: bytes) -> list[bytes]:
    """At most `MAX_LINE_BYTES` each, characters of UTF-8 whole."""
    parts = []
    while len(line) > MAX_LINE_BYTES:
        end = MAX_LINE_BYTES
        while end > MAX_LINE_BYTES - 4 and line[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        parts.append(line[:end])
        line = line[end:]
    return [*parts, line]
