"""The scheduler: python -m whaleflux_scheduler --help."""

from __future__ import annotations

from whaleflux import telemetry
from whaleflux.service import Parts, ServiceContext, main
from whaleflux.service_connections import open_code_store
from whaleflux.telemetry import Metric
from whaleflux_scheduler.bootstrap import Peers, assemble
from whaleflux_scheduler.bursts import BurstSettings
from whaleflux_scheduler.rebalances import RebalanceSettings
from whaleflux_scheduler.settings import Settings
from whaleflux_scheduler.training_plans import calibrations


async def build(ctx: ServiceContext[Settings]) -> Parts:
    """Any replica reads and takes jobs; one at a time decides and serves the agents."""
    settings = ctx.settings
    telemetry.from_zero(Metric.JOB_WAIT)
    telemetry.from_zero(Metric.RECOVERY_DURATION)
    telemetry.from_zero(Metric.CLAIMS_REFUSED, "progress", "ray")
    peers = Peers.dial(
        inventory=ctx.channel("inventory") if settings.inventory else None,
        health=ctx.channel("health_monitor") if settings.health_monitor else None,
        checkpoint=ctx.channel("checkpoint") if settings.checkpoint else None,
    )
    bus = ctx.bus if settings.nats else None
    service = assemble(
        ctx.store,
        bus,
        ctx.clock,
        peers,
        settings.timeouts(),
        ctx.address,
        settings.keep_ended_jobs,
        open_code_store(bus, ctx.clock, settings.code_store_bytes) if bus else None,
        settings.code_grace_s,
        settings.queue_half_life_s,
        promises=settings.promise_rules(),
        let_end_s=settings.preemption_let_end_s,
        rebalancing=RebalanceSettings(settings.rebalance, settings.rebalance_rules()),
        people=ctx.trust.known,
        bursting=BurstSettings(settings.burst, settings.burst_rules(), settings.burst_every_s),
        measured=calibrations(settings.calibrations),
    )
    return Parts(servicers=service.servicers, loops=service.loops, ready=service.ready)


if __name__ == "__main__":
    main("scheduler", Settings, build)
