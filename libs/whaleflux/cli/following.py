"""Following a job: its states and its output, attempt after attempt, until it has ended and all of it is shown.

Two streams are read side by side: the job's states in the calling thread, its output in one of its own. Attempts are read in their
order, each to its end, so that no line is lost or shown twice when the job starts anew or the control plane's leader changes.
"""

from __future__ import annotations

import threading
from typing import Any

from whaleflux.cli import output
from whaleflux.cli.screen import Screen
from whaleflux.errors import StatusError

STOPPED = 130  # the shell's code for what ended by Ctrl-C
_LAST_OUTPUT_S = 60.0  # for what is left to be read once the job has ended


def follow(client: Any, name: str, *, rank: int = 0) -> int:
    """Shows a job until it has ended; `rank` -1: output of all ranks.

    Returns 0 when it succeeded, 1 when it did not, 130 when it was interrupted.
    """
    screen = Screen(ranks=rank < 0)
    reader = OutputReader(client, name, rank, screen)
    last = ""
    try:
        for job in client.follow_job(name):
            reader.knows(job)
            line = state_line(job)
            if line != last and not _ended(job):
                screen.state(line)
            last = line
        reader.finish()
    except KeyboardInterrupt:
        screen.state(
            "stopped following; the job goes on",
            f"follow it again: whaleflux logs -f {name}",
            f"end it: whaleflux cancel {name}",
        )
        return STOPPED
    finally:
        reader.stop()
    screen.state(*ending(job, shown_rank=rank))
    return 0 if output.job_state(job) == "SUCCEEDED" else 1


def state_line(job: Any) -> str:
    """RUNNING attempt 2 on NODES: what is to be said of it."""
    number = attempt_number(job)
    attempt = f" attempt {number}" if number > 1 and not _ended(job) else ""
    where = ", ".join(task.node for task in job.attempt.tasks) if output.job_state(job) != "QUEUED" else ""
    why = f": {job.state_message}" if job.state_message else ""
    return f"{output.job_state(job)}{attempt}" + (f" on {where}" if where else "") + why


def attempt_number(job: Any) -> int:
    """Of the current or last attempt, from 1; 0: there was none."""
    if not job.attempt.epoch:
        return 0
    return int(job.attempt.number) or len(job.past_attempts) + 1


def ending(job: Any, *, shown_rank: int) -> list[str]:
    """The last lines: how it ended; of a failure also the last words of the rank that failed, and what to do next."""
    said = job.state_message.partition("\n")[0]
    lines = [f"{output.job_state(job)}" + (f": {said}" if said else "")]
    if output.job_state(job) != "FAILED":
        return lines
    failed = next((task for task in job.attempt.tasks if task.exit_code and task.message), None)
    if failed is not None:
        cause, _, words = failed.message.partition("\n")
        lines += [f"cause: {cause} on {failed.node}"] if cause not in said else []
        rank = _rank_of(cause)
        if words and shown_rank >= 0 and rank not in ("", str(shown_rank)):
            lines += [f"last lines of rank {rank}:", *(f"  {line}" for line in words.splitlines()[-10:])]
    return [*lines, f"next: whaleflux logs --rank -1 --tail 50 {job.name} | whaleflux job {job.name}"]


def _rank_of(cause: str) -> str:
    """Agents begin with "rank 3 ended ..."; "" where this one does not."""
    word, _, rest = cause.partition(" ")
    number = rest.partition(" ")[0]
    return number if word == "rank" and number.isdigit() else ""


def _ended(job: Any) -> bool:
    from whaleflux.sdk.client import ENDED

    return job.state in ENDED


class OutputReader:
    """Shows the output of each attempt of a job as soon as it is known of, in a thread of its own."""

    def __init__(self, client: Any, name: str, rank: int, screen: Screen) -> None:
        self._client, self._name, self._rank, self._screen = client, name, rank, screen
        self._news = threading.Condition()
        self._known: list[int] = []  # numbers of attempts, oldest first
        self._over = self._stopped = False
        self._thread = threading.Thread(target=self._read_all, daemon=True)

    def knows(self, job: Any) -> None:
        """What is known of the job now."""
        numbers = [one.number or position for position, one in enumerate(job.past_attempts, 1)]
        with self._news:
            self._known = [*numbers, attempt_number(job)] if job.attempt.epoch else numbers
            self._over = _ended(job)
            self._news.notify()
        if not self._thread.ident:
            self._thread.start()

    def finish(self) -> None:
        """Returns when all that the ended job has printed is shown, as far as its nodes can be reached."""
        if self._thread.ident:
            self._thread.join(_LAST_OUTPUT_S)
            if self._thread.is_alive():
                self._screen.state(f"more of its output: whaleflux logs {self._name}")

    def stop(self) -> None:
        """Shows nothing more."""
        with self._news:
            self._stopped = True
            self._news.notify()

    def _read_all(self) -> None:
        number = 0
        while number := self._after(number):
            try:
                self._read(number)
            except StatusError as error:
                if not self._stopped:
                    self._screen.state(f"the output of attempt {number} is not shown to its end: {error.message}")
            except Exception as error:  # the channel was closed under it
                if not self._stopped:
                    self._screen.state(f"the output is shown no more: {error}")
                return

    def _after(self, number: int) -> int:
        """The next attempt, waited for; 0: there will be none."""
        with self._news:
            while True:
                later = [known for known in self._known if known > number]
                if later or self._over or self._stopped:
                    return later[0] if later and not self._stopped else 0
                self._news.wait()

    def _read(self, number: int) -> None:
        from whaleflux.sdk.resume import FOLLOW_OUTAGE_S
        from whaleflux.v1 import scheduler_pb2

        request = scheduler_pb2.StreamLogsRequest(
            name=self._name, rank=max(self._rank, 0), all_ranks=self._rank < 0, follow=True, attempt=number
        )
        for chunk in self._client.read_logs(request, outage_s=FOLLOW_OUTAGE_S):
            if self._stopped:
                return
            self._screen.lines(chunk)
