"""Ranks of a PyTorch program as forks of one process that has imported torch already: torchrun's contract, without its seconds of imports.

The first launch starts that process (`multiprocessing`'s fork server); it ends with the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.small_training_imports"])


def launch(world: int, program: Path, arguments: Sequence[str], errors: Path) -> ForkServerProcess:
    """The leader of the ranks' process group, once it runs: it ends with 0 when all of them do, and ends all when one fails."""
    leader = _CONTEXT.Process(target=_lead, args=(world, program, arguments, errors))
    leader.start()
    return leader


def _lead(world: int, program: Path, arguments: Sequence[str], errors: Path) -> None:
    os.setsid()
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT), sys.stderr.fileno())
    told = [os.pipe() for _ in range(world)]  # the port, which is known after the forks: the store has threads
    ranks = {_fork(rank, world, told[rank][0], program, arguments): rank for rank in range(world)}
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, end in told:
        os.write(end, str(store.port).encode())
    os._exit(_reap(ranks))


def _reap(ranks: dict[int, int]) -> int:
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def _fork(rank: int, world: int, port: int, program: Path, arguments: Sequence[str]) -> int:
    if pid := os.fork():
        return pid
    try:
        os.environ.update(_environment(rank, world, os.read(port, 16).decode()))
        sys.argv = [str(program), *arguments]
        runpy.run_path(str(program), run_name="__main__")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _environment(rank: int, world: int, port: str) -> Mapping[str, str]:
    """What torchrun says to a rank of one node: the leader keeps the store."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in {**ranks, **store, "TORCHELASTIC_RESTART_COUNT": 0}.items()}
