"""What user code imports: the checkpointer for training scripts and the typed client of the control plane.

Imported lazily, so that a client does not need torch and a training script does not load the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whaleflux.sdk.checkpointer import Checkpointer, stabilise_buckets
    from whaleflux.sdk.client import AsyncClient, Client

__all__ = ["AsyncClient", "Checkpointer", "Client", "stabilise_buckets"]

_HOME = {
    "Checkpointer": "whaleflux.sdk.checkpointer",
    "stabilise_buckets": "whaleflux.sdk.checkpointer",
    "AsyncClient": "whaleflux.sdk.client",
    "Client": "whaleflux.sdk.client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"whaleflux.sdk has no {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
