"""The contract against the program that defines it: one run of torchrun."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.fake_control_plane import ControlPlane, admit, agent, desired, until
from whaleflux.manifests.job_fields import Spec
from whaleflux_agent.core.environment import LaunchContext, rank_environment
from whaleflux_agent.core.work import Work

pytestmark = pytest.mark.integration
_OWN = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_MAX_RESTARTS"}
_DECIDED = {"TORCHELASTIC_USE_AGENT_STORE"}  # rank 0 hosts the store here, torchrun's agent does there


def test_torchrun_sets_nothing_that_is_missing_here(tmp_path):
    """Same names, same values, but for addresses and files, which are each launcher's own."""
    pytest.importorskip("torch")
    script = tmp_path / "show.py"
    script.write_text("import json, os; print(json.dumps(dict(os.environ)))")
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=1", "--standalone", script],
        env=clean,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    theirs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    work = Work(
        "t",
        "queues/q/jobs/j",
        1,
        ("GPU-0",),
        world_size=1,
        group_world_size=1,
        rendezvous="h:1",
        spec=Spec(command=("x",)),
    )
    place = LaunchContext("sites/s/nodes/n", "token", "/rank.sock", (), "")
    ours = rank_environment(work, place, 0, inherited=clean, error_file="/e.json")
    contract = {n for n in theirs if n in ours or n.startswith(("TORCH", "RANK", "LOCAL", "GROUP", "ROLE", "MASTER"))}
    contract -= {name for name in contract if name.startswith("TORCHINDUCTOR")}
    assert contract - set(ours) <= {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
    same = contract - _OWN - _DECIDED - {"TORCHELASTIC_SIGNALS_TO_HANDLE"}
    assert len(same) >= 13  # else torchrun has changed its names
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


ADD = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
assert total.item() == 3.0, total
print("world", dist.get_world_size(), "sum", total.item())
dist.destroy_process_group()  # torch aborts now and then when its threads outlive the interpreter
"""


async def test_a_distributed_program_runs_unchanged(tmp_path):
    """Two ranks meet over the rendezvous that the agent chose, as they would under torchrun."""
    pytest.importorskip("torch")
    control = ControlPlane(tmp_path)
    await control.start()
    admit(control, tmp_path / "state")
    async with agent(control, tmp_path / "state", "--host-address", "127.0.0.1"):
        control.tasks.want(desired([sys.executable, "-c", ADD], gpus=(0, 1)))
        await until(lambda: "EXITED" in control.tasks.phases("train-1-0"), timeout_s=90)
    await control.stop()
    assert control.tasks.last("train-1-0").exit_code == 0, control.tasks.last("train-1-0").message
