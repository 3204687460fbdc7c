"""The console service: python -m whaleflux_console --help."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from whaleflux import telemetry
from whaleflux.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from whaleflux.events.publisher import EntryChange, OutgoingEvent, Publisher
from whaleflux.service import Loop, Parts, ServiceContext, main
from whaleflux.store import keys
from whaleflux.store.election import Leader, lead
from whaleflux.store.placements import Placements
from whaleflux.telemetry import Event, Metric
from whaleflux.v1.console_pb2_grpc import add_CostServiceServicer_to_server
from whaleflux.v1.usage_pb2_grpc import add_UsageServiceServicer_to_server
from whaleflux_console import news
from whaleflux_console.bookkeeper import Progress
from whaleflux_console.books import Books
from whaleflux_console.budget_figures import BudgetFigures
from whaleflux_console.budgets import Budgets, BudgetWatch
from whaleflux_console.costs import Costs
from whaleflux_console.figures import Figures
from whaleflux_console.forecasts import Forecasts
from whaleflux_console.intake import UsageIntake
from whaleflux_console.ledger.answers import Answers
from whaleflux_console.ledger.engine import Engine
from whaleflux_console.ledger.folder import Folder
from whaleflux_console.ledger.object_folder import open_folder
from whaleflux_console.ledger.rules import Rules
from whaleflux_console.peers import peers
from whaleflux_console.prices import Adjustments, Prices
from whaleflux_console.recommendations import Recommendations
from whaleflux_console.servicer import CostServicer
from whaleflux_console.settings import Settings

ROLE = "console"
Context = ServiceContext[Settings]
_FOLLOW_S = 2.0
_log = telemetry.get_logger("whaleflux.console")


async def build(ctx: Context) -> Parts:
    """Any replica answers; one at a time publishes and keeps the ledger."""
    told = ctx.settings
    telemetry.from_zero(Metric.CLAIMS_REFUSED, "usage")
    prices, adjustments = Prices(ctx.store, ctx.clock), Adjustments(ctx.store, ctx.clock)
    loops: list[Loop] = [partial(_publish, ctx)] if told.nats else []
    on_stop: list[Loop] = []
    costs: Costs | None = None
    recommended: Recommendations | None = None
    if told.ledger_folder:
        folder = open_folder(told.ledger_folder, endpoint=told.ledger_endpoint, region=told.ledger_region)
        engine = Engine(memory_bytes=told.ledger_memory_bytes, threads=told.ledger_threads)
        answers, progress = Answers(folder, ctx.store, engine), Progress()
        costs = Costs(answers, ctx.trust.queue_access, ctx.clock, progress)
        recommended = Recommendations(ctx.store, answers, ctx.trust.queue_access, ctx.clock)
        books = _books(ctx, folder, engine, progress)
        watch = BudgetWatch(ctx.store, Forecasts(answers, ctx.clock), ctx.clock)
        loops += [partial(lead, ctx.store, f"{ROLE}-budgets", ctx.address, watch.run)]
        loops += [BudgetFigures(ctx.store, Forecasts(answers, ctx.clock), ctx.clock).run]
        loops += [partial(_follow, ctx, answers), partial(lead, ctx.store, f"{ROLE}-ledger", ctx.address, books.keep)]

        async def close() -> None:
            engine.close()

        on_stop.append(close)
    servicer = CostServicer(
        prices, adjustments, Budgets(ctx.store, ctx.clock, ctx.trust.queue_access), costs, recommended
    )
    return Parts(
        servicers=[(add_CostServiceServicer_to_server, servicer, "whaleflux.v1.CostService"), *_intake(ctx)],
        loops=loops,
        on_stop=on_stop,
    )


def _books(ctx: Context, folder: Folder, engine: Engine, progress: Progress) -> Books:
    told = ctx.settings
    rules = Rules(
        close_after_ms=round(told.ledger_close_after_s * 1000),
        raw_days=told.ledger_raw_days,
        minute_days=told.ledger_minute_days,
        hour_days=told.ledger_hour_days,
    )
    return Books(
        ctx.store,
        ctx.clock,
        ctx.bus if told.nats else None,
        folder,
        engine,
        peers(ctx.channel),
        rules,
        told.ledger_tick_s,
        progress,
        told.ledger_rebuild,
    )


def _intake(ctx: Context) -> list[tuple[Callable[[Any, Any], None], Any, str]]:
    """Without a bus nobody could read what agents say: they keep it."""
    if not ctx.settings.nats:
        return []
    intake = UsageIntake(ctx.bus, Placements(ctx.store), ctx.clock)
    return [(add_UsageServiceServicer_to_server, intake, "whaleflux.v1.UsageService")]


async def _follow(ctx: Context, answers: Answers) -> None:
    """Keeps this replica's answers and figures up to date, for ever."""
    figures = Figures(answers, ctx.clock)
    while True:
        try:
            await answers.follow()
            await figures.show()
        except (Unavailable, FailedPrecondition, DeadlineExceeded) as trouble:
            _log.warning(Event.LEDGER_TROUBLE, reason=str(trouble))
        await ctx.clock.sleep(_FOLLOW_S)


async def _publish(ctx: Context) -> None:
    async def work(leader: Leader) -> None:
        async with asyncio.TaskGroup() as group:
            for name, prefix, describe in (
                ("console-prices", keys.PRICES, news.of_price),
                ("console-adjustments", keys.ADJUSTMENTS, news.of_adjustment),
                ("console-budgets", keys.BUDGETS, news.of_budget),
                ("console-recommendations", keys.RECOMMENDATIONS, news.of_recommendation),
            ):

                def told(change: EntryChange, describe: news.Describe = describe) -> OutgoingEvent | None:
                    return describe(change, ctx.clock.now())

                publisher = Publisher(ctx.store, ctx.bus, prefix, told, name=name, leader=leader, clock=ctx.clock)
                group.create_task(publisher.run())

    await lead(ctx.store, ROLE, ctx.address, work)


if __name__ == "__main__":
    main(ROLE, Settings, build)
