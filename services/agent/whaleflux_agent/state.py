"""What the agent must not forget: files below its state directory, each written whole and durably.

    desired.pb          what the control plane last wanted
    epochs.json         highest accepted epoch of each job, newest jobs last
    sequence            reports below this number may have been sent
    reports/<n>.pb      reports that the scheduler has not acknowledged
    tasks/<task>/       one folder per task: task.pb, meta.json, result.pb, logs, the runtime's records
    code/<sha256>       packed code of jobs, unpacked into tasks/<task>/code; may be deleted
    checkpoint-outbox/<n>.pb  checkpoint pieces that the checkpoint service has not taken

All of it is read and written in one thread, so that writes keep their order and the event loop never waits for a disk.
A full disk makes that thread wait for room: nothing counts before it is durable, and what runs goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import quote, unquote

from google.protobuf.message import DecodeError

from whaleflux import telemetry
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2

P = ParamSpec("P")
R = TypeVar("R")
EPOCHS_KEPT = 10_000
SEQUENCES_RESERVED = 1000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
LOOK_FOR_ROOM_EVERY_S = 0.5
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class TaskMeta:
    """What the agent itself chose for a task."""

    token: str
    rendezvous: str = ""  # chosen here, for group rank 0
    endpoint: str = ""  # host:port, for services
    ports: tuple[int, ...] = ()
    traceparent: str = ""  # of the launch span
    stopping: str = ""  # why its end was ordered; "": it was not
    computing_before: tuple[int, ...] = ()  # pids that computed on its GPUs before it began
    stuck: str = ""  # what of it cannot be ended, with evidence; "": nothing is known to
    reaped: bool = False  # nothing of it is left on the node
    working_directory: str = ""  # of its ranks; "": they were not started
    uid: int = 0  # as whom its ranks run; 0: as the agent
    gid: int = 0  # of this attempt alone
    user: str = ""  # name of who that is
    groups: tuple[int, ...] = ()  # that it is in, too
    isolation: str = ""  # how it is kept apart, for people
    tmp: str = ""  # folder for its temporary files; "": it has none


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task as found on disk."""

    desired: agent_pb2.DesiredTask
    meta: TaskMeta
    result: agent_pb2.TaskReport | None  # its last report, when that was a final one


class StateDir:
    """The files. Methods block; call them through `run`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._closing = threading.Event()
        for folder in (root, root / "reports", root / "tasks", root / "checkpoint-outbox", root / "work", self._trash):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs `function` in the one disk thread, after all that was asked for before; again when the disk was full."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: self._with_room(lambda: function(*args, **kwargs))
        )

    def _with_room(self, function: Callable[[], R]) -> R:
        """What `function` returns once there is room for what it writes; raises its OSError when closing."""
        full = False
        while True:
            try:
                return function()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if not full:
                    _log.error(Event.DISK_FULL, folder=str(self.root), reason=error.strerror)
                full = True
                if self._closing.wait(LOOK_FOR_ROOM_EVERY_S):
                    raise

    def close(self) -> None:
        """Finishes what is being written, unless there is no room for it."""
        self._closing.set()
        self._thread.shutdown(wait=True)

    # what is desired

    def load_desired(self) -> agent_pb2.DesiredTasks | None:
        """The last desired set; None when it cannot be read: that nothing is desired is another thing to say."""
        path = self.root / "desired.pb"
        try:
            return agent_pb2.DesiredTasks.FromString(path.read_bytes()) if path.exists() else agent_pb2.DesiredTasks()
        except (OSError, DecodeError) as error:
            _log.error(Event.RECORD_UNREADABLE, key=str(path), reason=str(error))
            return None

    def save_desired(self, desired: agent_pb2.DesiredTasks) -> None:
        write(self.root / "desired.pb", desired.SerializeToString())

    # epochs

    def load_epochs(self) -> dict[str, int]:
        """Highest accepted epoch by job."""
        content = read_json(self.root / "epochs.json")
        return {job: epoch for job, epoch in content.items() if isinstance(epoch, int)}

    def save_epochs(self, epochs: dict[str, int]) -> None:
        """Keeps the jobs that were accepted last; a dictionary keeps its order."""
        newest = dict(list(epochs.items())[-EPOCHS_KEPT:])
        write(self.root / "epochs.json", json.dumps(newest).encode())

    # reports

    def load_reports(self) -> list[agent_pb2.TaskReport]:
        """Unacknowledged reports in order."""
        reports = []
        for path in sorted((self.root / "reports").glob("*.pb")):
            with contextlib.suppress(OSError, DecodeError):
                reports.append(agent_pb2.TaskReport.FromString(path.read_bytes()))
        return reports

    def save_report(self, report: agent_pb2.TaskReport) -> None:
        write(self.root / "reports" / f"{report.sequence:016d}.pb", report.SerializeToString())

    def drop_reports(self, sequences: list[int]) -> None:
        for sequence in sequences:
            (self.root / "reports" / f"{sequence:016d}.pb").unlink(missing_ok=True)

    def reserve_sequences(self) -> range:
        """Numbers that no report has ever had, also across a crash."""
        path = self.root / "sequence"
        first = int(path.read_text()) if path.exists() else 1
        write(path, str(first + SEQUENCES_RESERVED).encode())
        return range(first, first + SEQUENCES_RESERVED)

    # tasks

    def task_folder(self, task: str) -> Path:
        """The folder of a task; its id cannot name another place."""
        name = quote(task, safe="")
        return self.root / "tasks" / (f"%2E{name[1:]}" if name.startswith(".") else name)

    def load_tasks(self) -> list[TaskRecord]:
        """Every task that has a readable record, oldest first. Processes of others are reported as unknown."""
        records = []
        for folder in sorted((self.root / "tasks").iterdir(), key=lambda path: path.stat().st_mtime):
            try:
                desired = agent_pb2.DesiredTask.FromString((folder / "task.pb").read_bytes())
                meta = _meta(json.loads((folder / "meta.json").read_text()))
                result = folder / "result.pb"
                records.append(
                    TaskRecord(
                        desired,
                        meta,
                        agent_pb2.TaskReport.FromString(result.read_bytes()) if result.exists() else None,
                    )
                )
            except (OSError, DecodeError, ValueError, TypeError, KeyError) as error:
                _log.error(Event.RECORD_UNREADABLE, key=str(folder), reason=str(error))
        return records

    def save_task(self, desired: agent_pb2.DesiredTask, meta: TaskMeta) -> Path:
        folder = self.task_folder(desired.task.id)
        folder.mkdir(mode=0o700, exist_ok=True)
        write(folder / "task.pb", desired.SerializeToString())
        self.save_meta(desired.task.id, meta)
        return folder

    def save_meta(self, task: str, meta: TaskMeta) -> None:
        write(self.task_folder(task) / "meta.json", json.dumps(asdict(meta)).encode())

    def save_result(self, report: agent_pb2.TaskReport) -> None:
        write(self.task_folder(report.task) / "result.pb", report.SerializeToString())

    def collect(self, keep_tasks: int, in_use: frozenset[str]) -> list[str]:
        """Takes the oldest task folders beyond `keep_tasks` away, never one that is in use; returns their ids.

        `empty_trash` deletes them: what jobs have written may be a million files, and whoever writes here waits for no such thing.
        """
        folders = sorted((self.root / "tasks").iterdir(), key=lambda path: path.stat().st_mtime)
        spare = [folder for folder in folders if unquote(folder.name) not in in_use]
        gone = spare[: max(0, len(spare) - keep_tasks)]
        for folder in gone:
            os.rename(folder, self._trash / f"{time.time_ns()}")
        return [unquote(folder.name) for folder in gone]

    def empty_trash(self) -> None:
        """Deletes what was taken away, also by an earlier agent. Takes long: not for the disk thread."""
        for folder in list(self._trash.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def _trash(self) -> Path:
        return self.root / "trash"


@contextlib.contextmanager
def exclusive(root: Path, wait_s: float = 15.0, tell: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Holds `root` for this process: two agents on one state would each kill what the other starts.

    Waits for an agent that is about to stop, which it tells; raises InvalidArgument when it does not.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline, told = time.monotonic() + wait_s, False
    with open(root / "lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    tell(f"another agent runs on {root}; waiting {wait_s:g} s for it to stop")
                    told = True
                if time.monotonic() >= deadline:
                    raise InvalidArgument(FieldViolation("state_dir", f"{root} is in use by another agent")) from None
            time.sleep(0.1)
        yield


def write(path: Path, content: bytes) -> None:
    """Replaces `path` atomically and durably; readable by the owner alone."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a crash; or a link, which a container may have put there
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _meta(content: dict[str, Any]) -> TaskMeta:
    lists = {name: tuple(content.get(name, ())) for name in ("ports", "computing_before", "groups")}
    return TaskMeta(**{**content, **lists})


def read_json(path: Path) -> dict[str, object]:
    """The object in `path`; empty when it is absent or unreadable."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
