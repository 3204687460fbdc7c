"""Output of ranks, as it is shown: each line with its rank or job where there are several, harmless on a terminal. Pure.

Agents give whole lines of one rank (a chunk's edge is a line's edge), and the newest state of a progress bar as a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from whaleflux.foreign_text import harmless

_START_OF_LINE = b"\r\x1b[K"  # carriage return, and erase to the end of the line (ECMA-48, 8.3.41)


def shown(lines: bytes, of: str, *, terminal: bool, time: str = "") -> bytes:
    """What to write for some lines; `of`: whose they are, "" where there is one rank only. Into pipes and files the bytes go as they are."""
    prefix = ((time + " " if time else "") + (f"[{of}] " if of else "")).encode()
    if not terminal and not prefix:
        return lines
    whole = lines.removesuffix(b"\n").split(b"\n") if lines else []
    return b"".join(prefix + (_cleaned(line) if terminal else line) + b"\n" for line in whole)


def records(lines: bytes, **said: Any) -> Iterator[dict[str, Any]]:
    """Each line as programs get it: what is `said` of all of them, and its text."""
    for line in lines.removesuffix(b"\n").split(b"\n") if lines else ():
        yield said | {"text": line.decode(errors="replace")}


@dataclass(slots=True)
class LogView:
    """What to write for one piece of output after another.

    On a terminal of `columns` a state of a progress bar stays on its line until what comes next replaces it; elsewhere each is a line.
    """

    terminal: bool
    columns: int = 80
    _bar: bool = False

    def written(self, lines: bytes, of: str, *, time: str = "", progress: bool = False) -> bytes:
        """What to write for these lines."""
        before, text = self.cleared(), shown(lines, of, terminal=self.terminal, time=time)
        if not (progress and self.terminal):
            return before + text
        self._bar = True
        return before + text.removesuffix(b"\n").decode()[: self.columns - 1].encode()

    def cleared(self) -> bytes:
        """What to write so that something else begins on a line of its own."""
        bar, self._bar = self._bar, False
        return _START_OF_LINE if bar else b""


def _cleaned(line: bytes) -> bytes:
    return harmless(line.decode(errors="replace"), keep="\t").encode(errors="replace")
