"""Trains the small GPT on the sources of Python's standard library; any launcher with torchrun's contract runs it.

    torchrun --nproc-per-node 4 examples/gpt/train.py --steps 900
    whaleflux submit examples/gpt/job.yaml

The batch is a function of (seed, step, rank) and the checkpointer restores the rest, so a run that was interrupted
any number of times ends with the same bits as one that was not (same world size).
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from model import VOCABULARY, Gpt, Shape
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from whaleflux.sdk import Checkpointer, stabilise_buckets

TEXT_BYTES = 4_000_000


def read_text() -> torch.Tensor:
    """The first 4 MB of ASCII of the standard library's sources, in the order of their names."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        ascii_only = bytes(b for b in path.read_bytes() if b < VOCABULARY)
        found.append(ascii_only)
        size += len(ascii_only)
        if size >= TEXT_BYTES:
            break
    return torch.frombuffer(bytearray(b"".join(found)[:TEXT_BYTES]), dtype=torch.uint8).long()


def device() -> torch.device:
    """This rank's GPU, where it was given one."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def batch_at(text: torch.Tensor, step: int, args: argparse.Namespace, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (batch, context) each: a pure function of seed, step and rank."""
    generator = torch.Generator().manual_seed(((args.seed * 1_000_003 + step) << 12) + rank)
    starts = torch.randint(len(text) - args.context - 1, (args.batch,), generator=generator)
    rows = torch.stack([text[s : s + args.context + 1] for s in starts]).to(device())
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(args: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    text = read_text()
    torch.manual_seed(args.seed)  # the same parameters on every rank
    net = Gpt(Shape(args.layers, args.width, 4, args.context)).to(device())
    model = DistributedDataParallel(net)
    stabilise_buckets(model, lambda: loss_of(model, batch_at(text, 0, args, rank)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    torch.manual_seed(args.seed * world + rank)
    with Checkpointer(model=net, optimizer=optimizer, every=args.every, location=args.checkpoints) as saved:
        if rank == 0:
            print(f"start at step {saved.step} of {args.steps} from {saved.restored_from or 'scratch'}", flush=True)
        for step, batch in saved.steps(lambda step: batch_at(text, step, args, rank), total=args.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            mean /= world
            saved.report(mean)
            if rank == 0 and (step % args.print_every == 0 or step + 1 == args.steps):
                print(f"step {step} loss {mean.item():.9f}", flush=True)
        if rank == 0:
            finish(args, net, saved, text)


@torch.no_grad()
def final_loss(net: Gpt, text: torch.Tensor, args: argparse.Namespace) -> float:
    """Mean loss on batches that the training has not seen: a function of the parameters alone."""
    losses = [loss_of(net, batch_at(text, args.steps + i, args, rank=0)) for i in range(16)]
    return torch.stack(losses).mean().item()


def finish(args: argparse.Namespace, net: Gpt, saved: Checkpointer, text: torch.Tensor) -> None:
    """Writes the weights and a record that two runs can be compared by."""
    if not args.output:
        return
    loss = final_loss(net, text, args)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"layers": args.layers, "width": args.width, "heads": 4, "context": args.context}
    torch.save({"shape": shape, "weights": net.state_dict()}, folder / "model.pt.part")
    (folder / "model.pt.part").replace(folder / "model.pt")
    record = {"steps": args.steps, "loss": loss, "digest": saved.digest()}
    (folder / "result.json").write_text(json.dumps(record) + "\n")
    print(f"done: loss {loss:.9f} digest {record['digest'][:16]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2, help="sequences per rank and step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=None, help="steps between checkpoints (default: the job file's)")
    parser.add_argument("--print-every", type=int, default=10)
    parser.add_argument("--checkpoints", default="checkpoints", help="folder, when no agent runs this script")
    parser.add_argument("--output", default="", help="folder for the trained weights")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # one thread per rank: same bits, and faster
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
