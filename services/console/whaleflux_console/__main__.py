"""The console service: python -m whaleflux_console --help."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from whaleflux.events.publisher import EntryChange, OutgoingEvent, Publisher
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.store.placements import Placements
from whaleflux.v1.console_pb2_grpc import add_CostServiceServicer_to_server
from whaleflux.v1.usage_pb2_grpc import add_UsageServiceServicer_to_server
from whaleflux_console import news
from whaleflux_console.intake import UsageIntake
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.servicer import CostServicer
from whaleflux_console.settings import Settings

ROLE = "console"
Context = ServiceContext[Settings]


async def build(ctx: Context) -> Parts:
    """Any replica answers; one at a time publishes."""
    servicer = CostServicer(Prices(ctx.store, ctx.clock), Adjustments(ctx.store, ctx.clock))

    async def work_while_leading() -> None:
        await lead(ctx.store, ROLE, ctx.address, partial(_publish, ctx))

    return Parts(
        servicers=[(add_CostServiceServicer_to_server, servicer, "whaleflux.v1.CostService"), *_intake(ctx)],
        loops=[work_while_leading] if ctx.settings.nats else [],
    )


def _intake(ctx: Context) -> list[tuple[Callable[[Any, Any], None], Any, str]]:
    """Without a bus nobody could read what agents say: they keep it."""
    if not ctx.settings.nats:
        return []
    intake = UsageIntake(ctx.bus, Placements(ctx.store), ctx.clock)
    return [(add_UsageServiceServicer_to_server, intake, "whaleflux.v1.UsageService")]


async def _publish(ctx: Context, leader: Leader) -> None:
    async with asyncio.TaskGroup() as group:
        for name, prefix, describe in (
            ("console-prices", keys.PRICES, news.of_price),
            ("console-adjustments", keys.ADJUSTMENTS, news.of_adjustment),
        ):

            def told(change: EntryChange, describe: news.Describe = describe) -> OutgoingEvent | None:
                return describe(change, ctx.clock.now())

            publisher = Publisher(ctx.store, ctx.bus, prefix, told, name=name, leader=leader, clock=ctx.clock)
            group.create_task(publisher.run())


if __name__ == "__main__":
    main(ROLE, Settings, build)
