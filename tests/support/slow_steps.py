"""A training program without training: it steps, reports, saves and restores as a real one does, and costs nothing.

Each rank writes a line per step to its record, (monotonic seconds, step, epoch), and one per restore; it ends when the
folder has a file `finish`. A rank waits for its peers as a collective would make it wait. Saves run beside the steps, one at a time, as the PyTorch checkpointer does it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from whaleflux.sdk.rank import Keeper, SavedPiece, Target, keeper_of_environment

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
EPOCH = int(os.environ["WHALEFLUX_EPOCH"])


def restore(keeper: Keeper) -> tuple[int, str]:
    """Step and name of the newest checkpoint whose files are intact; (0, "") when there is none."""
    corrupt = why = ""
    while (target := keeper.newest(corrupt, why)) is not None:
        why = next((fault for piece in target.pieces if (fault := fault_of(target.folder, piece))), "")
        if not why:
            return int(json.loads((target.folder / f"rank-{RANK}.json").read_text())["step"]), target.name
        corrupt = target.name
    return 0, ""


def fault_of(folder: Path, piece: SavedPiece) -> str:
    try:
        content = (folder / piece.path).read_bytes()
    except OSError as error:
        return f"{piece.path}: {error.strerror}"
    return "" if checksum(content) == piece.checksum else f"{piece.path} has another checksum than when it was saved"


def checksum(content: bytes) -> str:
    return f"xxh3-128:{xxhash.xxh3_128_hexdigest(content)}"


def save(keeper: Keeper, step: int) -> None:
    target: Target = keeper.start(step, "replicated", json.dumps({"step": step}).encode())
    target.folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"step": step, "weights": [step] * 1000}).encode()
    file = target.folder / f"rank-{RANK}.json"
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    keeper.finish(target, RANK, [SavedPiece(file.name, len(content), checksum(content))])


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
    args = parser.parse_args()
    keeper, saving, pending = keeper_of_environment(None, WORLD), ThreadPoolExecutor(1), Future[None]()
    pending.set_result(None)
    step, restored = restore(keeper)
    with (args.folder / f"rank-{RANK}.record").open("a", buffering=1) as record:
        record.write(f"restored {step} {EPOCH} {restored or '-'}\n")
        while not (args.folder / "finish").exists():
            time.sleep(args.pause_s)
            all_reduce(args.folder, step)
            step += 1
            keeper.progress(RANK, step, 1 / step)
            record.write(f"{time.monotonic():.6f} {step} {EPOCH}\n")
            if step % args.every == 0:
                pending.result()
                pending = saving.submit(save, keeper, step)
        pending.result()
    keeper.close()


if __name__ == "__main__":
    main()
