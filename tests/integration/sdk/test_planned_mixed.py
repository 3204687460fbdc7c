"""A plan over two pools runs: torchrun.sh as emitted, started on two nodes, whose ranks ask the SDK for nothing but its mesh and its batches."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.emit.mixed import torchrun_file
from whaleflux.planning.machine import Machine
from whaleflux.planning.mixed import MixedAsked, mixed_search
from whaleflux.planning.model_files import model_from_text
from whaleflux.planning.pools import Pool
from whaleflux.planning.training import Training

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
pytest.importorskip("torch")
SHAPE = Path(__file__).parents[3] / "examples" / "planned" / "shape.yaml"
SCRIPT = """
import sys

import torch
from torch.utils.data import DataLoader, TensorDataset

from whaleflux.sdk import Balance, device_mesh

plan = device_mesh(device="cpu")
model = plan.shard(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)), [])
data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
balance = Balance(data, model=model, rank=plan.data_rank, num_replicas=plan.data_size)
for batch in DataLoader(data, batch_sampler=balance):
    for inputs, targets in balance.parts(batch):
        balance.weigh((model(inputs) - targets).square().mean()).backward()
    sys.stdout.write(f"rank {plan.data_rank} of {plan.data_size} took {len(batch[0])}\\n")
torch.distributed.destroy_process_group()
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_nodes_of_two_pools_train_the_planned_batch(tmp_path):
    shape = model_from_text(SHAPE.read_text(), "tiny")
    pools = [Pool(Machine.of(CATALOGUE.types[name]), 2) for name in ("H100-80GB", "A100-80GB")]
    plan = mixed_search(shape, pools, MixedAsked(16, 32, runnable=True)).best
    assert plan.gpus == 4
    (tmp_path / "torchrun.sh").write_text(torchrun_file(shape, plan, Training()).text)
    (tmp_path / "train.py").write_text(SCRIPT)
    variables = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    nodes = [
        subprocess.Popen(["bash", "torchrun.sh", "train.py"], cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in pools
    ]  # fmt: skip
    try:
        ended = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], ended[0][1][-3000:]
    took = re.findall(r"rank (\d) of 4 took (\d+)", "".join(out for out, _ in ended))
    assert {rank for rank, _ in took} == {"0", "1", "2", "3"}
    assert sum(int(samples) for _, samples in took) == 64  # each sample once
    assert len(took) == 4 * 64 // 16
