"""The device mesh of a plan (`whaleflux plan --emit fsdp2`), and what a training script asks of it: what to shard over, which data to read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from whaleflux.errors import FieldViolation, InvalidArgument

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # of the file; outermost first
VARIABLE, FILE = "MESH", "mesh.json"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class PlannedMesh:
    """`mesh` has the dimensions pp, dp_replicate, fsdp and tp; shards lie over `fsdp`, which are the data-parallel ranks with those of `cp`.

    Batches are in samples: each data-parallel rank (`data_rank` of `data_size`) takes `micro_batches` of `micro_batch` in a step.
    """

    mesh: DeviceMesh
    cp: DeviceMesh  # ranks that share a sequence
    data_rank: int
    data_size: int
    micro_batch: int
    micro_batches: int
    sequence: int
    reshard_after_forward: bool
    reduce_each_micro_batch: bool
    recomputed: float  # the share of this stage's layers whose activations are computed again
    stage_layers: tuple[int, ...]  # of each pipeline stage, its virtual ones together; (): the file does not say
    policy: MixedPrecisionPolicy

    @property
    def tp(self) -> DeviceMesh:
        """Give it to `parallelize_module`, before `shard`."""
        return self.mesh["tp"]

    @property
    def shard_over(self) -> DeviceMesh:
        """For `fully_shard`: one dimension (FSDP), or replicas of shards (HSDP; of one rank each: DDP)."""
        replicated = self.mesh["dp_replicate"].size() > 1
        return self.mesh["dp_replicate", "fsdp"] if replicated else self.mesh["fsdp"]

    def shard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """Makes an FSDP2 module of each of `blocks` (the layers) and of `model`, in place, as planned. Returns `model`."""
        for module in (*blocks, model):
            fully_shard(
                module,
                mesh=self.shard_over,
                reshard_after_forward=self.reshard_after_forward and module is not model,
                mp_policy=self.policy,
            )
        return model

    def before_backward(self, model: nn.Module, micro_batch: int) -> None:
        """Call it before the backward pass of each micro-batch (counted from 0): where the plan reduces gradients once, only the last one does."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(self.reduce_each_micro_batch or micro_batch == self.micro_batches - 1)


def device_mesh(plan: str | Path | Mapping[str, Any] | None = None, device: str | None = None) -> PlannedMesh:
    """The mesh of `plan`: a path, the file's content, or (None) what the variable MESH names or holds, else `mesh.json` in the working folder.

    `device`: cuda where there is one, else cpu. Starts torch.distributed if nobody has. Raises InvalidArgument with the field where the file
    is wrong, or its mesh is for another number of ranks than WORLD_SIZE. An elastic job that `submit` planned finds another mesh in each attempt of
    another size.
    """
    given = _read(plan)
    sizes = _sizes(given)
    _for_so_many(sizes)
    recomputed, layers = _share(given, "recomputed"), _stage_layers(given, sizes["pp"])
    policy = MixedPrecisionPolicy(_dtype(given, "parameters", "bfloat16"), _dtype(given, "reduce", "float32"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    sharding = (sizes["pp"], sizes["dp_replicate"], sizes["dp_shard"] * sizes["cp"], sizes["tp"])
    mesh = init_device_mesh(kind, sharding, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    sequences = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=AXES)
    replica, shard = (sequences.get_local_rank(axis) for axis in ("dp_replicate", "dp_shard"))
    return PlannedMesh(
        mesh=mesh,
        cp=sequences["cp"],
        data_rank=replica * sizes["dp_shard"] + shard,
        data_size=sizes["dp_replicate"] * sizes["dp_shard"],
        micro_batch=_whole(given, "", "micro_batch"),
        micro_batches=_whole(given, "", "micro_batches"),
        sequence=_whole(given, "", "sequence"),
        reshard_after_forward=bool(given.get("reshard_after_forward", True)),
        reduce_each_micro_batch=bool(given.get("reduce_each_micro_batch", True)),
        recomputed=_of_stage(
            mesh.get_local_rank("pp"), recomputed, layers, _whole(given, "", "recomputing_stages", sizes["pp"])
        ),
        stage_layers=layers,
        policy=policy,
    )


def _wrong(field: str, words: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(field, f"{words}; make the file with: whaleflux plan MODEL ... --emit fsdp2"))


def _read(plan: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if isinstance(plan, Mapping):
        return plan
    said = str(plan if plan is not None else os.environ.get(VARIABLE, "") or FILE)
    text = said if said.lstrip().startswith("{") else _file(said)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong("mesh.json", f"{said[:80]!r} holds no JSON") from None
    if not isinstance(found, Mapping):
        raise _wrong("mesh.json", "must be an object")
    return found


def _file(path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise _wrong("mesh.json", f"{path[:200]!r} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise _wrong("mesh.json", f"{path[:200]!r} is no text") from None


def _table(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = given.get(name)
    if not isinstance(found, Mapping):
        raise _wrong(name, "is missing, or no object")
    return found


def _stage_layers(given: Mapping[str, Any], stages: int) -> tuple[int, ...]:
    found = given.get("stage_layers", [])
    whole = isinstance(found, list) and all(type(one) is int and 1 <= one <= 1 << 31 for one in found)
    if not whole or (found and len(found) != stages):
        raise _wrong(
            "stage_layers", f"is {str(found)[:40]!r}, must be {stages} whole numbers from 1, one for each stage"
        )
    return tuple(found)


def _of_stage(stage: int, share: float, layers: tuple[int, ...], recomputing: int) -> float:
    """The file's share is of the fullest stage's layers; as many are computed again in each of the first `recomputing` stages."""
    if stage >= recomputing:
        return 0.0
    return min(1.0, share * max(layers) / layers[stage]) if layers else share


def _whole(given: Mapping[str, Any], where: str, name: str, without: int = 1) -> int:
    """`without` where it is not said."""
    value = given.get(name, without)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 31:
        raise _wrong(f"{where}.{name}".lstrip("."), f"is {str(value)[:20]!r}, must be a whole number from 1")
    return value


def _share(given: Mapping[str, Any], name: str) -> float:
    """0 where it is not said."""
    value = given.get(name, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _wrong(name, f"is {str(value)[:20]!r}, must be a number from 0 to 1")
    return float(value)


def _dtype(given: Mapping[str, Any], name: str, without: str) -> torch.dtype:
    said = given.get(name, without)
    if not isinstance(said, str) or said not in _DTYPES:
        raise _wrong(name, f"is {str(said)[:20]!r}, must be one of {', '.join(_DTYPES)}")
    return _DTYPES[said]


def _sizes(given: Mapping[str, Any]) -> dict[str, int]:
    return {axis: _whole(_table(given, "mesh"), "mesh", axis) for axis in AXES}


def _for_so_many(sizes: Mapping[str, int]) -> None:
    """The file is for as many ranks as there are."""
    wanted = 1
    for size in sizes.values():
        wanted *= size
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != there:
        split = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one rank"
        raise _wrong(
            "mesh",
            f"is for {wanted} ranks ({split}), and WORLD_SIZE is {there}: start so many, or plan for --gpus {there}",
        )
