"""The whole state of one rank as a dictionary that torch.distributed.checkpoint can save, and back."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from whaleflux.sdk import generators

_OWN_BUFFERS_BYTES = 64 << 20  # larger ones are saved once for all ranks, as parameters are


@runtime_checkable
class Stateful(Protocol):
    """Data loaders, schedulers, scalers and other parts that know their own state."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What is saved. `others` are saved by every rank for itself: LR scheduler, gradient scaler, what the user adds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Stateful | None = None
    others: Mapping[str, Stateful] = field(default_factory=dict)


class TrainingState:
    """Keys: "model", "optimizer" (sharded or replicated as torch sees fit), "step", "world", and "rank/<rank>" for each rank.

    A rank's own part is one opaque value, so that whatever it holds comes back as it was: generators, position in the data,
    schedulers, and the buffers of the model (BatchNorm's statistics differ from rank to rank; only one rank's are in "model").
    """

    def __init__(self, parts: Parts, rank: int, world_size: int) -> None:
        self._parts, self._rank, self._world_size = parts, rank, world_size

    def capture(self, step: int, position: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of everything in main memory, safe from the next optimizer step."""
        model, optimizer = get_state_dict(self._parts.model, self._parts.optimizer)
        return {
            "model": _copied(model),
            "optimizer": _copied(optimizer),
            "step": torch.tensor(step),
            "world": torch.tensor(self._world_size),
            own_key(self._rank): self._own(position),
        }

    def targets(self, ranks: range | None = None) -> dict[str, Any]:
        """What a load writes into: as `capture`, without copies, and with the own parts of these ranks."""
        model, optimizer = get_state_dict(self._parts.model, self._parts.optimizer)
        shared = {"model": model, "optimizer": optimizer, "step": torch.tensor(0), "world": torch.tensor(0)}
        return shared | {own_key(rank): b"" for rank in ranks or ()}

    def apply_shared(self, state: dict[str, Any]) -> int:
        """Takes over what all ranks share; returns the number of complete steps."""
        set_state_dict(
            self._parts.model,
            self._parts.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return int(state["step"])

    def apply_others(self, own: dict[str, Any]) -> None:
        """Takes over what every rank has and what is alike on all of them."""
        for name, part in self._parts.others.items():
            if name in own["others"]:
                part.load_state_dict(own["others"][name])
        buffers = dict(self._parts.model.named_buffers())
        with torch.no_grad():
            for name, value in own["buffers"].items():
                if name in buffers:
                    buffers[name].copy_(value)

    def _own(self, position: Mapping[str, Any]) -> bytes:
        return packed(
            {
                "generators": generators.capture(),
                "position": dict(position),
                "data": None if self._parts.data is None else self._parts.data.state_dict(),
                "others": {name: part.state_dict() for name, part in self._parts.others.items()},
                "buffers": self._own_buffers(),
            }
        )

    def _own_buffers(self) -> dict[str, torch.Tensor]:
        if self._world_size == 1:
            return {}  # those in "model" are this rank's
        found = dict(_persistent_buffers(self._parts.model))
        size = sum(buffer.numel() * buffer.element_size() for buffer in found.values())
        return found if size <= _OWN_BUFFERS_BYTES else {}


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if type(buffer) is torch.Tensor and name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def own_key(rank: int) -> str:
    """Where a rank's own part is."""
    return f"rank/{rank}"


def packed(value: Any) -> bytes:
    """Any value as bytes; tensors wherever they are come back in main memory."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def unpacked(content: bytes) -> Any:
    """What was `packed`. Like every PyTorch checkpoint of programs' own objects, it can run code: trust its folder."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)


def _copied(state: Any) -> Any:
    """A deep copy with every tensor in main memory; sharded tensors copy their local part."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone() if state.device.type == "cpu" else state.detach().cpu()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(_copied(value) for value in state))
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return copy.deepcopy(state)


def state_digest(state: dict[str, Any]) -> str:
    """SHA-256 over model and optimizer, in key order: equal digests mean bitwise equal training states."""
    import hashlib

    digest = hashlib.sha256()

    def feed(path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(path.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                feed(f"{path}/{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                feed(f"{path}/{index}", item)

    feed("model", state["model"])
    feed("optimizer", state["optimizer"])
    return digest.hexdigest()
