"""What user code imports: the checkpointer for training scripts and the typed client of the control plane.

Imported lazily, so that a client does not need torch and a training script does not load the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whaleflux.sdk.balance import Balance
    from whaleflux.sdk.buckets import stabilise_buckets
    from whaleflux.sdk.checkpointer import Checkpointer
    from whaleflux.sdk.client import AsyncClient, Client
    from whaleflux.sdk.datasets import Dataset
    from whaleflux.sdk.errors import CheckpointError, RestoreFailed, SaveFailed, WorldChanged
    from whaleflux.sdk.gpu_share import keep_to_share
    from whaleflux.sdk.mesh import PlannedMesh, device_mesh
    from whaleflux.sdk.words import state_of

__all__ = [
    "AsyncClient",
    "Balance",
    "CheckpointError",
    "Checkpointer",
    "Client",
    "Dataset",
    "PlannedMesh",
    "RestoreFailed",
    "SaveFailed",
    "WorldChanged",
    "device_mesh",
    "keep_to_share",
    "stabilise_buckets",
    "state_of",
]

_HOME = {
    "Balance": "whaleflux.sdk.balance",
    "Checkpointer": "whaleflux.sdk.checkpointer",
    "stabilise_buckets": "whaleflux.sdk.buckets",
    "keep_to_share": "whaleflux.sdk.gpu_share",
    "CheckpointError": "whaleflux.sdk.errors",
    "RestoreFailed": "whaleflux.sdk.errors",
    "SaveFailed": "whaleflux.sdk.errors",
    "WorldChanged": "whaleflux.sdk.errors",
    "Dataset": "whaleflux.sdk.datasets",
    "AsyncClient": "whaleflux.sdk.client",
    "Client": "whaleflux.sdk.client",
    "PlannedMesh": "whaleflux.sdk.mesh",
    "device_mesh": "whaleflux.sdk.mesh",
    "state_of": "whaleflux.sdk.words",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"whaleflux.sdk has no {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
