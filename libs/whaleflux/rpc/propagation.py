"""Where outgoing calls get their trace context from: nothing until telemetry is set up, its client spans after.

Kept apart from `telemetry` so that the command line can dial without importing OpenTelemetry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Headers = tuple[tuple[str, str], ...]
SpanMaker = Callable[[str, bool], AbstractContextManager[Headers]]


@contextlib.contextmanager
def untraced(_method: str, _streaming: bool) -> Iterator[Headers]:
    """No span, no headers."""
    yield ()


_maker: SpanMaker = untraced


def use(maker: SpanMaker) -> None:
    """Makes every later outgoing call run inside `maker(method, streaming)`, sending the headers that it yields."""
    global _maker
    _maker = maker


def outgoing(method: str, *, streaming: bool) -> AbstractContextManager[Headers]:
    """The span of one outgoing call; yields the headers that carry its context."""
    return _maker(method, streaming)
