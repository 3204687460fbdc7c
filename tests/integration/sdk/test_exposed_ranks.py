"""What ranks see of the communication that they stood still for, whatever their modules do: two processes, gloo, PyTorch's profiler."""

import json
import textwrap

import pytest

from tests.support.forked_ranks import launch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PROGRAM = textwrap.dedent(
    """
    import json, sys, time
    import torch, torch.distributed as dist
    from torch import nn
    from torch.autograd.profiler import profile
    from whaleflux.sdk.background import Background
    from whaleflux.sdk.looks import FIRST, Looks

    dist.init_process_group("gloo")
    rank, kind = dist.get_rank(), sys.argv[2]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard
        fully_shard(model[0])
        fully_shard(model)
    if kind == "tensor":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    others, whole = dist.new_group(backend="gloo"), profile._prepare_trace
    large = torch.ones(1500, 1500)

    def step():
        large.sum()
        if kind in ("ddp", "fsdp", "tensor"):
            model(torch.ones(8, 64)).sum().backward()
        if kind == "calls":
            dist.all_reduce(torch.ones(1000))
        if kind == "save":
            Background(lambda: dist.all_gather_object([None, None], rank, group=others), "save").result(30)
        if kind == "beside":
            work = dist.all_reduce(torch.ones(1000), async_op=True)
            until = time.perf_counter() + 0.4
            while rank == 0 and time.perf_counter() < until:
                large @ large
            work.wait()
        if kind == "later":
            work = dist.all_reduce(torch.ones(1000), async_op=True)
            work.wait()
        if kind == "stages":
            one = dist.isend if rank else dist.irecv
            for work in dist.batch_isend_irecv([dist.P2POp(one, torch.ones(1000), 1 - rank)]):
                work.wait()

    looks = Looks(2, on_gpu=False)
    looks.start(0)
    for done in range(1, FIRST + 3):
        if rank == 1 and done > FIRST:
            time.sleep(0.2)
        step()
        looks.stepped(done)
    looks.stop()
    assert profile._prepare_trace is whole
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump([looks.newest.in_node_s, looks.newest.cross_s, looks.newest.whole_s], file)
    dist.destroy_process_group()
    """
)
SLEPT_S = 0.2


def seen(folder, kind):
    program = folder / "program.py"
    program.write_text(PROGRAM)
    ranks = launch(2, program, [str(folder), kind], folder / "errors")
    ranks.join(120)
    assert ranks.exitcode == 0, (folder / "errors").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["calls", "later", "ddp", "fsdp", "tensor"])
def test_the_rank_that_waits_says_how_long_and_the_late_one_does_not(tmp_path, kind):
    (waits_s, across_s, whole_s), (late_s, _, _) = seen(tmp_path, kind)
    assert 0.75 * SLEPT_S <= waits_s <= whole_s
    assert late_s < waits_s / 2
    assert across_s == 0


def test_what_runs_beside_computation_does_not_count(tmp_path):
    (waits_s, _, whole_s), _ = seen(tmp_path, "beside")
    assert whole_s >= 0.4
    assert waits_s < SLEPT_S / 2


@pytest.mark.parametrize("kind", ["save", "stages"])
def test_saves_beside_the_training_and_waits_for_another_stage_are_no_communication(tmp_path, kind):
    assert [rank[:2] for rank in seen(tmp_path, kind)] == [[0, 0], [0, 0]]
