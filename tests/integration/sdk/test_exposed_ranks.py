"""What ranks see of the communication that they stood still for: two processes, gloo."""

import json
import textwrap

import pytest

from tests.support.forked_ranks import launch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

PROGRAM = textwrap.dedent(
    """
    import json, os, sys, time
    import torch, torch.distributed as dist
    from torch import nn
    from whaleflux.sdk.background import Background
    from whaleflux.sdk.exposed import ExposedCommunication

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = nn.Linear(64, 64)
    if sys.argv[2] == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if sys.argv[2] == "fsdp":
        from torch.distributed.fsdp import fully_shard
        fully_shard(model)
    whole, seen = dist.all_reduce, ExposedCommunication(model, 2, on_gpu=False)
    others = dist.new_group(backend="gloo")
    seen.start()
    for step in range(5):
        seen.sampling = step == 0
        if rank == 1:
            time.sleep(0.2)
        if sys.argv[2] == "ddp":
            model(torch.ones(8, 64)).sum().backward()
        if sys.argv[2] == "calls":
            dist.all_reduce(torch.ones(1000))
        if sys.argv[2] == "save":
            Background(lambda: dist.all_gather_object([None, None], rank, group=others), "save").result(30)
        if sys.argv[2] == "beside":
            dist.all_reduce(torch.ones(1000), async_op=True).wait()
        if sys.argv[2] == "pipeline":
            kind = dist.isend if rank else dist.irecv
            for work in dist.batch_isend_irecv([dist.P2POp(kind, torch.ones(1000), 1 - rank)]):
                work.wait()
    told = seen.take(1, 5)
    seen.stop()
    assert dist.all_reduce is whole
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump(told, file)
    dist.destroy_process_group()
    """
)


def told(folder, kind):
    program = folder / "program.py"
    program.write_text(PROGRAM)
    ranks = launch(2, program, [str(folder), kind], folder / "errors")
    ranks.join(120)
    assert ranks.exitcode == 0, (folder / "errors").read_text()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_the_rank_that_waits_says_how_long_and_the_late_one_does_not(tmp_path):
    waits, late = told(tmp_path, "calls")
    assert waits[0] >= 5 * 0.15, "one step of five was measured"
    assert waits[1] == 0
    assert late[0] < waits[0] / 2


def test_what_ddp_did_beside_the_backward_pass_does_not_count(tmp_path):
    waits, late = told(tmp_path, "ddp")
    assert waits[0] >= 5 * 0.1
    assert late[0] < waits[0]


@pytest.mark.parametrize("kind", ["fsdp", "beside", "pipeline"])
def test_what_a_program_waits_for_later_or_in_streams_of_others_is_not_known(tmp_path, kind):
    assert told(tmp_path, kind) == [[None, None], [None, None]]


def test_a_save_beside_the_training_is_no_communication_of_it(tmp_path):
    assert told(tmp_path, "save") == [[0, 0], [0, 0]]
