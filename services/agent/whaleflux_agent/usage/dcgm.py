"""DCGM's exporter, where one runs on the node: it has the performance counters then, and they are left to it.

https://github.com/NVIDIA/dcgm-exporter. Profiling fields are means over the exporter's own interval.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException
from urllib.error import URLError

from whaleflux_agent.core import usage
from whaleflux_agent.core.usage import DeviceUsage

ANSWER_WITHIN_S = 2.0
_MOST_BYTES = 4 << 20
_LINE = re.compile(r"(DCGM_FI_[A-Z0-9_]+)\{([^}]*)\}\s+(\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_TENSOR, _SM, _DRAM = "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "DCGM_FI_PROF_SM_ACTIVE", "DCGM_FI_PROF_DRAM_ACTIVE"
_BUSY = "DCGM_FI_PROF_GR_ENGINE_ACTIVE"
_PROFILING = {_TENSOR, _SM, _DRAM, _BUSY}

Place = tuple[str, int | None]  # UUID of the GPU, and the GPU instance's number of a MIG instance


@dataclass(frozen=True, slots=True)
class Exporter:
    """`url` of its metrics; empty: there is none. Calls block, with a deadline; no proxy is asked."""

    url: str

    def read(self) -> Mapping[Place, Mapping[str, float]] | None:
        """Profiling fields of each device that it profiles; empty: nobody there does; None: no answer, and so not known now."""
        if not self.url:
            return {}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.url, timeout=ANSWER_WITHIN_S) as answer:
                return parse(answer.read(_MOST_BYTES).decode("utf-8", "replace"))
        except (OSError, ValueError, HTTPException) as error:
            return {} if isinstance(error, URLError) and isinstance(error.reason, ConnectionRefusedError) else None


def parse(text: str) -> dict[Place, dict[str, float]]:
    """Profiling fields by device, of Prometheus' text; what is no number is left out. Pure."""
    found: dict[Place, dict[str, float]] = {}
    for name, labels, value in _LINE.findall(text):
        if name not in _PROFILING:
            continue
        of = dict(_LABEL.findall(labels))
        part = of.get("GPU_I_ID", "")
        try:
            found.setdefault((of["UUID"], int(part) if part else None), {})[name] = float(value)
        except (KeyError, ValueError):
            continue
    return found


def with_counters(seen: DeviceUsage, fields: Mapping[str, float] | None) -> DeviceUsage:
    """The same with what the exporter says of it. Pure."""
    if not fields:
        return seen
    share = {name: usage.ppm(value) for name, value in fields.items()}
    return replace(
        seen,
        source="dcgm",
        tensor_ppm=usage.times(share.get(_TENSOR), seen.clock_ppm),
        sm_active_ppm=share.get(_SM),
        dram_active_ppm=share.get(_DRAM),
        busy_ppm=share.get(_BUSY, seen.busy_ppm),
    )
