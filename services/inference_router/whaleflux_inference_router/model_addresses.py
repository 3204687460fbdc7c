"""Where a model's own servers may be, asked when it is declared; each time that they are dialled it is asked again (`resolver`)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, PermissionDenied, StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router.core import allowed_networks
from whaleflux_inference_router.resolver import Resolver

CHECKED_S = 5.0  # what is not looked up within it is judged when it is dialled
MOST_LOOKED_UP = 64  # the same
MOST_SAID = 20


async def check(model: pb.Model, resolver: Resolver, known: Collection[str] = ()) -> None:
    """Raises InvalidArgument for each address that may not be dialled; those that are `known` were asked for before.

    A name that nobody can look up now is no mistake: its replica says so, and waits.
    """
    new = [(i, address) for i, address in enumerate(model.engine.addresses) if address not in known]
    try:
        async with asyncio.timeout(CHECKED_S):
            asked = (_refusal(address, i, model.allowed_addresses, resolver) for i, address in new[:MOST_LOOKED_UP])
            found = [wrong for wrong in await asyncio.gather(*asked) if wrong is not None]
    except TimeoutError:
        return
    if found:
        raise InvalidArgument(found[:MOST_SAID])


async def _refusal(address: str, i: int, exempt: Sequence[str], resolver: Resolver) -> FieldViolation | None:
    try:
        await resolver.dialled(address, exempt)
    except FailedPrecondition as refused:
        return FieldViolation(f"model.engine.addresses[{i}]", refused.message)
    except StatusError:
        return None
    return None


def settle_exemptions(model: pb.Model, before: Sequence[str], *, by_operator: bool) -> None:
    """Brings `allowed_addresses` into the form that is compared. Raises PermissionDenied where no operator changes them."""
    wanted = allowed_networks.exemptions(model.allowed_addresses, "model.allowed_addresses")
    if set(wanted) != set(before) and not by_operator:
        raise PermissionDenied(
            "allowed_addresses are an operator's to change; let one run: whaleflux deploy --allow-address IP:PORT FILE",
            reason=ErrorReason.ROLE_MISSING,
        )
    model.allowed_addresses[:] = wanted
