"""Parent of a task's ranks, small and alone: starts them, waits, and writes down how each ended.

The agent may be restarted or killed at any time; this process keeps the exit codes for the next one. It imports
nothing of ours (run as `python -I -S shim.py <folder>`) and only what an idle interpreter has at hand, about 10 MB.

    launch.json    in: ranks with command, environment, log; working directory; cgroup folders
    started.json   out: pids with start times, once every rank exists
    exit-<n>.json  out: exit code and resource usage of the n-th rank of this node
"""

from __future__ import annotations

import json
import os
import signal
import sys

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


def start_time(pid: int) -> int:
    """Clock ticks since boot at which `pid` began (proc(5), field 22): with the pid it names a process for good."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def become(command: list[str], environment: dict[str, str], log: str, cgroups: list[str], directory: str) -> None:
    """Turns a fresh child into a rank. Never returns."""
    try:
        os.setsid()
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)  # an ignored signal would stay ignored after exec
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for folder in cgroups:
            with open(folder + "/cgroup.procs", "w") as file:
                file.write("0")
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        prefer_as_victim()
        os.chdir(directory)
        os.execvpe(command[0], command, environment)  # noqa: S606  # no shell is the point
    except BaseException as error:
        os.write(2, f"whaleflux: cannot execute {command[0]!r}: {error}\n".encode())
    os._exit(127)


def prefer_as_victim() -> None:
    """When memory runs out, the kernel should take the work, not the agent."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass  # not ours to raise in this container


def reap(ranks: dict[int, int], ended: dict[int, object]) -> None:
    """Moves each rank that has ended to `ended`, by position; `ranks` maps the pids that are left to theirs."""
    while ranks:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        if pid in ranks:
            ended[ranks.pop(pid)] = {
                "code": os.waitstatus_to_exitcode(status),
                "max_rss_bytes": usage.ru_maxrss * 1024,
                "user_s": usage.ru_utime,
                "system_s": usage.ru_stime,
            }


def write_down(ended: dict[int, object], folder: str) -> None:
    """Writes how ranks ended; what a full disk does not take stays in `ended`."""
    for position, record in list(ended.items()):
        try:
            write(f"{folder}/exit-{position}.json", record)
        except OSError:
            return
        del ended[position]


def forward(number: int, ranks: dict[int, int]) -> None:
    for pid in ranks:
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            os.kill(pid, number)  # it has not become a group of its own yet


def main(folder: str) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    with open(folder + "/launch.json") as file:
        plan = json.load(file)
    ranks: dict[int, int] = {}
    executed, executing = os.pipe()  # closed by exec: at its end every rank is what it should be, or has failed
    for index, rank in enumerate(plan["ranks"]):
        pid = os.fork()
        if pid == 0:
            become(**rank, directory=plan["working_directory"])
        ranks[pid] = index
    os.close(executing)
    os.read(executed, 1)
    born = [{"pid": pid, "start_time": start_time(pid)} for pid in ranks]
    me = {"pid": os.getpid(), "start_time": start_time(os.getpid())}
    write(folder + "/started.json", {"shim": me, "ranks": born})
    ended: dict[int, object] = {}
    while ranks or ended:
        came = signal.sigtimedwait(WATCHED, 1.0) if ended else signal.sigwaitinfo(WATCHED)
        if came is not None and came.si_signo != signal.SIGCHLD:
            forward(came.si_signo, ranks)
        reap(ranks, ended)
        write_down(ended, folder)


if __name__ == "__main__":
    main(sys.argv[1])
