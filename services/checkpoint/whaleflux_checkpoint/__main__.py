"""The checkpoint service: python -m whaleflux_checkpoint --help."""

from __future__ import annotations

import asyncio

from whaleflux import telemetry
from whaleflux.events.publisher import Publisher
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.telemetry import Metric
from whaleflux.v1.checkpoint_pb2_grpc import add_CheckpointServiceServicer_to_server
from whaleflux.v1.scheduler_pb2_grpc import SchedulerServiceStub
from whaleflux_checkpoint.collector import Collector
from whaleflux_checkpoint.news import of_checkpoint
from whaleflux_checkpoint.servicer import Checkpoints
from whaleflux_checkpoint.settings import Settings


async def build(ctx: ServiceContext[Settings]) -> Parts:
    """Any replica answers; one at a time publishes and collects."""
    telemetry.from_zero(Metric.CHECKPOINT_COMMITS, "committed", "fenced")

    async def publish(leader: Leader) -> None:
        publisher = Publisher(
            ctx.store,
            ctx.bus,
            keys.CHECKPOINTS,
            lambda change: of_checkpoint(change, ctx.clock.now()),
            name="checkpoint",
            leader=leader,
            clock=ctx.clock,
        )
        await publisher.run()

    async def collect(leader: Leader) -> None:
        if ctx.settings.scheduler:
            scheduler = SchedulerServiceStub(ctx.channel("scheduler"))
            await Collector(ctx.store, scheduler, ctx.clock, ctx.settings.deleted_job_grace_s, leader).run()

    async def work(leader: Leader) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(publish(leader))
            group.create_task(collect(leader))

    async def work_while_leading() -> None:
        await lead(ctx.store, "checkpoint", ctx.address, work)

    servicer = Checkpoints(ctx.store, ctx.clock, ctx.trust.queue_access)
    return Parts(
        servicers=[(add_CheckpointServiceServicer_to_server, servicer, "whaleflux.v1.CheckpointService")],
        loops=[work_while_leading],
    )


if __name__ == "__main__":
    main("checkpoint", Settings, build)
