"""A plan's own files run: torchrun.sh and mesh.json as emitted, with examples/planned/train.py, over four CPU ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from whaleflux.planning.emit import emit
from whaleflux.planning.emit.planned import Planned
from whaleflux.planning.model_files import model_from_text
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.training import Training

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
pytest.importorskip("torch")
EXAMPLE = Path(__file__).parents[3] / "examples" / "planned"
STEPS = 8


def losses(folder, **split):
    """Of each step; the ranks are started by the emitted script and nothing else."""
    shape = model_from_text((EXAMPLE / "shape.yaml").read_text(), "tiny")
    plan = Planned.of(shape, Plans.of(**({"global_batch": 8, "sequence": 32} | split)), Training())
    for form in ("torchrun", "fsdp2"):
        emitted = emit(form, plan)
        (folder / emitted.file).write_text(emitted.text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "torchrun.sh", EXAMPLE / "train.py", "--steps", str(STEPS)],
        check=False, cwd=folder, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(one) for one in re.findall(r"loss ([0-9.]+)", done.stdout)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank that takes the whole batch."""
    return losses(tmp_path_factory.mktemp("alone"), micro_batch=8)


@pytest.mark.parametrize(
    "split",
    [
        {"dp": 4, "replicas": 2, "zero": 3, "micro_batch": 1, "recompute": Recompute.FULL, "recomputed": 0.5},
        {"dp": 2, "tp": 2, "zero": 0, "micro_batch": 2},
    ],
    ids=["hsdp-2x2", "dp2-tp2"],
)
def test_four_ranks_train_as_one_does_with_the_same_batch(tmp_path, alone, split):
    """In bfloat16, as emitted: the order of additions differs."""
    assert losses(tmp_path, **split) == pytest.approx(alone, abs=0.05)
    assert len(alone) == STEPS
    assert alone[-1] < alone[0] / 2


def test_each_stage_knows_its_layers_and_which_of_them_it_computes_again(tmp_path):
    script = tmp_path / "stages.py"
    script.write_text(
        "import sys\nfrom whaleflux.sdk import device_mesh\n"
        "plan = device_mesh(device='cpu')\n"
        "sys.stdout.write(f\"{plan.mesh.get_local_rank('pp')} {plan.stage_layers} {plan.recomputed}\\n\")\n"
    )
    shape = model_from_text((EXAMPLE / "shape.yaml").read_text().replace("layers: 4", "layers: 7"), "tiny")
    stages = {
        "pp": 3,
        "first_layers": 2,
        "last_layers": 2,
        "recompute": Recompute.FULL,
        "recomputed": 1 / 3,
        "recomputing": 2,
    }
    plan = Planned.of(shape, Plans.of(micro_batch=1, global_batch=6, sequence=32, **stages), Training())
    for form in ("torchrun", "fsdp2"):
        emitted = emit(form, plan)
        (tmp_path / emitted.file).write_text(emitted.text)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "torchrun.sh", script], check=False, cwd=tmp_path, env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert sorted(done.stdout.splitlines()) == [
        "0 (2, 3, 2) 0.5",
        f"1 (2, 3, 2) {1 / 3}",
        "2 (2, 3, 2) 0.0",
    ], done.stderr[-2000:]
