"""The whole state of one rank as a dictionary that torch.distributed.checkpoint can save, and back."""

from __future__ import annotations

import random
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


@runtime_checkable
class Stateful(Protocol):
    """Data loaders and other parts that know their own position."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingState:
    """Model, optimizer, position in the data and the random generators of this rank.

    Keys: "model", "optimizer" (sharded or replicated as torch sees fit), "rank/<rank>" (what only this rank has) and
    "step". The same keys are read whatever the world size; a rank that did not exist before starts its own part anew.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Stateful | None, rank: int) -> None:
        self._model, self._optimizer, self._data, self._rank = model, optimizer, data, rank

    def capture(self, step: int) -> dict[str, Any]:
        """A copy of everything in main memory, safe from the next optimizer step."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {
            "model": _copied(model),
            "optimizer": _copied(optimizer),
            "step": torch.tensor(step),
            f"rank/{self._rank}": self._own(),
        }

    def targets(self, *, with_own: bool) -> dict[str, Any]:
        """What a load writes into: as `capture`, without copies."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        own = {f"rank/{self._rank}": self._own()} if with_own else {}
        return {"model": model, "optimizer": optimizer, "step": torch.tensor(0), **own}

    def apply(self, state: dict[str, Any]) -> int:
        """Takes over what was loaded into `targets`; returns the number of complete steps."""
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        own = state.get(f"rank/{self._rank}")
        if own is not None:
            self._apply_own(own)
        return int(state["step"])

    def _own(self) -> dict[str, Any]:
        own: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        if self._data is not None:
            own["data"] = self._data.state_dict()
        return own

    def _apply_own(self, own: dict[str, Any]) -> None:
        torch.set_rng_state(own["torch"])
        random.setstate(_tuples(own["python"]))
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        if self._data is not None and "data" in own:
            self._data.load_state_dict(own["data"])


def _copied(state: Any) -> Any:
    """A deep copy with every tensor in main memory; sharded tensors copy their local part."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone() if state.device.type == "cpu" else state.detach().cpu()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


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
