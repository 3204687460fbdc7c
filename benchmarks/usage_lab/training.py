"""A real training whose FLOPs are counted, phase by phase.

    torchrun -m benchmarks.usage_lab.training FOLDER PLAN

PLAN is JSON: [{"name", "seconds", "stall": share of each step's time that it then sleeps, "sdk": whether steps are told, "kind": "train" (it
sleeps before the step, for data), "host" (it sleeps amid the step), "launches" (kernels so small that the GPU waits for each) or "reduce"}]. Rank r writes a line per phase and, while steps are told, a line per report into FOLDER/rank-r.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from whaleflux.sdk.looks import Looks
from whaleflux.sdk.step_times import StepTimes

_WIDTH, _LAYERS, _TOKENS, _BATCH = 4096, 8, 2048, 8
_SMALL = (256, 8, 128, 4)
_REDUCED_BYTES = 512 << 20
_BLOCK = 20  # steps between two looks at the clock


class Block(nn.Module):  # type: ignore[misc]
    """A layer of a decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(batch, tokens, 3, -1, 128).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)  # not causal: the counter counts it whole
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Training:
    """One rank."""

    def __init__(self, device: torch.device, width: int, layers: int, tokens: int, batch: int) -> None:
        dtype = torch.bfloat16
        self.device, self.shape = device, (batch, tokens, width)
        self.model: nn.Module = nn.Sequential(*(Block(width) for _ in range(layers))).to(device, dtype)
        with FlopCounterMode(display=False) as counter:
            self.model(torch.randn(self.shape, device=device, dtype=dtype)).sum().backward()
        self.flops = counter.get_total_flops()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step(self, amid: Callable[[], None] | None = None) -> None:
        """`amid`: what the program does between the passes."""
        x = torch.randn(self.shape, device=self.device, dtype=torch.bfloat16)
        loss = self.model(x).float().square().mean()
        if amid is not None:
            amid()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def usual_step_s(one: Training) -> float:
    """How long a step takes that waits for nothing; before a phase begins, so that all of the phase is alike."""
    one.wait()
    began = time.perf_counter()
    for _ in range(_BLOCK):
        one.step()
    one.wait()
    return (time.perf_counter() - began) / _BLOCK


def trained(one: Training, phase: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """Steps for so long, on all ranks equally many; each block ends when the GPU has."""
    looks = Looks(dist.get_world_size(), one.device.type == "cuda")
    times = StepTimes(one.model, dist.get_world_size(), lambda report: write({"report": asdict(report)}), looks=looks)
    step, slept_s, blocks = 0, 0.0, list[float]()
    pause_s = phase["stall"] / (1 - phase["stall"]) * usual_step_s(one) if phase["stall"] else 0.0

    def sleep() -> None:
        nonlocal slept_s
        if pause_s:
            one.wait()
            time.sleep(pause_s)
            slept_s += pause_s

    amid = sleep if phase["kind"] == "host" else None
    begun = time.time()
    with times.running(0) if phase["sdk"] else contextlib.nullcontext():
        while together(one.device, time.time() - begun < phase["seconds"]):
            block = time.perf_counter()
            for _ in range(_BLOCK):
                arrived = times.waited_for_data() if phase["sdk"] else None
                if amid is None:
                    sleep()
                if arrived is not None:
                    arrived()
                one.step(amid)
                step += 1
                if phase["sdk"]:
                    times.trained_on(one.shape[0] * one.shape[1], one.flops)
                    times.stepped(step)
            one.wait()
            blocks.append(time.perf_counter() - block)
    counted = {"steps": step, "flops": step * one.flops, "slept_s": slept_s, "look_cost_s": looks.cost_s}
    write(_phase(phase, begun) | counted | {"blocks_s": [b / _BLOCK for b in blocks]})


def launched(device: torch.device, phase: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """Steps of small kernels, told; before them the same work as one graph, in which the GPU waits for no call: the rest of a step is the host's."""
    width, layers, tokens, batch = _SMALL
    small = nn.Sequential(*(Block(width) for _ in range(layers))).to(device, torch.bfloat16)
    x = torch.randn((batch, tokens, width), device=device, dtype=torch.bfloat16)

    def work() -> None:
        small(x).float().square().mean().backward()
        small.zero_grad(set_to_none=False)

    graph_s = _as_graph_s(work)
    looks = Looks(1, on_gpu=True)
    times = StepTimes(small, 1, lambda report: write({"report": asdict(report)}), looks=looks)
    step, begun = 0, time.time()
    with times.running(0):
        while time.time() - begun < phase["seconds"]:
            work()
            step += 1
            times.stepped(step)
            torch.cuda.synchronize()  # no queue: a step is as long as it takes to launch
    write(_phase(phase, begun) | {"steps": step, "graph_s": graph_s, "look_cost_s": looks.cost_s})


def _as_graph_s(work: Callable[[], None]) -> float:
    """Seconds of one replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(_BLOCK):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / _BLOCK


def reduced(device: torch.device, phase: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """All-reduces for so long. A ring of n ranks sends 2 (n - 1) / n of the bytes from each."""
    values = torch.ones(_REDUCED_BYTES // 2, device=device, dtype=torch.bfloat16)
    calls, begun, world = 0, time.time(), dist.get_world_size()
    while together(device, time.time() - begun < phase["seconds"]):
        for _ in range(_BLOCK):
            dist.all_reduce(values)
            calls += 1
        values.fill_(1.0)
    write(_phase(phase, begun) | {"sent_bytes": calls * values.nbytes * 2 * (world - 1) // world})


def _phase(phase: dict[str, Any], begun: float) -> dict[str, Any]:
    return {"phase": phase["name"], "start_s": begun, "end_s": time.time()}


def together(device: torch.device, wanted: bool) -> bool:
    """What rank 0 wants; it ends what was under way, too."""
    said = torch.tensor([int(wanted)], device=device)
    dist.broadcast(said, 0)
    return bool(said.item())


def main(folder: Path, plan: list[dict[str, Any]], sizes: tuple[int, int, int, int]) -> None:
    cuda = torch.cuda.is_available()
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    training = Training(device, *sizes)
    with (folder / f"rank-{rank}.jsonl").open("w", encoding="utf-8", buffering=1) as lines:

        def write(found: dict[str, Any]) -> None:
            lines.write(json.dumps(found) + "\n")

        for phase in plan:
            if phase["kind"] == "reduce":
                reduced(device, phase, write)
            elif phase["kind"] == "launches":
                launched(device, phase, write)
            else:
                trained(training, phase, write)
    dist.destroy_process_group()


if __name__ == "__main__":
    small = os.environ.get("USAGE_LAB_SMALL")
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), (256, 2, 64, 2) if small else (_WIDTH, _LAYERS, _TOKENS, _BATCH))
