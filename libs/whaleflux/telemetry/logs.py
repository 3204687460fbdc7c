"""Structured logs: one JSON object per line on stdout with the trace id, or readable lines on a terminal.

Events are names (`Event.NODE_DRAINED`), their circumstances are fields. Lines of libraries that use `logging` take
the same form. Fields whose names say that they are secret are masked, whoever logs them.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any, TextIO

from whaleflux.foreign_text import harmless
from whaleflux.telemetry.traces import current_trace_id


@contextlib.contextmanager
def _without(*unneeded: str) -> Iterator[None]:
    """Imports in the block do not find these modules, unless they are there already."""
    absent = [name for name in unneeded if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: the import system's word for "is not there"
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


# Structlog loads rich for tracebacks on a terminal where it finds it, a tenth of what an idle service holds, and colorama
# for the colours of Windows.
with _without("rich", "colorama"):
    import structlog

_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|authorization|api_?key|private_?key|key_pem)$", re.IGNORECASE)
_FRAMES = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)  # locals may be secret
_Event = MutableMapping[str, Any]


def setup_logging(service: str, *, level: str = "info", stream: TextIO | None = None) -> None:
    """Configures structlog and `logging` for this process; `level` is debug, info, warning or error."""
    out = stream or sys.stdout
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _adds(service),
        _masks,
    ]
    rendering: list[structlog.typing.Processor] = (
        [_harmless, structlog.dev.ConsoleRenderer()]
        if out.isatty()
        else [structlog.processors.ExceptionRenderer(_FRAMES), structlog.processors.JSONRenderer(default=str)]
    )
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler = logging.StreamHandler(out)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *rendering]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )


def get_logger(name: str = "whaleflux") -> structlog.typing.FilteringBoundLogger:
    """The logger to call with an `Event` and its fields."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(name)
    return logger


def _harmless(_logger: Any, _method: str, event: _Event) -> _Event:
    """What a program or a user wrote is quoted by many events; it commands no terminal."""
    return {key: harmless(value) if isinstance(value, str) else value for key, value in event.items()}


def _adds(service: str) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, event: _Event) -> _Event:
        event.setdefault("service", service)
        if trace_id := current_trace_id():
            event["trace_id"] = trace_id
        return event

    return add


def _masks(_logger: Any, _method: str, event: _Event) -> _Event:
    for key in event:
        if _SECRET.search(key) and event[key]:
            event[key] = "***"
    return event
