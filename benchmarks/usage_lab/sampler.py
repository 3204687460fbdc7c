"""The agent's counters in a process of their own, as the agent has them.

    python -m benchmarks.usage_lab.sampler FILE EVERY_S

Writes a line of JSON per interval until its standard input ends; the last line is what it has cost of CPU.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pynvml

from whaleflux.clock import SystemClock
from whaleflux_agent.usage.dcgm import Exporter
from whaleflux_agent.usage.nvml import NvmlUsage

_TICK_S = 1.0


def devices() -> list[str]:
    """UUIDs of the GPUs."""
    pynvml.nvmlInit()
    handles = (pynvml.nvmlDeviceGetHandleByIndex(at) for at in range(pynvml.nvmlDeviceGetCount()))
    return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]


async def run(write: Callable[[dict[str, Any]], None], every_s: float) -> None:
    """Until nobody wants more."""
    uuids, source = devices(), NvmlUsage(pynvml, Exporter(""), SystemClock())
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await source.sample(uuids, ())
    began, cpu_s = time.time(), time.process_time()
    start_s = began
    while not ended.done():
        while not ended.done() and time.time() - start_s < every_s:
            await asyncio.sleep(_TICK_S)
            await source.tick()
        seen = await source.sample(uuids, ())
        end_s = time.time()
        write({"start_s": start_s, "end_s": end_s, "gpus": [asdict(one) for one in seen]})
        start_s = end_s
    write({"cores": (time.process_time() - cpu_s) / (time.time() - began), "gpus": len(uuids)})
    await source.close()


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as lines:
        asyncio.run(run(lambda found: print(json.dumps(found), file=lines), float(sys.argv[2])))
