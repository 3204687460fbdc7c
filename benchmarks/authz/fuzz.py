"""Calls that must not be let in, with mutated identities, names and headers: none may succeed, none may break a server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from benchmarks.authz.contract import CLIENTS_OWN, Method, Said, call, methods
from benchmarks.authz.expected import Answer, Caller, Relation, answer_of, expected
from benchmarks.authz.probes import PROBES

if TYPE_CHECKING:
    from benchmarks.authz.fleet import Thing, World

AT_ONCE = 8
_ADMIN = "spiffe://whaleflux/admin/ada"
Metadata = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Fuzzed:
    """Calls made, those that succeeded and should not have, in words."""

    calls: int = 0
    let_in: int = 0
    surprises: list[str] = field(default_factory=list)


def headers(chance: random.Random) -> Metadata:
    """Headers by which a caller pretends to be somebody else, or to come from the inside."""
    forged = [
        ("x-forwarded-client-cert", f"URI={_ADMIN}"),
        ("x-forwarded-client-cert", f'Hash={"0" * 64};Subject="CN=admin";URI={_ADMIN}'),
        ("x-forwarded-client-cert", f"By=spiffe://whaleflux/frontdoor/1;URI={_ADMIN},URI={_ADMIN}"),
        ("x-forwarded-client-cert", f'URI="{_ADMIN}";DNS=admin'),
        ("x-envoy-original-path", "/whaleflux.v1.InventoryService/ListNodes"),
        ("x-envoy-internal", "true"),
        ("x-forwarded-for", "127.0.0.1"),
        ("x-real-ip", "127.0.0.1"),
        ("authorization", "Bearer admin"),
        ("x-wf-subject", "admin/ada"),
        ("x-wf-decision-id", "1"),
        ("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"),
        ("x-goog-authenticated-user-email", "admin"),
        ("cookie", f"role=admin; uri={_ADMIN}"),
    ]
    return tuple(chance.sample(forged, chance.randint(0, 4)))


_NAMES: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name + "/",
    lambda name: name + " ",
    lambda name: name + "\n",
    lambda name: name + "\0",
    lambda name: "/" + name,
    lambda name: name.upper(),
    lambda name: name.replace("/", "//"),
    lambda name: name.replace("/", "%2f"),
    lambda name: name.replace("/", "/./"),
    lambda name: "queues/open/jobs/../../" + name,
    lambda name: name.replace("research", "-").replace("anns", "-"),
    lambda name: name.replace("a", "а"),  # a letter of another alphabet
    lambda name: name + "?x=1",
    lambda name: name + "#",
    lambda name: name * 50,
    lambda name: name + "," + name,
    lambda name: name[:-1],
    lambda name: name + "-0",
)
_PATHS: tuple[Callable[[str], str], ...] = (
    lambda path: path,
    lambda path: path + "/",
    lambda path: "/" + path,
    lambda path: path.replace("/", "//"),
    lambda path: path.lower(),
    lambda path: path.replace("Service", "Service%2f"),
    lambda path: "/whaleflux.v1.InventoryService/.." + path,
    lambda path: path + "?x",
    lambda path: path.replace("v1.", "v1..."),
    lambda path: "/grpc.health.v1.Health/../" + path[1:],
)


def mutated(request: Any, chance: random.Random) -> Any:
    """The message, or its bytes with a few of them changed, doubled, cut or followed by others."""
    if chance.random() < 0.7:
        return request
    raw = bytearray(request.SerializeToString())
    match chance.randrange(4):
        case 0 if raw:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        case 1:
            raw *= 2
        case 2:
            raw = raw[: chance.randint(0, len(raw))]
        case _:
            raw += chance.randbytes(chance.randint(1, 40))
    return bytes(raw)


async def run(world: World, seconds: float, seed: int) -> Fuzzed:
    """Fuzzes for so long; the same seed draws the same calls."""
    chance, fuzzed, until = random.Random(seed), Fuzzed(), time.monotonic() + seconds
    cells = forbidden(world)
    channels = {label: world.channel(caller) for label, caller in world.callers.items()}

    async def one() -> None:
        while time.monotonic() < until:
            method, caller, thing = chance.choice(cells)
            name, path = chance.choice(_NAMES)(thing.name if thing else ""), method.path
            if chance.random() < 0.3:
                path = chance.choice(_PATHS)(method.path)
            request, extra = mutated(PROBES[method.path].build(name), chance), headers(chance)
            said = await call(channels[caller.label], method, request, extra, path)
            fuzzed.calls += 1
            if is_surprise(method, thing, said):
                fuzzed.let_in += said.code is grpc.StatusCode.OK
                about = f"{caller.label} called {path} about {name!r} with {extra}"
                fuzzed.surprises.append(f"{about}: {said.code.name} {said.details[:200]}"[:1000])

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    await asyncio.gather(*(channel.close() for channel in channels.values()))
    return fuzzed


def forbidden(world: World) -> list[tuple[Method, Caller, Thing | None]]:
    """Cells of the matrix in which the caller must not be let in."""
    found = []
    for method in methods():
        kind = PROBES[method.path].kind
        for caller in world.callers.values():
            for thing in world.things[kind] if kind else [None]:
                relation = thing.to(caller) if thing else Relation.NONE
                if Answer.ADMITTED not in expected(method.path, caller, relation):
                    found.append((method, caller, thing))
    return found


def is_surprise(method: Method, thing: Thing | None, said: Said) -> bool:
    """A success where there is none to be had, or a server that broke.

    A mutated name may be that of something which is there for everybody; then the answer is right as long as it is not of the thing.
    """
    if answer_of(said.code) is Answer.BROKEN:
        return (
            said.code is not grpc.StatusCode.UNIMPLEMENTED and said.details != CLIENTS_OWN
        )  # a path that is none; our own end
    if said.code is not grpc.StatusCode.OK or said.response is None:
        return False
    return thing is None or (thing.absent is False and thing.name.encode() in said.response.SerializeToString())
