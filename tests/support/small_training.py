"""A training of some ranks for tests of the checkpointer; run by torchrun, told what to do by its arguments as JSON.

Each rank appends what happened to {folder}/rank-{rank}.jsonl: what was restored, the samples of each step, the end.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from whaleflux.sdk import Checkpointer, CheckpointError, SaveFailed, stabilise_buckets

RANK = int(os.environ["RANK"])


class Positioned:
    """A loader that keeps its own position; each rank reads every world-th sample."""

    def __init__(self, count: int) -> None:
        self.position, self.count = 0, count

    def __iter__(self) -> Any:
        world = dist.get_world_size()
        while self.position * world + RANK < self.count:
            self.position += 1
            sample = torch.tensor([float((self.position - 1) * world + RANK)])
            yield [sample.expand(1, 4)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Shared(Positioned):
    """One whose positions can be shared out."""

    def load_world_state(self, states: list[dict[str, Any]], rank: int, world_size: int) -> None:
        self.position = sum(state["position"] for state in states) // world_size


def dealt_out(count: int) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(float(count)).reshape(-1, 1).expand(-1, 4))
    return DataLoader(data, batch_size=1, sampler=DistributedSampler(data, shuffle=True, seed=7))


def loader_of(told: dict[str, Any]) -> Any:
    return {"dealt_out": dealt_out, "positioned": Positioned, "shared": Shared}[told.get("loader", "dealt_out")](
        told.get("samples", 48)
    )


def break_disk(told: dict[str, Any]) -> None:
    """Makes this rank's disk full, or slow, from now on."""
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stuck(descriptor: int) -> None:
        time.sleep(3600)

    os.fsync = {"full": full, "stuck": stuck, "": real}[told["disk"]]  # type: ignore[assignment]


def unmount(below: Path) -> None:
    """This rank sees nothing below the folder any more, as on a node where nothing is mounted there."""
    real = Path.read_text

    def read_text(path: Path, *more: Any) -> str:
        if path.is_relative_to(below):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return real(path, *more)

    Path.read_text = read_text  # type: ignore[method-assign, assignment]


def train(told: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    model = DistributedDataParallel(net)
    stabilise_buckets(model, lambda: model(torch.ones(2, 4) * RANK).sum())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
    torch.manual_seed(100 + RANK)
    np.random.seed(100 + RANK)  # noqa: NPY002
    loader = loader_of(told)
    if told.get("without_mount") == RANK:
        unmount(folder / "checkpoints")
    data = loader if isinstance(loader, Positioned) else None
    record = (folder / f"rank-{RANK}.jsonl").open("a", buffering=1)

    def note(**what: Any) -> None:
        record.write(json.dumps(what) + "\n")

    with Checkpointer(
        model=net,
        optimizer=optimizer,
        scheduler=scheduler,
        data=data,
        every=told.get("every", 3),
        location=folder / "checkpoints",
        save_timeout_s=told.get("save_timeout_s", 60.0),
        on_world_change=told.get("on_world_change", "refuse"),
    ) as saved:
        note(restored=saved.restored_from, step=saved.step, digest=saved.digest())
        for step, batch in saved.steps(loader, total=told["total"]):
            if told.get("breaks") == [RANK, step]:
                break_disk(told)
            rows = batch[0].float().repeat(2, 1)
            note(step=step, samples=batch[0][:, 0].tolist())
            loss = (model(rows) * float(1 + np.random.rand())).square().mean()  # noqa: NPY002
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            saved.report(loss)
            if told.get("digests"):
                note(after=step + 1, digest=saved.digest())
            if told.get("stop_at") == step + 1:
                break
            if saved.last_error is not None:
                note(failed=str(saved.last_error), at=step)
        note(
            end=saved.step,
            digest=saved.digest(),
            buffers=[buffer.tolist() for buffer in net.buffers()],
            lr=scheduler.get_last_lr(),
            random=[torch.rand(1).item(), float(np.random.rand())],  # noqa: NPY002
        )


def main() -> None:
    told, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        train(told, folder)
    except (CheckpointError, SaveFailed) as error:
        with (folder / f"rank-{RANK}.jsonl").open("a") as record:
            record.write(json.dumps({"error": type(error).__name__, "message": str(error)}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a thread may hang in a write: that is what is tested


if __name__ == "__main__":
    main()
