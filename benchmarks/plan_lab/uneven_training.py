"""A training whose ranks are not equally fast; run by torchrun, told what to do by its argument as JSON.

    torchrun --nproc-per-node 4 -m benchmarks.plan_lab.uneven_training '{"split": "balance", "core_shares": [0.1, 0.1, 0.05, 0.05]}' FOLDER

What is slow: after the forward and the backward pass of each layer a rank waits as long as keeps it to its share of a core, counted by the CPU time
that it really used. So work is real and speeds are as told, also where ranks outnumber cores; no more of a slow GPU is played.
Each rank writes FOLDER/rank-N.json: global losses, seconds of each step, samples, shares, the final parameters.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from whaleflux.sdk import Balance, Checkpointer

_ROWS = 64  # of a sample: so that its work is more than what each layer costs anyway


@dataclass(frozen=True, slots=True)
class Told:
    """`split`: "balance", or "even" as torch's DistributedSampler makes it. `wrap`: "ddp" or "fsdp". `core_shares`: of each rank; none: as fast as it goes."""

    split: str = "balance"
    wrap: str = "ddp"
    core_shares: tuple[float, ...] = ()
    speeds: tuple[float, ...] = ()
    samples: int = 2048
    global_batch: int = 64
    micro_batch: int | None = None
    steps: int = 40
    every_steps: int = 5
    width: int = 256
    workers: int = 0
    checkpoints: str = ""
    seed: int = 3


class HeldBack:
    """Waits so that this thread has `share` of a core."""

    def __init__(self, share: float) -> None:
        self._share, self._used_s = share, time.thread_time()

    def __call__(self, *_: Any) -> None:
        used_s = time.thread_time() - self._used_s
        time.sleep(used_s * (1 / self._share - 1))
        self._used_s = time.thread_time()

    def slow_down(self, layers: nn.Module) -> None:
        layers.register_forward_pre_hook(self._begin)
        for layer in layers.children():
            layer.register_forward_hook(self)
            layer.register_full_backward_hook(self)

    def _begin(self, *_: Any) -> None:
        self._used_s = time.thread_time()  # reading data and exchanging gradients are as fast as elsewhere


def data_of(told: Told) -> TensorDataset:
    draw = torch.Generator().manual_seed(told.seed)
    inputs = torch.randn(told.samples, _ROWS, 64, generator=draw)
    return TensorDataset(inputs, inputs[..., :8].sin().sum(-1, keepdim=True))


def model_of(told: Told) -> nn.Sequential:
    torch.manual_seed(told.seed)
    width = told.width
    blocks = [nn.Sequential(nn.Linear(64 if i == 0 else width, width), nn.Tanh()) for i in range(3)]
    return nn.Sequential(*blocks, nn.Linear(width, 1))


def wrapped(net: nn.Sequential, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(net)
    from torch.distributed.fsdp import fully_shard

    for block in net[:3]:
        fully_shard(block)
    return fully_shard(net)


def train(told: Told, folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    data, net = data_of(told), model_of(told)
    model = wrapped(net, told.wrap)
    if told.core_shares:
        HeldBack(told.core_shares[rank]).slow_down(net)
    balance = sampler = None
    # As torch starts loaders on Linux; a rank that a fork server made would start them through that server, by semaphores with names.
    forked = "fork" if told.workers else None
    if told.split == "balance":
        balance = Balance(
            data, global_batch=told.global_batch, model=model, micro_batch=told.micro_batch, seed=told.seed, every_steps=told.every_steps,
            speed=told.speeds[rank] if told.speeds else None,
        )  # fmt: skip
        loader = DataLoader(data, batch_sampler=balance, num_workers=told.workers, multiprocessing_context=forked)
    else:
        sampler = DistributedSampler(data, seed=told.seed)
        loader = DataLoader(
            data,
            batch_size=told.global_batch // world,
            sampler=sampler,
            num_workers=told.workers,
            multiprocessing_context=forked,
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    notes: dict[str, list[Any]] = {"losses": [], "step_s": [], "samples": [], "shares": []}

    def one_step(batch: Any) -> None:
        began_s = time.perf_counter()
        shares = balance.shares if balance else None
        parts = balance.parts(batch) if balance and told.micro_batch else [batch]
        total = torch.zeros(())
        for inputs, targets in parts:
            inputs.requires_grad_(bool(told.core_shares))  # backward hooks of the first layer need it
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss = balance.weigh(loss) if balance else loss
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        notes["step_s"].append(time.perf_counter() - began_s)
        dist.all_reduce(total)
        notes["losses"].append(total.item() / world)
        notes["samples"].append(len(batch[0]))
        notes["shares"].append(shares)

    if told.checkpoints:
        with Checkpointer(model=model, optimizer=optimizer, data=balance, every=4, location=told.checkpoints) as saved:
            for _, batch in saved.steps(loader, total=told.steps):
                one_step(batch)
    else:
        epoch = 0
        while len(notes["losses"]) < told.steps:
            if sampler is not None:
                sampler.set_epoch(epoch)
            for batch in loader:
                one_step(batch)
                if len(notes["losses"]) == told.steps:
                    break
            epoch += 1
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in net.parameters()]
    final = {"parameters": torch.cat([one.detach().flatten() for one in whole])[::97].tolist()}
    (folder / f"rank-{rank}.json").write_text(json.dumps(notes | final))


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(sys.argv[1]).items()
    }
    train(Told(**given), Path(sys.argv[2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
