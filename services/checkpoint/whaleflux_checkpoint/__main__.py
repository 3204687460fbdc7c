"""The checkpoint service: python -m whaleflux_checkpoint --help."""

from __future__ import annotations

from whaleflux.config import ServiceSettings
from whaleflux.events.publisher import Publisher
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.v1.checkpoint_pb2_grpc import add_CheckpointServiceServicer_to_server
from whaleflux_checkpoint.news import of_checkpoint
from whaleflux_checkpoint.servicer import Checkpoints


class Settings(ServiceSettings):
    """What can be restored, and from where."""


async def build(ctx: ServiceContext[Settings]) -> Parts:
    """Any replica answers; one at a time publishes."""

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

    async def publish_while_leading() -> None:
        await lead(ctx.store, "checkpoint", ctx.address, publish)

    servicer = Checkpoints(ctx.store, ctx.clock)
    return Parts(
        servicers=[(add_CheckpointServiceServicer_to_server, servicer, "whaleflux.v1.CheckpointService")],
        loops=[publish_while_leading],
    )


if __name__ == "__main__":
    main("checkpoint", Settings, build)
