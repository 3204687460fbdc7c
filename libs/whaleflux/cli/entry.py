"""Where the `whaleflux` program begins: until all is imported, Ctrl-C ends it without a word."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell told it to ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """As `whaleflux.cli.__main__.main`, from which on Ctrl-C is told."""
    from whaleflux.cli.__main__ import main as run

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()
