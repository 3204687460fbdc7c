"""How a job's file says that its work is split, as far as that explains where time goes. Pure; what it says may be anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from whaleflux_console.core.facts import WHOLE_PPM, Plan

MOST_CHARACTERS = 100_000
MOST = 1_000_000  # stages, micro-batches
# A step is a forward pass and a backward one of twice its work; recomputing does a forward pass again.
_FORWARD_SHARE = 3


def plan_of(pipeline: int, mesh_text: str) -> Plan | None:
    """`pipeline`: stages as the job file's `parallel` says, 0: it says nothing; `mesh_text`: the variable MESH of a planned job.

    A job that says nothing of stages has none. None: it has stages, and nobody says how many micro-batches pass through them.
    """
    mesh = _read(mesh_text)
    axes = mesh.get("mesh")
    stages = pipeline or _whole(axes.get("pp") if isinstance(axes, Mapping) else None) or 1
    micro_batches = _whole(mesh.get("micro_batches"))
    if stages > 1 and not micro_batches:
        return None
    return Plan(stages, _whole(mesh.get("virtual_stages")) or 1, micro_batches or 1, _again_ppm(mesh))


def _again_ppm(mesh: Mapping[str, Any]) -> int:
    """Of the time that computes, what is forward work done again: r / (3 + r), where r of the layers are recomputed."""
    share = mesh.get("recomputed")
    if mesh.get("recompute") != "full" or isinstance(share, bool) or not isinstance(share, (int, float)):
        return 0
    return round(WHOLE_PPM * share / (_FORWARD_SHARE + share)) if 0 < share <= 1 else 0


def _read(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if 0 < len(text) <= MOST_CHARACTERS else {}
    except (ValueError, RecursionError):  # a path, or somebody else's variable
        return {}
    return found if isinstance(found, dict) else {}


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST else 0
