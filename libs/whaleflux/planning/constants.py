"""The constants of the cost model that are fitted, all of them; everything else in the package is a formula, a data sheet or NCCL's own table.

Fitted by `python -m benchmarks.plan_accuracy --fit` on the tables that `benchmarks/README.md` names; the same command without `--fit` holds
them against data that took no part.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constants:
    """Twelve numbers, none of a model, a GPU or a cluster."""

    matmul_share: float = (
        0.85  # of the best rate measured in any matrix multiplication that large ones reach within a training step
    )
    matmul_tail_s: float = 12e-6  # what each one costs beyond that rate: the last wave, the ramp
    attention_share: float = 0.5  # of the same rate that fused attention reaches
    eager_traffic: float = (
        1.6  # bytes through memory of unfused element-wise work, against reading and writing each once
    )
    fused_traffic: float = 1.0  # the same of fused work
    score_passes: float = 8.0  # times that unfused attention moves each score through memory, forward
    launch_s: float = 20e-6  # the host's time for each kernel, in eager mode
    collective_host_s: float = 60e-6  # the host's time for a blocking collective
    collective_latency: float = 2.0  # of NCCL's table of latencies
    network_share: float = 0.8  # of the wire's rate that collectives reach between nodes
    overlap: float = 0.85  # of communication beside computation that costs nothing
    straggling: float = 0.01  # longer for each doubling of the nodes


FITTED = Constants()
