"""A rank that proves whose GPU it is: it holds a lock of the file system on each GPU's UUID while it lives.

`python -m tests.support.held_gpu FOLDER SECONDS EXIT_CODE [--stubborn] [--save] [--set-up] [--endless]`. The kernel gives the lock back
when the process is gone, however it went, so two living ranks on one GPU cannot go unseen. Every start, restore and end is one line of
FOLDER/journal; the rank ends after SECONDS, or when FOLDER has a file `finish`, unless it is `--endless`. `--stubborn` ignores SIGTERM;
`--save` takes checkpoints; `--set-up` writes down how often its setup (held_gpu_setup) ran on its node when that was not once.
"""

from __future__ import annotations

import fcntl
import functools
import json
import operator
import os
import signal
import sys
import time
from pathlib import Path

FOLDER, SECONDS, CODE = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
JOB, EPOCH, RANK = os.environ["WHALEFLUX_JOB"], int(os.environ["WHALEFLUX_EPOCH"]), int(os.environ["RANK"])
_GPUS = [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
GPU = _GPUS[int(os.environ["LOCAL_RANK"])] if _GPUS else ""  # of work without GPUs: none
SAVE_EVERY_S = 0.3


def note(what: str, **more: object) -> None:
    """One line, written at once: ranks of all nodes share the journal."""
    line = {"what": what, "job": JOB, "epoch": EPOCH, "rank": RANK, "gpu": GPU, "node": os.environ["WHALEFLUX_NODE"]}
    text = json.dumps({**line, "pid": os.getpid(), "at_s": time.monotonic(), **more}) + "\n"
    journal = os.open(FOLDER / "journal", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(journal, text.encode())
    os.close(journal)


def take_gpu() -> int:
    """The lock; when somebody else has it, that is written down and the rank goes on."""
    (FOLDER / "gpus").mkdir(exist_ok=True)
    lock = os.open(FOLDER / "gpus" / GPU, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note("twice", holder=os.pread(lock, 1000, 0).decode())
        return lock
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{JOB} epoch {EPOCH} rank {RANK} pid {os.getpid()}".encode(), 0)
    return lock


def note_setup() -> None:
    node = os.environ["WHALEFLUX_NODE"].rpartition("/")[2]
    ran = FOLDER / "setup" / f"{JOB.rpartition('/')[2]}-{EPOCH}-{node}"
    times = len(ran.read_bytes()) if ran.exists() else 0
    if times != 1:
        note("not set up", times=times)


def over(until_s: float) -> bool:
    if "--endless" in sys.argv:
        return False
    return time.monotonic() >= until_s or (FOLDER / "finish").exists()


def train(until_s: float) -> None:
    """Steps and saves; a save that fails is no reason to stop, as in a real training."""
    from tests.support import slow_steps
    from whaleflux.sdk.keeper import keeper_of_environment

    keeper = keeper_of_environment(None, int(os.environ["WORLD_SIZE"]))
    step, restored = slow_steps.restore(keeper)
    note("restored", step=step, checkpoint=restored)
    while not over(until_s):
        time.sleep(SAVE_EVERY_S)
        step += 1
        keeper.progress(RANK, step, functools.partial(operator.truediv, 1, step))
        try:
            slow_steps.save(keeper, step)
        except Exception as error:
            note("save failed", why=repr(error))
    keeper.close()


def main() -> None:
    if "--stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lock, until_s = take_gpu() if GPU else None, time.monotonic() + SECONDS
    note("start")
    if "--set-up" in sys.argv:
        note_setup()
    if "--save" in sys.argv:
        train(until_s)
    while not over(until_s):
        time.sleep(0.05)
    note("end")
    if lock is not None:
        os.close(lock)
    sys.exit(CODE)


if __name__ == "__main__":
    main()
