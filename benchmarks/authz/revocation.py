"""How long whoever was disabled is still let in, service by service: calls that are repeated, and streams that are open."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc

from benchmarks.authz.contract import Method, methods
from whaleflux import names
from whaleflux.rpc import roles
from whaleflux.rpc.pki import new_key_and_request
from whaleflux.v1 import checkpoint_pb2, health_pb2, identity_pb2, inventory_pb2, router_pb2, scheduler_pb2, trust_pb2

if TYPE_CHECKING:
    from benchmarks.authz.fleet import World

GIVEN_UP_S = 10.0
_AGAIN_S = 0.01
_ADMITTED_S = 5.0  # a login may be younger than what a service has heard of it
# One read of each service, which a user may call; and a stream where there is one.
READS: dict[str, tuple[str, Any]] = {
    "inventory": ("InventoryService/ListNodes", inventory_pb2.ListNodesRequest()),
    "scheduler": ("SchedulerService/ListJobs", scheduler_pb2.ListJobsRequest(parent="queues/-")),
    "health_monitor": ("HealthService/ListNodeHealth", health_pb2.ListNodeHealthRequest()),
    "checkpoint": ("CheckpointService/ListCheckpoints", checkpoint_pb2.ListCheckpointsRequest()),
    "inference_router": ("RouterService/ListModels", router_pb2.ListModelsRequest()),
}
STREAMS: dict[str, tuple[str, Any]] = {
    "inventory": ("InventoryService/WatchNodes", inventory_pb2.WatchNodesRequest()),
    "scheduler": ("SchedulerService/WatchJobs", scheduler_pb2.WatchJobsRequest()),
    "health_monitor": ("HealthService/WatchNodeHealth", health_pb2.WatchNodeHealthRequest()),
}


async def measure(world: World, rounds: int) -> dict[str, list[float]]:
    """Seconds from the answer to DisableUser until "<service>" refuses, and until "<service> stream" has ended, for each round."""
    took: dict[str, list[float]] = {}
    for number in range(rounds):
        user = names.user(f"leaver-{number}")
        channel = await _logged_in(world, user)
        known = {method.path.rpartition(".")[2]: method for method in methods()}
        reading = {role: _call(channel, known[path], request) for role, (path, request) in READS.items()}
        for ask in reading.values():
            await _until(ask, grpc.StatusCode.OK, _ADMITTED_S)
        streams = {role: await _opened(channel, known[path], request) for role, (path, request) in STREAMS.items()}
        await world.admin.identity.DisableUser(identity_pb2.DisableUserRequest(name=user))
        began = time.perf_counter()
        waits = {
            **{role: _until(ask, grpc.StatusCode.UNAUTHENTICATED, GIVEN_UP_S) for role, ask in reading.items()},
            **{f"{role} stream": _ended(stream) for role, stream in streams.items()},
        }
        ends = await asyncio.gather(*waits.values())
        for what, ended in zip(waits, ends, strict=True):
            took.setdefault(what, []).append(ended - began)
        await channel.close()
    return took


async def _logged_in(world: World, user: str) -> grpc.aio.Channel:
    """A person's connection by a login, as `whaleflux login` makes one."""
    identity = world.admin.identity
    person = trust_pb2.Principal(role=roles.USER, kind=trust_pb2.PRINCIPAL_KIND_USER)
    await identity.CreateUser(identity_pb2.CreateUserRequest(user_id=names.last(user), user=person))
    link = await identity.CreateLoginLink(identity_pb2.CreateLoginLinkRequest(user=user))
    key, request = new_key_and_request()
    login = identity_pb2.LoginRequest(code=link.code, certificate_request_pem=request.decode())
    answer = await world.stubs("no certificate").identity.Login(login)
    return world.dial(grpc.ssl_channel_credentials(answer.authority_pem.encode(), key, answer.certificate_pem.encode()))


def _call(channel: grpc.aio.Channel, method: Method, request: Any) -> Any:
    return lambda: channel.unary_unary(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )(request, timeout=GIVEN_UP_S)


async def _until(ask: Any, code: grpc.StatusCode, within_s: float) -> float:
    """When the call first ended with `code`; infinite when it never did."""
    deadline = time.perf_counter() + within_s
    while time.perf_counter() < deadline:
        try:
            await ask()
            said = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            said = error.code()
        if said is code:
            return time.perf_counter()
        await asyncio.sleep(_AGAIN_S)
    return float("inf")


async def _opened(channel: grpc.aio.Channel, method: Method, request: Any) -> Any:
    """A stream that has given its first message."""
    stream = channel.unary_stream(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )(request)
    await stream.read()
    return stream


async def _ended(stream: Any) -> float:
    """When the stream was ended for want of admission; infinite when it was not."""
    try:
        async with asyncio.timeout(GIVEN_UP_S):
            while await stream.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError as error:
        return time.perf_counter() if error.code() is grpc.StatusCode.UNAUTHENTICATED else float("inf")
    except TimeoutError:
        return float("inf")
    return time.perf_counter() if await stream.code() is grpc.StatusCode.UNAUTHENTICATED else float("inf")
