"""Parent of a task's ranks, small and alone: starts them, waits, and writes down how each ended.

The agent may be restarted or killed at any time; this process keeps the exit codes for the next one. It imports
nothing of ours but `walls.py` (run as `python -I -S shim.py <folder>`) and only what an idle interpreter has at hand, about 10 MB.
It stays its agent's user, whoever its ranks become: they can neither end it nor write what it says of them.

    attempt.json   in: ranks with command, environment, log; working directory; cgroup folders; their wall (`walls.py`)
    claim.json     out: its own pid with start time, before the first fork; whoever makes this file decides on the start
    started.json   out: pids with start times, once every rank exists
    exit-<n>.json  out: exit code and resource usage of the n-th rank of this node

It also adopts what its ranks orphan, and stays until that has ended: nothing of the task leaves its family.
"""

from __future__ import annotations

import json
import os
import signal
import sys

if __package__:
    from whaleflux_agent.runtime import walls
else:  # alone: what is ours is beside it
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import walls  # type: ignore[import-not-found, no-redef]

    del sys.path[0]

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
WATCHED = {signal.SIGCHLD, *FORWARDED}


def write(path: str, content: object) -> None:
    """Atomic and durable: the file is whole or absent, also after a power cut."""
    temporary = path + ".tmp"
    with open(temporary, "w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(os.path.dirname(path))


def sync(folder: str) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def claim(folder: str) -> bool:
    """True for the one who may start the ranks. An agent that gave the attempt up has made the file before us."""
    me = {"pid": os.getpid(), "start_time": start_time(os.getpid())}
    try:
        descriptor = os.open(folder + "/claim.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with open(descriptor, "w") as file:
        json.dump(me, file)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)
    return True


def adopt_orphans() -> None:
    """Orphans of this process's descendants become its children: prctl(PR_SET_CHILD_SUBREAPER), which os has not."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    except Exception:
        sys.stderr.write("whaleflux: orphans of ranks cannot be adopted\n")


def start_time(pid: int) -> int:
    """Clock ticks since boot at which `pid` began (proc(5), field 22): with the pid it names a process for good."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def given(folder: str) -> dict[str, str]:
    """The variables in a folder of secrets, each a file of its name. Read by the child that becomes the rank: no record has them."""
    found = {}
    for name in os.listdir(folder) if folder and os.path.isdir(folder) else ():
        with open(f"{folder}/{name}", "rb") as file:
            found[name] = os.fsdecode(file.read())
    return found


def exec_rank(spec: dict, directory: str, wall: dict, view: list) -> None:  # type: ignore[type-arg]  # typing costs memory
    """Turns a fresh child into a rank. Never returns."""
    command = spec["command"]
    try:
        environment = spec["environment"] | given(spec.get("secrets", ""))
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)  # an ignored signal would stay ignored after exec
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for folder in spec["cgroups"]:
            with open(folder + "/cgroup.procs", "w") as file:
                file.write("0")
        output = os.open(spec["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if "uid" in wall:  # programs open /dev/stderr again
            os.fchown(output, wall["uid"], wall["gid"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prefer_as_victim()
        walls.join(view)
        walls.enter(wall)
        os.chdir(directory)
        os.execvpe(command[0], command, environment)  # noqa: S606  # no shell is the point
    except BaseException as error:
        os.write(2, f"whaleflux: cannot execute {command[0]!r}: {error}{walls.hint(wall, error)}\n".encode())
    os._exit(127)


def prefer_as_victim() -> None:
    """When memory runs out, the kernel should take the work, not the agent."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass  # not ours to raise in this container


def reap(ranks: dict[int, int], ended: dict[int, object]) -> bool:
    """Moves each rank that has ended to `ended`, by position; `ranks` maps the pids that are left to theirs.

    False when no child is left, adopted ones included.
    """
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if pid in ranks:
            ended[ranks.pop(pid)] = {
                "code": os.waitstatus_to_exitcode(status),
                "max_rss_bytes": usage.ru_maxrss * 1024,
                "user_s": usage.ru_utime,
                "system_s": usage.ru_stime,
            }


def record_exits(ended: dict[int, object], folder: str) -> None:
    """Writes how ranks ended; what a full disk does not take stays in `ended`."""
    for position, record in list(ended.items()):
        try:
            write(f"{folder}/exit-{position}.json", record)
        except OSError:
            if not os.path.isdir(folder):  # the task is forgotten: nobody will read it
                ended.clear()
            return
        del ended[position]


def forward(number: int, ranks: dict[int, int]) -> None:
    for pid in ranks:
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            os.kill(pid, number)  # it has not become a group of its own yet


def fork_ranks(plan: dict) -> dict[int, int]:  # type: ignore[type-arg]
    """Pids of the ranks with their positions, when each has become its program or has failed to."""
    ranks: dict[int, int] = {}
    wall = plan["wall"]
    view = walls.make_view(wall["view"]) if "view" in wall else []
    executed, executing = os.pipe()  # closed by exec: at its end every rank is what it should be, or has failed
    for position, rank in enumerate(plan["ranks"]):
        pid = os.fork()
        if pid == 0:
            exec_rank(rank, plan["working_directory"], wall, view)
        ranks[pid] = position
    os.close(executing)
    os.read(executed, 1)
    return ranks


def await_signal(ranks: dict[int, int], longest_s: float | None) -> None:
    """Returns when a child has ended or a signal came, which is passed on to the ranks."""
    came = signal.sigwaitinfo(WATCHED) if longest_s is None else signal.sigtimedwait(WATCHED, longest_s)
    if came is not None and came.si_signo != signal.SIGCHLD:
        forward(came.si_signo, ranks)


def main(folder: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    with open(folder + "/attempt.json") as file:
        plan = json.load(file)
    if not claim(folder):
        return
    adopt_orphans()
    ranks = fork_ranks(plan)
    born = [{"pid": pid, "start_time": start_time(pid)} for pid in ranks]
    me = {"pid": os.getpid(), "start_time": start_time(os.getpid())}
    write(folder + "/started.json", {"shim": me, "ranks": born})
    ended: dict[int, object] = {}
    while (children := reap(ranks, ended)) or ended:
        record_exits(ended, folder)
        if children or ended:
            await_signal(ranks, 1.0 if ended else None)


if __name__ == "__main__":
    main(sys.argv[1])
