"""Ends a task and proves that nothing is left of it: no living thread, and nobody new who computes on its GPUs.

The rule for GPUs: whoever computed there before the start is somebody else; whoever appeared since is of the task, for
the GPUs were its own. A driver that does not answer leaves it unknown, and unknown is not free: the GPUs stay taken
and the driver is asked again. What cannot be ended is reported with evidence and tried again, for as long as it takes.

On a GPU that others share, whoever appeared since may be a neighbour: there only processes that bear the task's token are of
the task, and that no process of it lives is the proof.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from whaleflux_agent.devices.source import DevicesUnreadable
from whaleflux_agent.runtime import procfs
from whaleflux_agent.runtime.api import Running

STUCK_AFTER_S = 10.0  # from the first SIGKILL
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0  # between looks: the kernel sends no event for the end of a group
_REPORT_AGAIN_S = 60.0
_SHOWN, _EVIDENCE_CHARS = 8, 500  # a job's record holds the evidence of all its tasks
_SIGTERM, _SIGKILL = 15, 9

Computing = Callable[[Collection[str]], Awaitable[frozenset[int]]]


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """Asks whether a task's GPUs are free of it. `computing` gives the pids with work on GPUs, or DevicesUnreadable."""

    computing: Computing
    gpu_uuids: tuple[str, ...]  # empty: only played, there is nothing to ask
    before: frozenset[int]  # pids that computed there before the task began
    token: str = ""  # of the task, where others share its GPUs; "": they are its own

    async def remains(self) -> tuple[str, ...]:
        """Who still computes there; empty when nobody of the task does."""
        if not self.gpu_uuids:
            return ()
        try:
            pids = await self.computing(self.gpu_uuids) - self.before
        except DevicesUnreadable as silence:
            return (f"whether its GPUs are free is not known: {silence}",)
        if self.token:
            pids = await asyncio.to_thread(procfs.bearers, pids, self.token)
        return tuple(f"pid {pid} computes on its GPUs" for pid in sorted(pids))


async def terminate(
    running: Running,
    gpus: GpuCheck,
    *,
    grace_s: float,
    on_stuck: Callable[[str], Awaitable[None]],
    stuck_after_s: float = STUCK_AFTER_S,
) -> None:
    """SIGTERM, up to `grace_s` to comply, then SIGKILL until nothing is left.

    `on_stuck` is given the evidence once the task has outlived its SIGKILL, and again when it has changed, at most once a
    minute: where threads wait changes all the time.
    """
    await running.signal(_SIGTERM)
    deadline, pause_s = _now_s() + grace_s, _FIRST_PAUSE_S
    while not await running.gone() and (left_s := deadline - _now_s()) > 0:
        await asyncio.sleep(min(pause_s, left_s))
    report_at_s, reported = _now_s() + stuck_after_s, ""
    while await _left(running, gpus):
        if _now_s() >= report_at_s and (evidence := await _evidence(running, gpus)) not in ("", reported):
            await on_stuck(evidence)
            report_at_s, reported = _now_s() + _REPORT_AGAIN_S, evidence
        await asyncio.sleep(pause_s)
        pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)


async def _left(running: Running, gpus: GpuCheck) -> bool:
    """Whether anything is left; processes are killed again at each look, since new ones may have been forked."""
    if await running.gone():
        return bool(await gpus.remains())
    await running.signal(_SIGKILL)
    return True


async def _evidence(running: Running, gpus: GpuCheck) -> str:
    return "; ".join((await running.remains() or await gpus.remains())[:_SHOWN])[:_EVIDENCE_CHARS]


def _now_s() -> float:
    """Of the clock that the pauses are measured by."""
    return asyncio.get_running_loop().time()
