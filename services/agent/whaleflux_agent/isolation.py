"""Work is not control: whether ranks run as users of their own here, as whom each task runs, and what of the node is its own.

Decided once, when the agent starts, by trying it; what cannot be had is said in the node's facts. The walls themselves are
`runtime/walls.py`. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import grp
import hashlib
import json
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from whaleflux import names, telemetry
from whaleflux.errors import FieldViolation, InvalidArgument, ResourceExhausted
from whaleflux.telemetry import Event
from whaleflux.v1 import inventory_pb2
from whaleflux_agent.core.task_users import SYSTEM_USER_PREFIX, IsolationSettings, gid_after, uid_of
from whaleflux_agent.runtime import walls
from whaleflux_agent.runtime.acting import as_user
from whaleflux_agent.runtime.api import LaunchFailed
from whaleflux_agent.state import TaskMeta, read_json, write
from whaleflux_agent.task_folders import TaskFolders

WALLS = Path(walls.__file__)
UID, NONE = "uid", "none"
_TRY_S = 20.0
_OPEN = (
    "work",
    "tasks",
    "ranks",
    "datasets",
    "homes",
    "checkpoints",
)  # folders in which some of what is there is tasks' own
_PASSED = 0o710  # a folder that the group passes through and cannot list
_DEVICES = ("/dev/dri", "/dev/infiniband", "/dev/nvidia-caps")
_TMP = ("/tmp", "/var/tmp")  # compared with
_SHORT_CHARS = 60  # of a folder for temporary files: programs put sockets there, whose paths are short
_log = telemetry.get_logger("whaleflux.agent")


@dataclass(frozen=True, slots=True)
class TaskUser:
    """As whom a task runs."""

    uid: int
    gid: int  # of this attempt alone
    name: str
    groups: tuple[int, ...]


@dataclass(slots=True)
class _Record:
    """Who has which number, durably."""

    queues: dict[str, int]  # users
    attempts: dict[str, int]  # groups
    last_gid: int


class Isolation:
    """What this node offers, and each task's part of it. `playing`: the machine is a profile."""

    def __init__(self, settings: IsolationSettings, state: Path, checkpoints: Path, *, playing: bool = False) -> None:
        self._settings, self._state = settings, state.resolve()
        self.private, self.reason = False, ""
        self._groups: tuple[int, ...] = ()
        if settings.wanted == NONE:
            self.reason = "task_isolation is none"
        elif playing and settings.wanted == "auto":
            self.reason = "this machine is played; to isolate all the same: --task-isolation required"
        elif os.geteuid() != 0:
            self.reason = "the agent is not root"
        else:
            self._begin()
        self.kind = NONE if self.reason else UID
        self.folders = TaskFolders(
            self._state,
            checkpoints,
            everybody=settings.ids.everybody,
            private=self.private,
            own_checkpoints=settings.own_checkpoint_folders,
        )
        _log.info(Event.ISOLATION_CHOSEN, kind=self.kind, reason=self.reason, private_folders=self.private)

    @property
    def refused(self) -> str:
        """Why no work may run here, with what to do; "" where it may."""
        if self._settings.wanted != "required" or self.kind == UID:
            return ""
        return f"task_isolation is required, and ranks cannot run as users of their own here: {self.reason}; mend that, or choose --task-isolation auto"

    def facts(self, limited_by: frozenset[str]) -> inventory_pb2.NodeIsolation:
        """What is said of this node. `limited_by`: the control groups' controllers that there are."""
        uid = self.kind == UID
        by = sorted(limited_by | ({"uid"} if uid and self._settings.processes else set()))
        return inventory_pb2.NodeIsolation(
            kind=self.kind,
            reason=self.reason,
            task_uids=str(self._settings.ids) if uid else "",
            private_folders=self.private,
            limits="enforced" if limited_by >= {"cpu", "memory", "pids"} else "watched",
            limited_by=by,
        )

    def words(self, meta: TaskMeta, limited_by: frozenset[str], *, image: bool = False) -> str:
        """How a task is kept apart, for people."""
        limits = "limits enforced" if limited_by >= {"cpu", "memory", "pids"} else "memory watched"
        if image:
            user = self.container_user(meta)
            return f"container, {f'uid {user[0]}' if user else 'the user of its image'}, {limits}"
        if not meta.uid:
            return f"none ({self.reason}), {limits}"
        return f"uid {meta.uid}, {'own folders, ' if self.private else ''}{limits}"

    def container_user(self, meta: TaskMeta) -> tuple[int, int] | None:
        """User and group of a task's containers; None: whom the image says, which may be root."""
        if self._settings.container_root:
            return None
        if meta.uid:
            return meta.uid, meta.gid
        return (os.geteuid(), os.getegid()) if os.geteuid() else None

    def container_wall(self, meta: TaskMeta) -> dict[str, Any]:
        """What a task's containers give up, beside capabilities and privileges."""
        wall: dict[str, Any] = {"core_bytes": self._settings.core_bytes, "shm": meta.tmp}
        if user := self.container_user(meta):
            wall |= {
                "uid": user[0],
                "gid": user[1],
                "groups": list(meta.groups),
                "home": str(self.container_home(meta)),
            }
        return wall

    def container_home(self, meta: TaskMeta) -> Path | None:
        """What its containers find as their home; None: the image's own."""
        user = self.container_user(meta)
        return None if user is None else self._state / "homes" / str(user[0])

    def _begin(self) -> None:
        """Opens the agent's folder as far as tasks need it, and tries a wall. Sets `reason` where it does not stand."""
        self._groups = tuple(
            sorted({self._settings.ids.everybody, *_device_groups(), *_group_ids(self._settings.groups)})
        )
        for queue, user in self._settings.users:
            _system_user(user, f"task_users.{queue}")
        try:
            self._open_folders()
            self.reason = self._trial()
        except OSError as error:
            self.reason = f"{error.filename or self._state}: {error.strerror or error}"
        if self.reason:
            self._groups = ()

    def _open_folders(self) -> None:
        """Tasks pass through the agent's folder to what is theirs, and neither list nor read what is not."""
        everybody = self._settings.ids.everybody
        for name in _OPEN:
            (self._state / name).mkdir(exist_ok=True, mode=0o700)
        for entry in os.scandir(self._state):
            if entry.name not in _OPEN and not entry.is_symlink():
                os.chmod(entry.path, entry.stat().st_mode & 0o700)
        for path in (*(self._state / name for name in _OPEN), self._state):
            os.chown(path, 0, everybody, follow_symlinks=False)
            os.chmod(path, _PASSED)

    def _trial(self) -> str:
        """Why a wall does not stand here, "" when it does; `private` says whether with a view of its own."""
        ids, work = self._settings.ids, self._state / "work"
        with as_user(ids.last, ids.last, (ids.everybody,)):
            closed = next((path for path in (*reversed(work.parents), work) if not _passable(path)), None)
        if closed is not None:
            return f"users of tasks cannot pass {closed}: use a state folder that they reach, as --state-dir /var/lib/whaleflux"
        trial = {"uid": ids.last, "gid": ids.last, "groups": list(self._groups)}
        if self._settings.private_folders:
            with tempfile.TemporaryDirectory(prefix="trial-", dir=self._state) as tmp:
                why = _tried({**trial, "view": {"hidden": str(self._state), "shown": [[str(work), "rw"]], "tmp": tmp}})
            self.private = not why
            if self.private:
                return ""
            _log.warning(Event.ISOLATION_PARTIAL, reason=why)
        return _tried(trial)

    # who runs what

    @property
    def reader(self) -> int:
        """The id of what all tasks may read of this node, and no more; 0: what their agent may."""
        return self._settings.ids.everybody if self.kind == UID else 0

    @property
    def processes(self) -> int:
        """Most that a rank may have at a time; 0: no limit."""
        return self._settings.processes

    def user_for(self, task: str, job: str) -> TaskUser | None:
        """As whom a new attempt of a job runs; None: as the agent. Raises LaunchFailed."""
        if self.kind == NONE:
            return None
        queue = names.split(job, "queues", "jobs", field="job")[0]
        record, ids = self._record(), self._settings.ids
        try:
            name, uid = self._named(queue) or ("", uid_of(queue, ids, record.queues))
            gid = gid_after(record.last_gid, ids, {*record.attempts.values(), *self._left_gids()})
        except (ResourceExhausted, InvalidArgument) as none:
            raise LaunchFailed(none.message) from None
        if not name:
            record.queues[queue] = uid
        record.attempts[task] = record.last_gid = gid
        self._save(record)
        return TaskUser(uid, gid, name or f"{SYSTEM_USER_PREFIX}{queue}"[:32], self._groups_of(name))

    def forget(self, task: str) -> None:
        """Nothing of an attempt is left: its group may be another's, in its turn."""
        if self.kind == UID and (record := self._record()).attempts.pop(task, None) is not None:
            self._save(record)

    def _record(self) -> _Record:
        known = read_json(self._state / "task-users.json")
        last = known.get("last_gid")
        last = last if isinstance(last, int) else self._first_gid()
        return _Record(_numbers(known.get("queues")), _numbers(known.get("attempts")), last)

    def _first_gid(self) -> int:
        """Another one for each agent: several on one host hardly meet."""
        digest = hashlib.sha256(str(self._state).encode()).digest()
        return self._settings.ids.first + int.from_bytes(digest[:8], "big") % self._settings.ids.size

    def _save(self, record: _Record) -> None:
        write(self._state / "task-users.json", json.dumps(asdict(record)).encode())

    def _left_gids(self) -> set[int]:
        """Groups of working folders that are still there."""
        return {entry.stat(follow_symlinks=False).st_gid for entry in os.scandir(self._state / "work")}

    def _named(self, queue: str) -> tuple[str, int] | None:
        """The system user of a queue, by the setting or by its name."""
        chosen = dict(self._settings.users).get(queue)
        name = chosen or SYSTEM_USER_PREFIX + queue
        if chosen is None:
            try:
                pwd.getpwnam(name)
            except KeyError:
                return None
        return name, _system_user(name, f"task_users.{queue}")

    def _groups_of(self, system_user: str) -> tuple[int, ...]:
        """Beside the attempt's own: of all tasks, of devices, as set; and a system user's."""
        found = set(self._groups)
        if system_user:
            found |= set(os.getgrouplist(system_user, pwd.getpwnam(system_user).pw_gid))
        return tuple(sorted(found - {0}))

    def let_pass(self, folder: Path) -> None:
        """Tasks may pass through a folder of the agent to what is theirs. Raises OSError."""
        if self.kind == UID:
            os.chown(folder, 0, self._settings.ids.everybody, follow_symlinks=False)
            os.chmod(folder, _PASSED)

    def wall(self, meta: TaskMeta, shown: Mapping[str, str]) -> dict[str, Any]:
        """What a task's processes give up (`runtime/walls.py`). `shown`: paths of its own, with how."""
        wall: dict[str, Any] = {"core_bytes": self._settings.core_bytes}
        if not meta.uid:
            return wall
        wall |= {"uid": meta.uid, "gid": meta.gid, "groups": list(meta.groups), "processes": self._settings.processes}
        if self.private:
            seen = [[path, how] for path, how in shown.items() if self.folders.covers(path)]
            wall["view"] = {
                "hidden": str(self._state), "shown": seen, "tmp": meta.tmp, "shm_bytes": self._settings.shm_bytes,
            }  # fmt: skip
        return wall


def with_user(meta: TaskMeta, user: TaskUser | None, tmp: str) -> TaskMeta:
    """What is kept about a task whose attempt is about to begin."""
    if user is None:
        return replace(meta, tmp=tmp)
    return replace(meta, tmp=tmp, uid=user.uid, gid=user.gid, user=user.name, groups=user.groups)


def _tried(wall: Mapping[str, Any]) -> str:
    """Why a wall does not stand on this node, "" when it does."""
    command = [sys.executable, "-I", "-S", str(WALLS), json.dumps(wall)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TRY_S, env={}, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it cannot be tried: {error}"
    last = done.stderr.strip().rpartition("\n")[2]
    return "" if done.returncode == 0 else (last.partition(": ")[2] or last or f"exit code {done.returncode}")


def _passable(folder: Path) -> bool:
    try:
        os.stat(f"{folder}/.")
    except PermissionError:
        return False
    return True


def _numbers(found: object) -> dict[str, int]:
    known = found if isinstance(found, dict) else {}
    return {name: number for name, number in known.items() if isinstance(name, str) and isinstance(number, int)}


def _system_user(name: str, field: str) -> int:
    """Raises InvalidArgument."""
    try:
        uid = pwd.getpwnam(name).pw_uid
    except KeyError:
        raise InvalidArgument(FieldViolation(field, f"there is no user {name!r} on this node")) from None
    if uid == 0:
        raise InvalidArgument(FieldViolation(field, f"{name!r} is root: work never runs as root"))
    return uid


def _group_ids(groups: Iterable[str]) -> set[int]:
    """Raises InvalidArgument."""
    found = set[int]()
    for group in groups:
        try:
            found.add(int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid)
        except KeyError:
            raise InvalidArgument(FieldViolation("task_groups", f"there is no group {group!r} on this node")) from None
    return found


def _device_groups() -> set[int]:
    """Groups that may use the devices of GPUs and fast networks, where not everybody may."""
    paths = [f"/dev/{name}" for name in ("nvidiactl", "nvidia-uvm", "nvidia0", "kfd")]
    for folder in _DEVICES:
        with contextlib.suppress(OSError):
            paths += [entry.path for entry in os.scandir(folder)]
    found = set[int]()
    for path in paths:
        with contextlib.suppress(OSError):
            about = os.stat(path)
            if about.st_gid and about.st_mode & stat.S_IWGRP and not about.st_mode & stat.S_IWOTH:
                found.add(about.st_gid)
    return found
