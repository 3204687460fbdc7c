"""A training over several pools as what runs it: a job file, or torchrun's script; the rest is `whaleflux.sdk`'s (`device_mesh`, `Balance`).

Replicas that each lie within one GPU's island run so: ranks of any GPU take the samples that the plan gives their type. A pipeline through several
types does not: no output format here lays stages of different sizes on types of GPU, and no job file says which type a stage is on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.emit.mesh import fsdp2
from whaleflux.planning.emit.planned import Emitted, Planned
from whaleflux.planning.emit.torchrun import exports
from whaleflux.planning.mixed_plan import ALONE, STAGES, MixedPlan
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.training import Training
from whaleflux.planning.wish import ALLOCATOR, GROWING
from whaleflux.planning.wish import VARIABLE as MESH

BALANCE = "BALANCE"  # which `whaleflux.sdk` reads, as it does MESH
_NODE_GPUS, _MOST_NAME = 8, 40


def cannot_run(plan: MixedPlan) -> str:
    """Why no output format runs it, with what to use; "": they do."""
    if plan.kind == ALONE:
        part = plan.parts[0]
        return f"it is one pool: plan with --gpu {part.pool} --gpus {part.gpus}"
    if plan.kind == STAGES:
        return "no output format lays stages of a pipeline on types of GPU"
    if any(len(part.layers) > 1 for part in plan.parts):
        return "no output format keeps the stages of a replica on one type of GPU"
    if plan.zero == 2:
        return "ZeRO-2 reduces every micro-batch, and replicas have different numbers of them"
    if plan.zero > 2 and plan.micro_batches > 1:
        return "Balance has no micro-batches of each rank's own size"
    return ""


def job_file(shape: ModelShape, plan: MixedPlan, how: Training) -> Emitted:
    """For `whaleflux submit`. Raises InvalidArgument where `cannot_run` says why."""
    _refuse(plan)
    types = [CATALOGUE.types[part.pool] for part in plan.parts]
    memory = min(one.memory_bytes >> 30 for one in types)  # as many GB of 10**9 are less than what drivers report
    capability = min(one.compute_capability for one in types)
    tensor = [f"parallel: {{tensor: {plan.parts[0].tp}}}"] if plan.parts[0].tp > 1 else []
    lines = [
        f"# {_title(shape, plan)}",
        f"name: {_name(shape)}",
        "run: python train.py",
        f"gpus: {plan.gpus}",
        "gpu:  # of any types that have as much as the smallest pool's: ranks take samples by the type that they are on",
        f"  memory: '>= {memory} GB'",
        f"  compute_capability: {capability[0]}.{capability[1]}",
        *tensor,
        "environment:",
        f"  {ALLOCATOR}: {GROWING}",
        *(f"  {name}: '{value}'" for name, value in _environment(shape, plan, how).items()),
    ]
    notes = (
        "train.py asks whaleflux.sdk for both: device_mesh() and Balance(dataset, model=model, rank=plan.data_rank, num_replicas=plan.data_size)",
        "it takes any GPUs that are free and large enough; to keep it on these pools, label their nodes and add nodes.labels",
    )
    return Emitted("job.yaml", "\n".join(lines) + "\n", notes)


def torchrun_file(shape: ModelShape, plan: MixedPlan, how: Training) -> Emitted:
    """A script that is started once on each node of every pool. Raises InvalidArgument where `cannot_run` says why."""
    _refuse(plan)
    each, tp = _per_node(plan), plan.parts[0].tp
    nodes = [f"{part.gpus // each} of {part.pool}" for part in plan.parts]
    meets = '--rdzv-endpoint="${MASTER_ADDR:?the first node}:${MASTER_PORT:-29500}" --rdzv-id="${RUN_ID:-planned}"'
    lines = [
        "#!/usr/bin/env bash",
        f"# {_title(shape, plan)}",
        "set -euo pipefail",
        *exports(one_queue=tp > 1 and plan.zero < 2),
        *(f"export {name}='{value}'" for name, value in _environment(shape, plan, how).items()),
        f'exec torchrun --nnodes={plan.gpus // each} --nproc-per-node={each} --rdzv-backend=c10d {meets} "$@"',
        "",
    ]
    return Emitted(
        "torchrun.sh", "\n".join(lines), (f"run it once on each of {plan.gpus // each} nodes: {', '.join(nodes)}",)
    )


FORMATS: Final[dict[str, Callable[[ModelShape, MixedPlan, Training], Emitted]]] = {
    "job": job_file,
    "torchrun": torchrun_file,
}


def _refuse(plan: MixedPlan) -> None:
    if why := cannot_run(plan):
        raise InvalidArgument(FieldViolation("--emit", f"cannot express this plan: {why}"))


def _title(shape: ModelShape, plan: MixedPlan) -> str:
    name = "".join(char if char.isprintable() else " " for char in shape.name)
    return f"{name}, {plan.words()}; batch {plan.global_batch:,} x {plan.sequence:,} tokens"


def _name(shape: ModelShape) -> str:
    return re.sub(r"[^a-z0-9]+", "-", shape.name.lower()).strip("-")[:_MOST_NAME].rstrip("-") or "mixed"


def _per_node(plan: MixedPlan) -> int:
    """As many ranks as divide every pool, whole tensor-parallel groups of them."""
    tp = plan.parts[0].tp
    fit = [n for n in range(_NODE_GPUS, 0, -1) if n % tp == 0 and all(part.gpus % n == 0 for part in plan.parts)]
    return fit[0] if fit else tp


def _environment(shape: ModelShape, plan: MixedPlan, how: Training) -> dict[str, str]:
    """One line of JSON each."""
    balance = {
        "global_batch": plan.global_batch,
        "micro_batch": plan.micro_batch or None,
        "samples": {part.pool: sum(part.samples) / len(part.samples) for part in plan.parts},
    }
    return {MESH: json.dumps(_mesh(shape, plan, how)), BALANCE: json.dumps(balance)}


def _mesh(shape: ModelShape, plan: MixedPlan, how: Training) -> dict[str, Any]:
    """As of replicas that all take as much; how much each takes is the other variable's."""
    tp, size = plan.parts[0].tp, plan.micro_batch or 1
    dp = plan.gpus // tp
    even = Plans.of(
        tp=tp, dp=dp, zero=plan.zero, replicas=plan.copies, micro_batch=size, global_batch=dp * size * plan.micro_batches, sequence=plan.sequence,
        recompute=Recompute[plan.recompute.upper()], sequence_parallel=tp > 1,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(fsdp2(Planned.of(shape, even, how)).text)
    return found
