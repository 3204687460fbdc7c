"""Once per interval: what each device did, who had it, what its ranks said of their steps, as one batch for the outbox."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

from whaleflux.clock import Clock
from whaleflux.v1 import usage_pb2
from whaleflux_agent.core.usage import DeviceUsage
from whaleflux_agent.core.work import Work
from whaleflux_agent.usage.network import NetworkCounters
from whaleflux_agent.usage.outbox import UsageOutbox
from whaleflux_agent.usage.source import UsageSource
from whaleflux_agent.usage.steps import StepLog

TICK_S = 1.0
MOST_HOLDERS = 64  # of one device


@dataclass(frozen=True, slots=True)
class Sampled:
    """Whom batches are of."""

    node: str
    boot_id: str
    simulated: Callable[[], bool]
    devices: Callable[[], Iterable[str]]  # UUIDs
    works: Callable[[], Iterable[Work]]  # that may have processes


class Sampler:
    """One loop."""

    def __init__(
        self,
        of: Sampled,
        source: UsageSource,
        network: NetworkCounters,
        steps: StepLog,
        outbox: UsageOutbox,
        clock: Clock,
        interval_s: float,
    ) -> None:
        self._of, self._source, self._network, self._steps = of, source, network, steps
        self._outbox, self._clock, self._interval_s = outbox, clock, interval_s
        self._began_s = clock.monotonic()

    async def run(self) -> None:
        """Until cancelled. Agents that start together do not send together."""
        await self.sample()  # counters begin
        due_s = self._clock.monotonic() + self._interval_s * (0.5 + random.random() / 2)
        while True:
            while (left_s := due_s - self._clock.monotonic()) > 0:
                await self._clock.sleep(min(left_s, TICK_S))
                await self._source.tick()
            await self._outbox.put(await self.sample())
            due_s = max(due_s, self._clock.monotonic() - self._interval_s) + self._interval_s

    async def sample(self) -> usage_pb2.UsageBatch:
        """What was since the last call."""
        works = list(self._of.works())
        held = {uuid for work in works for uuid in work.gpu_uuids}
        devices = await self._source.sample([uuid for uuid in self._of.devices() if uuid], held)
        network = await asyncio.to_thread(self._network.take)
        now_s, end = self._clock.monotonic(), self._clock.now()
        passed_s, self._began_s = now_s - self._began_s, now_s
        steps, dropped = self._steps.take()
        batch = usage_pb2.UsageBatch(
            node=self._of.node,
            boot_id=self._of.boot_id,
            simulated=self._of.simulated(),
            gpus=[_message(seen, works) for seen in devices],
            steps=steps,
            network=network,
            dropped_steps=dropped,
        )
        batch.start_time.FromDatetime(end - timedelta(seconds=passed_s))
        batch.end_time.FromDatetime(end)
        return batch


def _message(seen: DeviceUsage, works: Iterable[Work]) -> usage_pb2.GpuUsage:
    holders = [
        usage_pb2.UsageHolder(job=work.job, job_uid=work.job_uid, epoch=work.epoch)
        for work in works
        if seen.device in work.gpu_uuids
    ]
    return usage_pb2.GpuUsage(holders=holders[:MOST_HOLDERS], **asdict(seen))
