"""How a rank ended, for people: in one line, then the last words of its program."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from whaleflux.manifests import shell_text
from whaleflux_agent.runtime import logs
from whaleflux_agent.runtime.api import RankExit
from whaleflux_agent.runtime.job_files import opener

MESSAGE_CHARS = 2000
_ERROR_BYTES = 1 << 20  # of the file with it, which also holds a traceback


def describe(ended: RankExit, output: str, who: str = "") -> str:
    """How a rank (or `who`) ended, in one line, then its last words."""
    if not ended.known:
        how = "is gone; nobody saw how it ended"
    elif ended.why:
        how = ended.why
    elif ended.out_of_memory:
        how = "was killed by the kernel: out of memory"
    elif ended.code < 0:
        how = f"was ended by {shell_text.signal_name(-ended.code)}"
    else:
        how = f"ended with exit code {ended.code}{shell_text.meaning_of(ended.code)}"
    head = f"{who or f'rank {ended.rank}'} {how}"
    room = MESSAGE_CHARS - len(head) - 1
    return f"{head}\n{output[-room:]}" if output else head


def error_path(folder: Path, rank: int) -> Path:
    """Where a rank's program records its failure: in a folder of its own, all that a container sees of the task's `folder`."""
    return folder / "errors" / f"error-{rank}.json"


def error_text(
    folder: Path, log: Path, rank: int, acting: contextlib.AbstractContextManager[None] | None = None
) -> str:
    """What the program recorded about its failure (TORCHELASTIC_ERROR_FILE), else the end of its output.

    The record is read within `acting`, as the program's user: it may be a link to what is not the program's own.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError), acting or contextlib.nullcontext():
        with open(error_path(folder, rank), "rb", opener=opener) as file:
            record = json.loads(file.read(_ERROR_BYTES))["message"]
        found = record if isinstance(record, str) else record.get("message", "")
        if found:
            return str(found)
    return logs.last_text(log, MESSAGE_CHARS)
