"""What is written while a job is followed: its output, and beside it what becomes of it, which nobody can take for output."""

from __future__ import annotations

import shutil
import sys
import threading
from typing import Any

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.log_lines import LogView, records
from whaleflux.cli.output import Format

MARK = "-- "


class Screen:
    """Output on stdout, states on stderr behind `-- `, dim on terminals. May be used from several threads.

    `ranks`: lines name their rank. `times`: lines begin with the time at which they were written, UTC.
    """

    def __init__(self, *, ranks: bool = False, times: bool = False) -> None:
        self._ranks, self._times = ranks, times
        self._view = LogView(sys.stdout.isatty(), shutil.get_terminal_size().columns)
        self._lock = threading.Lock()

    def lines(self, chunk: Any, job: str = "", *, named: bool = False) -> None:
        """Some lines of one rank of `job`, a StreamLogsResponse; `named`: they name the job, too."""
        time = shown_time(chunk.time) if self._times else ""
        of = " ".join(filter(None, (names.last(job) if named else "", str(chunk.rank) if self._ranks else "")))
        with self._lock:
            output.write(self._view.written(chunk.data, of, time=time, progress=chunk.progress))

    def state(self, *lines: str) -> None:
        """Something about the job."""
        with self._lock:
            self.clear()
            for line in lines:
                output.aside(f"{MARK}{line}")

    def close(self) -> None:
        """Nothing more comes."""

    def clear(self) -> None:
        """So that what is written next stands on a line of its own."""
        if before := self._view.cleared():
            output.write(before)


class ObjectScreen(Screen):
    """For programs: each line of output is a JSON object on a line of stdout; states are as for people.

    `document`: together they are one JSON list, which `close` ends.
    """

    def __init__(self, *, document: bool = False) -> None:
        super().__init__()
        self._document, self._begun = document, False

    def lines(self, chunk: Any, job: str = "", *, named: bool = False) -> None:
        time = shown_time(chunk.time)
        said = {"job": job, "attempt": chunk.attempt, "rank": chunk.rank, "time": None if time == "-" else time}
        with self._lock:
            for record in records(chunk.data, **said):
                if self._document:
                    output.say("," if self._begun else "[")
                self._begun = True
                output.say_json(record, Format.jsonl)

    def close(self) -> None:
        """Nothing more comes; a list ends, also when reading broke off."""
        if self._document:
            output.say("]" if self._begun else "[]")


def shown_time(stamp: Any) -> str:
    """2026-12-01T08:00:05.123Z; "-" for a line whose time is not known."""
    if not stamp.seconds:
        return "-"
    from datetime import UTC

    return str(stamp.ToDatetime(tzinfo=UTC).isoformat(timespec="milliseconds")).replace("+00:00", "Z")
