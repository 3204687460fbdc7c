"""A training program without training: it steps, reports, saves and restores as a real one does, and costs nothing.

Each rank writes a line per step to its record, (monotonic seconds, step, epoch), and one per restore; it ends when the
folder has a file `finish`, and with `--save-at-end` when it gets SIGTERM, after a last save. A rank waits for its peers as a collective would make it wait. Saves run beside the steps, one at a time, as the PyTorch checkpointer does it.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from whaleflux.checkpoint_storage import storage_id, write_durably
from whaleflux.sdk import files
from whaleflux.sdk.keeper import Keeper, Refused, Target, keeper_of_environment

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
EPOCH = int(os.environ["WHALEFLUX_EPOCH"])


def restore(keeper: Keeper) -> tuple[int, str]:
    """Step and name of the newest checkpoint whose files are intact; (0, "") when nothing was ever saved."""
    refused: list[Refused] = []
    while (target := keeper.newest(refused)) is not None:
        faults = (files.find_fault(target.folder, piece) for piece in target.pieces)
        if (fault := next(filter(None, faults), None)) is None:
            return int(json.loads((target.folder / f"rank-{RANK}.json").read_text())["step"]), target.name
        refused.append(Refused(target.name, fault))
    return 0, ""


def save(keeper: Keeper, step: int) -> None:
    """Each rank by itself, into the folder that all of them are given for a step."""
    target: Target = keeper.start(step, 0, "replicated", json.dumps({"step": step}).encode())
    target.folder.mkdir(parents=True, exist_ok=True)
    file = target.folder / f"rank-{RANK}.json"
    write_durably(file, json.dumps({"step": step, "weights": [step] * 1000}).encode())
    if not any(storage_id(folder) == target.storage for folder in target.folder.parents):
        raise OSError(f"{target.folder} is not on the storage that the save began on")  # the mount went away meanwhile
    keeper.finish(target, RANK, [files.describe(target.folder, file)])


def all_reduce(folder: Path, step: int) -> None:
    """Returns when every rank of this attempt has come to `step`, or all may end."""
    (folder / f"at-{EPOCH}-{RANK}").write_text(str(step))
    peers = [folder / f"at-{EPOCH}-{rank}" for rank in range(WORLD)]
    while not (folder / "finish").exists() and any(at(peer) < step for peer in peers):
        time.sleep(0.01)


def at(peer: Path) -> int:
    """The step of a peer; -1 before its first, or while it is being written."""
    try:
        return int(peer.read_text() or -1)
    except FileNotFoundError:
        return -1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause-s", type=float, default=0.05)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--save-at-end", action="store_true")
    args = parser.parse_args()
    stop = threading.Event()
    if args.save_at_end:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    keeper, saving, pending = keeper_of_environment(None, WORLD), ThreadPoolExecutor(1), Future[None]()
    pending.set_result(None)
    step, restored = restore(keeper)
    with (args.folder / f"rank-{RANK}.record").open("a", buffering=1) as record:
        record.write(f"restored {step} {EPOCH} {restored or '-'}\n")
        while not (stop.is_set() or (args.folder / "finish").exists()):
            time.sleep(args.pause_s)
            all_reduce(args.folder, step)
            step += 1
            keeper.progress(RANK, step, functools.partial(operator.truediv, 1, step))
            record.write(f"{time.monotonic():.6f} {step} {EPOCH}\n")
            if step % args.every == 0:
                pending.result()
                pending = saving.submit(save, keeper, step)
        pending.result()
        if stop.is_set() and step % args.every:
            save(keeper, step)
    keeper.close()


if __name__ == "__main__":
    main()
