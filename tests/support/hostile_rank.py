"""A rank that tries to get at what is not its own: `python hostile_rank.py`, with what to try in the variable TARGETS.

Imports nothing of ours: it runs as a user who may not read this checkout. Each attempt is a function; what it returns is what was
gained, an exception is what stood in the way. `attempts.json` in the working folder says which.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

T = json.loads(os.environ["TARGETS"])
libc = ctypes.CDLL(None, use_errno=True)


def checked(result, what):
    if result == -1:
        raise OSError(ctypes.get_errno(), what)
    return result


def read(path):
    with open(path, "rb") as file:
        return f"{path}: {file.read(60)!r}"


def connected(path):
    with socket.socket(socket.AF_UNIX) as tried:
        tried.connect(path)
        return path


def wrote(path, content="1"):
    with open(path, "a") as file:
        file.write(content)
    return path


def reads_the_key_by_path():
    return read(T["key"])


def reads_the_key_through_the_agents_root():
    return read(f"/proc/{T['agent']}/root{T['key']}")


def reads_the_key_by_a_hard_link():
    os.link(T["key"], "linked")
    return read("linked")


def reads_the_key_by_a_symbolic_link():
    os.symlink(T["key"], "pointed")
    return read("pointed")


def reads_the_agents_environment():
    return read(f"/proc/{T['agent']}/environ")


def reads_the_agents_memory():
    return read(f"/proc/{T['agent']}/mem")


def traces_the_agent():
    return checked(libc.ptrace(16, T["agent"], 0, 0), "ptrace")


def takes_a_descriptor_of_the_agent():
    pidfd = checked(libc.syscall(434, T["agent"], 0), "pidfd_open")
    return checked(libc.syscall(438, pidfd, 0, 0), "pidfd_getfd")


def enters_the_agents_namespaces():
    return checked(libc.setns(os.open(f"/proc/{T['agent']}/ns/mnt", os.O_RDONLY), 0), "setns")


def kills_the_agent():
    os.kill(T["agent"], signal.SIGKILL)
    return "sent"


def kills_its_own_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    return "sent"


def kills_a_rank_of_another_queue():
    os.kill(T["victim"], signal.SIGKILL)
    return "sent"


def reads_what_is_desired_of_the_node():
    return read(f"{T['state']}/desired.pb")


def reads_what_is_desired_by_a_hard_link():
    os.link(f"{T['state']}/desired.pb", "linked-desired")
    return read("linked-desired")


def lists_the_agents_folder():
    return [
        name for name in os.listdir(T["state"]) if name not in ("work", "tasks", "homes", "ranks", "checkpoints")
    ] or denied()


def denied():
    raise PermissionError("only what is its own is there")


def reads_its_own_record():
    return read(f"{T['folder']}/attempt.json")


def forges_how_it_ended():
    return wrote(f"{T['folder']}/exit-0.json", "{}")


def reads_the_log_of_another_queue():
    return read(f"{T['victim_folder']}/rank-0.log")


def reads_the_work_of_another_queue():
    return os.listdir(T["victim_work"])


def writes_into_the_work_of_another_queue():
    return wrote(f"{T['victim_work']}/planted")


def reads_the_work_of_a_job_of_its_queue():
    return os.listdir(T["peer_work"])


def reads_the_log_of_a_job_of_its_queue():
    return read(f"{T['peer_folder']}/rank-0.log")


def reads_the_environment_of_another_queue():
    return read(f"/proc/{T['victim']}/environ")


def reads_the_environment_of_a_job_of_its_queue():
    return read(f"/proc/{T['peer']}/environ")


def reads_the_command_of_another_queue():
    return read(f"/proc/{T['victim']}/cmdline")


def reads_the_temporary_files_of_another_queue():
    return os.listdir(T["victim_tmp"])


def reads_the_secrets_of_another_queue():
    return [read(path) for path in T["victim_secrets"]]


def speaks_to_the_agent_as_another_task():
    return connected(T["victim_socket"])


def speaks_to_the_agent_by_the_shared_socket():
    return connected(f"{T['state']}/ranks/rank.sock")


def becomes_root():
    os.setuid(0)
    return "root"


def becomes_another_queues_user():
    os.setuid(T["victim_uid"])
    return "another"


def becomes_root_by_a_setuid_program():
    shown = subprocess.run(["./setuid-id", "-u"], capture_output=True, text=True, check=True).stdout.strip()
    return shown if shown == "0" else denied()


def mounts():
    return checked(libc.mount(b"none", b"/mnt", b"tmpfs", 0, None), "mount")


def makes_a_device():
    os.mknod("disk", 0o60600, os.makedev(8, 0))
    return "made"


def has_capabilities():
    with open("/proc/self/status") as file:
        sets = {line.split()[0]: line.split()[1] for line in file if line.startswith(("Cap", "NoNewPrivs"))}
    wrong = {name: value for name, value in sets.items() if int(value, 16) and name != "NoNewPrivs:"}
    return wrong if wrong or sets["NoNewPrivs:"] != "1" else denied()


def raises_its_own_limit():
    with open("/proc/self/cgroup") as file:
        group = next(line.strip()[3:] for line in file if line.startswith("0::"))
    for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if os.path.exists(f"{mount}{group}/cgroup.procs"):
            return wrote(f"{mount}{group}/cgroup.procs", "0")
    denied()


def forks_without_end():
    children = []
    try:
        while len(children) < 4 * T["processes"]:
            children.append(os.fork())
            if children[-1] == 0:
                time.sleep(60)
                os._exit(0)
        return len(children)
    except BlockingIOError:
        raise PermissionError(f"stopped after {len(children)}") from None
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def leaves_a_core_file_with_its_secrets():
    if os.fork() == 0:
        os.abort()
    os.wait()
    found = [name for name in os.listdir(".") if name.startswith("core")]
    return found or denied()


def raises_its_bound_of_core_files():
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
    return "raised"


def sees_others_in_the_list_of_processes():
    owners = {entry: os.stat(f"/proc/{entry}").st_uid for entry in os.listdir("/proc") if entry.isdigit()}
    return [entry for entry, owner in owners.items() if owner != os.getuid()] or denied()


def litters():
    """What is to be gone with the attempt."""
    for path in T["litter"]:
        wrote(path, "x" * 1000)
    checked(libc.shmget(T["key_of_memory"], 4096, 0o1600), "shmget")


def leaves_a_daemon():
    """In a session of its own, with an empty environment, its parent gone."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve(shutil.which("sleep"), ["sleep", "600"], {})
        os._exit(0)
    os.wait()


def main():
    attempts = [
        f
        for name, f in globals().items()
        if callable(f) and f.__module__ == "__main__" and not name[0].isupper() and name[0] != "_"
    ]
    found = {}
    for attempt in attempts:
        if attempt.__name__ in (
            "checked",
            "read",
            "connected",
            "wrote",
            "denied",
            "litters",
            "leaves_a_daemon",
            "main",
        ):
            continue
        try:
            found[attempt.__name__] = {"gained": repr(attempt())}
        except Exception as error:
            found[attempt.__name__] = {"stopped": f"{type(error).__name__}: {error}"}
    litters()
    leaves_a_daemon()
    with open("attempts.part", "w") as file:
        json.dump(found, file)
    os.rename("attempts.part", "attempts.json")
    while not os.path.exists("stop"):
        time.sleep(0.02)
    sys.exit(0)


main()
