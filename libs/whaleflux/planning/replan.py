"""The same training on another number of ranks: after a resize, or a failure that left fewer. Every rank comes to the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.planning.arrays import Flags
from whaleflux.planning.emit.mesh import fsdp2
from whaleflux.planning.emit.planned import Planned
from whaleflux.planning.found import Split
from whaleflux.planning.known_models import model_said
from whaleflux.planning.machine import Machine
from whaleflux.planning.model_shape import ModelShape
from whaleflux.planning.plans import Plans
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.training import Training

KEY = "replan"  # of a mesh's file
_SLACK = (0.0, 0.05, 0.25)  # how far the batch may be from the planned one, the nearest first


def wish(model: str, split: Split, gpu: str, how: Training) -> dict[str, Any]:
    """What a mesh's file says for `mesh_of`. Only data parallelism changes: checkpoints of the other dimensions, and of stages with other layers, would have to be cut anew."""
    return {
        "model": model, "gpu": gpu, "batch": split.global_batch, "sequence": split.sequence, "tp": split.tp, "pp": split.pp, "cp": split.cp,
        "vp": split.vp, "first_layers": split.first_layers, "last_layers": split.last_layers,
        "adapters": bool(how.frozen), "fp8": bool(how.fp8),
    }  # fmt: skip


def mesh_of(said: Mapping[str, Any], ranks: int) -> str:
    """The mesh's file for so many ranks, JSON. Raises InvalidArgument where no plan of them fits, or `said` is no wish."""
    try:
        shape, gpu = model_said(str(said["model"])), CATALOGUE.types[str(said["gpu"])]
        whole = {name: int(said[name]) for name in ("batch", "sequence", "tp", "pp", "cp")}
        whole |= {name: int(said.get(name, 0)) for name in ("vp", "first_layers", "last_layers")}
    except (KeyError, TypeError, ValueError) as wrong:
        raise InvalidArgument(
            FieldViolation(KEY, f"is not as it was written ({wrong}); submit the job again")
        ) from None
    how = Training(frozen=bool(said.get("adapters")), fp8=float(bool(said.get("fp8"))))
    split = _split(shape, Machine.of(gpu, "fp8" if said.get("fp8") else "bf16"), whole, how, ranks)
    return fsdp2(Planned.of(shape, split.plans(), how)).text


def _same_ends(plans: Plans, whole: Mapping[str, int]) -> Flags:
    return np.asarray((plans.first_layers == whole["first_layers"]) & (plans.last_layers == whole["last_layers"]))


def _split(shape: ModelShape, machine: Machine, whole: Mapping[str, int], how: Training, ranks: int) -> Split:
    copy = whole["tp"] * whole["pp"] * whole["cp"]
    for slack in _SLACK if ranks % copy == 0 else ():
        asked = Asked(
            ranks, whole["sequence"], tp=whole["tp"], pp=whole["pp"], cp=whole["cp"], ep=1, vp=whole["vp"], batch=whole["batch"], batch_slack=slack
        )  # fmt: skip
        best = search(shape, machine, asked, how, can=lambda plans: _same_ends(plans, whole)).best
        if best is not None and best.split.gpus == ranks:
            return best.split
    raise InvalidArgument(
        FieldViolation(
            "WORLD_SIZE",
            f"is {ranks}, and no plan with tp {whole['tp']}, pp {whole['pp']}, cp {whole['cp']} of so many fits; run a multiple of {copy} ranks, or submit anew",
        )
    )
