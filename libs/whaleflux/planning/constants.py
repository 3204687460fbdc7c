"""The constants of the cost model that are fitted, all of them; everything else in the package is a formula, a data sheet or NCCL's own table.

Fitted together by `python -m benchmarks.plan_accuracy --fit` on the measured steps of dense models that `benchmarks/README.md` names; which
tables decide on each stands beside it. The same command without `--fit` holds constants against runs that took no part in fitting them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """Ten fitted numbers, none of them of a model, a GPU, a cluster or a table; one that only a calibration knows."""

    # Of the best rate measured in any matrix multiplication, what large ones reach within a step: all tables.
    matmul_share: float = 0.880
    # What each multiplication costs beyond that rate, the last wave and the ramp: vtrain_single, megatron_h100_2024.
    matmul_tail_s: float = 29e-6
    # Of the same rate, what fused attention reaches: llm_foundry, up to 65,536 tokens.
    attention_share: float = 0.413
    # Tokens by which a sequence is too short: attention's rate is that of long ones times s / (s + this). Not fitted: `calibration` measures it.
    attention_short: float = 0.0
    # Bytes that element-wise work moves, against reading and writing each tensor once. Not fused: llm_foundry.
    eager_traffic: float = 2.77
    # The same, fused: megatron_2021, korthikanti_2022, nemo_2407, megatron_bridge.
    fused_traffic: float = 1.38
    # How often unfused attention moves each score through memory, forward: vtrain_single, megatron_2021, korthikanti_2022.
    score_passes: float = 7.6
    # The host's time for each kernel: vtrain_single.
    launch_s: float = 39e-6
    # Latency of collectives against NCCL's table: vtrain_single (all-reduces on one A100 node alone say 2: allreduce_a100_lut).
    collective_latency: float = 1.87
    # Of communication over NVLink beside computation, what costs nothing: korthikanti_2022, megatron_h100_2024, nemo_2407, megatron_bridge.
    overlap: float = 0.30
    # The same of ZeRO-3's gathers and scatters, which wait for one another: llm_foundry.
    overlap_shards: float = 0.36


FITTED = Constants()
