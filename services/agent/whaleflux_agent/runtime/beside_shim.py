"""Parent of a command that somebody runs beside a rank, small and alone as `shim.py`: whatever the command starts ends with it.

It adopts what its command orphans, so that nothing of the session leaves its family, and it lives no longer than the socket to
the agent: when the agent ends the session, or dies, everything below is ended within two seconds. The command has the wall of
its rank (`walls.py`): whoever may run one gains nothing over the rank.

    in:   one line of JSON (command, environment, directory, cgroups, terminal, wall, rank), then lines: "signal <number>"
    out:  lines: "exit <code>" once the command has ended
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import termios
import time

if __package__:
    from whaleflux_agent.runtime import walls
else:  # alone: what is ours is beside it
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import walls  # type: ignore[import-not-found, no-redef]

    del sys.path[0]

GRACE_S = 1.0  # from SIGHUP and SIGTERM to SIGKILL
LOOK_S = 0.05


def read_plan(control: int) -> tuple[dict, bytes]:  # type: ignore[type-arg]  # typing costs memory
    """The first line, and what came behind it."""
    buffer = b""
    while b"\n" not in buffer:
        data = os.read(control, 65536)
        if not data:
            os._exit(0)  # the agent is gone, nothing was begun
        buffer += data
    line, _, rest = buffer.partition(b"\n")
    return json.loads(line), rest


def adopt_orphans() -> None:
    """As in shim.py."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    except Exception:
        pass


def execute(plan: dict) -> None:  # type: ignore[type-arg]
    """Turns a fresh child into the command. Never returns."""
    command, wall, code = plan["command"], plan["wall"], 126
    try:
        os.setsid()
        if plan["terminal"]:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        for folder in plan["cgroups"]:
            with open(folder + "/cgroup.procs", "w") as file:
                file.write("0")
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError as error:
        os.write(2, f"whaleflux: {error}\n".encode())
    try:
        if "view" in wall:
            walls.join(view_of(**plan["rank"]))
        walls.enter(wall)
        os.chdir(plan["directory"])
        os.execvpe(command[0], command, plan["environment"])  # noqa: S606  # no shell is the point
    except BaseException as error:
        code = 127 if isinstance(error, FileNotFoundError) else code  # as shells say it
        why = getattr(error, "strerror", None) or error
        os.write(2, f"whaleflux: cannot execute {command[0]!r}: {why}{walls.hint(wall, error)}\n".encode())
    os._exit(code)


def view_of(pid: int, start_time: int) -> list:  # type: ignore[type-arg]
    """What the rank sees. Raises OSError when it has ended: a process that got its number since is somebody else's."""
    view: list = walls.opened(pid)  # type: ignore[type-arg]
    with open(f"/proc/{pid}/stat") as file:
        if int(file.read().rpartition(")")[2].split()[19]) != start_time:
            raise ProcessLookupError("the rank has ended")
    return view


def reap(command: int, control: int) -> bool:
    """False when no child is left, adopted ones included."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        if pid == command:
            try:
                os.write(control, f"exit {os.waitstatus_to_exitcode(status)}\n".encode())
            except OSError:
                pass  # nobody asks any more


def signal_children(*numbers: int) -> None:
    """Each child that is left, with its group: what they leave behind becomes a child, and has its turn."""
    me = os.getpid()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            if int(fields[1]) == me:
                for number in numbers:
                    send(int(entry), number)
        except OSError:
            pass  # it has ended


def send(pid: int, number: int) -> None:
    """To the group of a child, if it leads one, else to it alone."""
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except OSError:
        pass  # it has ended


def is_ours(pid: int) -> bool:
    """Whether it is a child that was not reaped: after that its number may be somebody else's."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def end_all(command: int, control: int) -> None:
    """Returns when nothing is left."""
    deadline = time.monotonic() + GRACE_S
    signal_children(signal.SIGHUP, signal.SIGTERM, signal.SIGCONT)
    while reap(command, control):
        if time.monotonic() >= deadline:
            signal_children(signal.SIGKILL)
        time.sleep(LOOK_S)


def obey(command: int, control: int, rest: bytes, woken: int) -> None:
    """Passes signals on until the agent hangs up."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(woken, select.POLLIN)
    reap(command, control)
    while True:
        while b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            word, _, number = line.partition(b" ")
            if word == b"signal" and is_ours(command):
                send(command, int(number))
        ready = {descriptor for descriptor, _ in poller.poll()}
        if woken in ready:
            os.read(woken, 4096)
            reap(command, control)
        if control in ready:
            data = os.read(control, 65536)
            if not data:
                return
            rest += data


def main(control: int) -> None:
    plan, rest = read_plan(control)
    adopt_orphans()
    woken, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    command = os.fork()
    if command == 0:
        signal.set_wakeup_fd(-1)
        for descriptor in (control, woken, waking):
            os.close(descriptor)
        execute(plan)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)  # so that its pipes end with the command
    try:
        obey(command, control, rest, woken)
    except OSError:
        pass  # the socket broke: the agent is gone
    end_all(command, control)


if __name__ == "__main__":
    main(int(sys.argv[1]))
