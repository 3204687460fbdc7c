"""Where and as what this agent joins, as its settings say."""

from __future__ import annotations

from whaleflux.rpc.pki import server_name
from whaleflux.service import ServiceContext
from whaleflux_agent import identity
from whaleflux_agent.machine_id import host_id_file, machine_id
from whaleflux_agent.settings import Settings


def join_parameters(settings: Settings, roots: bytes, token: str = "") -> identity.JoinParameters:
    """`roots`: the authority to believe, PEM."""
    direct = bool(settings.inventory)
    return identity.JoinParameters(
        target=settings.inventory or settings.server,
        server=server_name("inventory", trust_domain=settings.trust_domain) if direct else settings.server_name,
        roots=roots,
        token=token,
        node_id=settings.own_id,
        addresses=(settings.address_for_ranks(),),
        machine_id=machine_id(settings.state_dir, host_id_file()),
        site=settings.site,
    )


async def come_back(ctx: ServiceContext[Settings], kept: identity.KeptIdentity) -> str:
    """What a running agent does that slept until its certificate had ended."""
    ask = join_parameters(ctx.settings, kept.roots)
    return await identity.come_back(ctx.tls, kept, ask, ctx.clock, lambda _: None)
