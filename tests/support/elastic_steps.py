"""A training of any number of ranks without training: when it is told to stop, its ranks agree on a step, save there, and go on from it.

Each rank appends to its record what it restored and each step: `restored STEP EPOCH RANKS`, `STEP EPOCH`. Between the last save and its end it
waits for a file `leave` in its folder, so that a test can break something just then. It ends well when there is a file `finish`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support import slow_steps
from tests.support.slow_steps import EPOCH, RANK, WORLD
from whaleflux.sdk import files
from whaleflux.sdk.keeper import Keeper, keeper_of_environment

AHEAD = 2  # steps: no rank is so far before another when the first of them is told to stop


def restore(keeper: Keeper) -> int:
    """The step of the newest checkpoint, whoever many ranks have written it; 0 for none."""
    target = keeper.newest([])
    if target is None:
        return 0
    assert all(files.find_fault(target.folder, piece) is None for piece in target.pieces)
    return int(json.loads((target.folder / "rank-0.json").read_text())["step"])


def last_step(folder: Path, step: int, *, told: bool) -> int | None:
    """The step that all ranks stop at: chosen by the first that was told to."""
    chosen = folder / f"stop-{EPOCH}"
    if told and not chosen.exists():
        mine = folder / f"stop-{EPOCH}-{RANK}"
        mine.write_text(str(step + AHEAD))
        with contextlib.suppress(FileExistsError):
            os.link(mine, chosen)
    return int(chosen.read_text()) if chosen.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    keeper = keeper_of_environment(None, WORLD)
    step = restore(keeper)
    with (folder / f"rank-{RANK}.record").open("a", buffering=1) as record:
        record.write(f"restored {step} {EPOCH} {WORLD}\n")
        while not (folder / "finish").exists():
            time.sleep(0.05)
            slow_steps.all_reduce(folder, step)
            if step == last_step(folder, step, told=bool(told)):
                slow_steps.save(keeper, step)
                while not (folder / "leave").exists():
                    time.sleep(0.02)
                os._exit(128 + signal.SIGTERM)
            step += 1
            keeper.progress(RANK, step, lambda: 1.0)
            record.write(f"{step} {EPOCH}\n")
    keeper.close()


if __name__ == "__main__":
    main()
