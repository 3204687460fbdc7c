"""The tables of measured runs are read by their columns, and what is held out takes no part."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import plan_accuracy
from benchmarks.plan_lab.predict import batches, seconds
from benchmarks.plan_lab.tables import all_runs
from whaleflux.planning.constants import FITTED
from whaleflux.planning.memory import memory

MEGATRON = """gpus,global_batch,micro_batch,hidden,heads,layers,seq_len,tp,dp,pp,iter_ms,gpu,framework
8,16,2,2048,16,24,1024,2,2,2,400.0,A100,Megatron-DeepSpeed
8,16,2,2048,16,24,1024,2,2,2,,A100,Megatron-DeepSpeed
"""
NEMO = """container,system,precision,model,gpus,gbs,mbs,seq_len,tp,pp,cp,vp,tokens_per_s_per_gpu,model_tflops_per_gpu,ambiguous_parenthesised
25.01,DGX-H100,FP8,LLAMA3_70B,64,128,1,8192,4,4,2,5,1533,738,False
25.01,DGX-H100,FP8,Mystery 9T,64,128,1,8192,4,4,2,5,1533,738,False
25.01,DGX-H100,FP8,LLAMA3_70B,64,128,1,8192,1 (4),4,2,5,1533,738,True
25.01,DGX-H100,FP8,Qwen3_30B_a3B,16,512,4,4096,1,1,1,n/a,10494,0,False
"""
FSDP = """model,seq_len,gpus,gpu,micro_batch,grad_accum,global_batch,tokens_per_s_per_gpu,precision,mp_mode,sharding,act_ckpt,step_time_s_derived
7b,2048,128,h100_80gb,6,1,768,10475,amp_bf16,DEFAULT,FULL_SHARD,False,1.1731
"""


@pytest.fixture
def folder(tmp_path):
    for name, text in (("anything", MEGATRON), ("else", NEMO), ("third", FSDP), ("prices", "provider,usd\na,1\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


def test_any_file_with_such_columns_is_read_and_what_is_left_out_is_counted(folder):
    runs, left_out = all_runs(plan_accuracy.tables_below(folder))
    assert [run.family for run in runs] == ["anything", "else", "else (MoE)", "third H100-80GB"]
    assert left_out["anything"] == {"no time and no tokens per second": 1}
    assert left_out["else"] == {"model not known: Mystery 9T": 1, "ambiguous: two values in a cell": 1}
    assert "prices" not in left_out


def test_seconds_follow_from_tokens_and_never_from_flops(folder):
    runs, _ = all_runs([folder / "else.csv"])
    assert runs[0].step_s == pytest.approx(128 * 8192 / (1533 * 64))


def test_what_a_row_says_of_its_software_decides(folder):
    runs, _ = all_runs(plan_accuracy.tables_below(folder))
    megatron, nemo, _, fsdp = runs
    assert (megatron.flags["flash"], megatron.split["recompute"], megatron.split["zero"]) == (0.0, 2.0, 0.0)
    assert (nemo.flags["flash"], nemo.flags["overlap_tp"], nemo.precision, nemo.open) == (
        1.0,
        1.0,
        "fp8",
        ("recomputed",),
    )
    assert (fsdp.split["zero"], fsdp.shape.name, fsdp.flags["reduce_bytes"], fsdp.open) == (3.0, "mpt-7b", 4.0, ())


def test_predictions_stand_in_the_order_of_the_runs_and_open_parts_are_chosen(folder):
    runs, _ = all_runs(plan_accuracy.tables_below(folder))
    together = seconds(batches(runs), FITTED)
    alone = [seconds(batches([run]), FITTED)[0] for run in runs]
    assert together == pytest.approx(alone)
    assert np.isfinite(together).all()


def test_one_file_or_a_folder_is_taken(folder):
    assert plan_accuracy.tables_below(folder / "third.csv") == [folder / "third.csv"]
    (folder / "validation").mkdir()
    assert [path.name for path in plan_accuracy.tables_below(folder)] == ["h200_measured.csv"]


def test_memory_that_was_measured_on_an_h200_is_predicted_within_five_percent_on_average():
    runs, _ = all_runs(plan_accuracy.tables_below(Path(plan_accuracy.__file__).parent / "plan_lab"))
    needed = np.ravel(
        [memory(one.shape, one.plans, one.training).total_bytes for run in runs for one in batches([run])]
    )
    error = needed / [float(run.about["allocated_bytes"]) for run in runs] - 1
    assert len(runs) == 21
    assert np.abs(error).mean() < 0.05
    assert np.abs(error).max() < 0.1
