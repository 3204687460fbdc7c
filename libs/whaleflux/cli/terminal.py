"""The terminal of this process: raw while a session has it, restored in every end; and the way out of a session that hangs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_NEW_LINE, _TILDE, _DOT = b"\r\n", b"~"[0], b"."[0]
# Colours off, cursor shown, no pasting marks, no mouse: what a program that was cut off may have left on.
_RESET = b"\x1b[0m\x1b[?25h\x1b[?2004l\x1b[?1000l\x1b[?1002l\x1b[?1006l"


class Escape:
    """Finds Enter ~ . in what is typed; Enter ~ ~ types one ~ (ssh's way). Pure."""

    def __init__(self) -> None:
        self._at_line_start, self._tilde = True, False

    def typed(self, data: bytes) -> tuple[bytes, bool]:
        """What to send of it, and whether to leave."""
        sent = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == _DOT:
                    return bytes(sent), True
                if byte != _TILDE:
                    sent.append(_TILDE)
            elif self._at_line_start and byte == _TILDE:
                self._tilde = True
                continue
            sent.append(byte)
            self._at_line_start = byte in _NEW_LINE
        return bytes(sent), False


@contextlib.contextmanager
def raw(descriptor: int = 0) -> Iterator[None]:
    """Keys go through one by one, Ctrl-C too. As it was at the end of the block, whatever ends it."""
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSADRAIN)
    whole = False
    try:
        yield
        whole = True
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        if not whole:
            with contextlib.suppress(OSError):
                os.write(1, _RESET + b"\n")


def size() -> tuple[int, int]:
    """Rows and columns."""
    found = os.get_terminal_size(1)
    return found.lines, found.columns
