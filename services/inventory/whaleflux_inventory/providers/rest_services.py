"""Services that rent machines by REST and a key: where each is, its paths, and how it words things. Pure: one entry of SERVICES each.

They have no token that makes a repeated request the same, and no tags that are sure to come back: a machine's name says whose it is.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from whaleflux import names
from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.providers.api import (
    AuthFailed,
    LaunchRequest,
    MachineNotFound,
    NoCapacity,
    ProviderError,
    Throttled,
    Unsupported,
)
from whaleflux_inventory.providers.user_data import user_data

_FLEET = 10  # letters at the end of the fleet's ULID: 50 of its random bits


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `body`: JSON; None: none."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """A service. Readers are given the answer's JSON and raise KeyError, TypeError or ValueError for what is not of its shape."""

    url: str
    key: str  # the part of the secret with the key, shown as a bearer
    lag_s: float
    pause_s: float  # between two calls
    options: Mapping[str, tuple[re.Pattern[str], str]]
    needed: tuple[str, ...]
    name_chars: int  # that a machine's name may have
    launch: Callable[[LaunchRequest, str], Call]
    launched: Callable[[Any], list[str]]
    list: Call
    listed: Callable[[Any], Iterable[tuple[str, str, bool]]]  # id, name, whether it has ended
    terminate: Callable[[str], Call]
    refused: Callable[[Any], tuple[str, str]]  # code and message of an error
    codes: Mapping[str, type[ProviderError]]


def name_of(fleet: str, lease: str, token: str) -> str:
    """Of a machine: FLEET-LEASE-TOKEN, 64 characters for the ids that we make."""
    packed = base64.b32encode(bytes.fromhex(token)).decode().lower().rstrip("=")
    return f"{fleet[-_FLEET:]}-{names.last(lease)}-{packed}"


def machine_of(fleet: str, machine: str, name: str, *, ended: bool, now_s: float) -> Machine | None:
    """A machine by its name; None for another's. It is paid for since its lease was made at the earliest: the list does not say when."""
    of, _, rest = name.partition("-")
    lease, _, packed = rest.rpartition("-")
    try:
        token = base64.b32decode(packed.upper() + "=" * (-len(packed) % 8)).hex()
    except ValueError:
        return None
    if of != fleet[-_FLEET:] or not lease or len(token) != 32:
        return None
    created_s = names.ulid_time(lease).timestamp() if names.is_ulid(lease) else now_s
    return Machine(machine, f"leases/{lease}", token, created_s, ended=ended)


def refusal(service: Service, status: int, answer: Any, retry_after_s: float) -> ProviderError | None:
    """What an answer that is no success means; None: nobody knows what came of the call."""
    try:
        code, message = service.refused(answer)
    except (KeyError, TypeError, ValueError):
        code, message = "", ""
    words = f"{status} {code}: {message}"[:300]
    kind = service.codes.get(code)
    if kind is None and status in (401, 403):
        kind = AuthFailed
    if status == 429 or kind is Throttled:
        return Throttled(words, retry_after_s)
    return (kind or Unsupported)(words) if kind or status in (400, 404, 405, 409, 422) else None


def _lambda_launch(request: LaunchRequest, name: str) -> Call:
    options = request.offer.options
    body = {
        "region_name": request.offer.region,
        "instance_type_name": request.offer.machine_type,
        "ssh_key_names": [options["key"]],
        "quantity": 1,
        "name": name,
        "user_data": user_data(request),
    }
    image = {"image": {"id": options["image"]}} if "image" in options else {}
    return Call("POST", "instance-operations/launch", body | image)


def _lambda_listed(answer: Any) -> Iterable[tuple[str, str, bool]]:
    ended = ("terminating", "terminated", "preempted")
    return [(str(one["id"]), str(one.get("name") or ""), one["status"] in ended) for one in answer["data"]]


LAMBDA = Service(
    url="https://cloud.lambda.ai/api/v1",
    key="LAMBDA_API_KEY",
    lag_s=60.0,
    pause_s=1.0,  # as documented: about one request a second
    options={
        "key": (re.compile(r"[ -~]{1,64}"), "must be the name of an SSH key that the account has: Lambda makes no machine without"),
        "image": (re.compile(r"[0-9a-f-]{32,36}"), "must be the id of an image"),
    },
    needed=("key",),
    name_chars=64,
    launch=_lambda_launch,
    launched=lambda answer: [str(one) for one in answer["data"]["instance_ids"]],
    list=Call("GET", "instances"),
    listed=_lambda_listed,
    terminate=lambda machine: Call("POST", "instance-operations/terminate", {"instance_ids": [machine]}),
    refused=lambda answer: (str(answer["error"]["code"]), str(answer["error"]["message"])),
    codes={
        "instance-operations/launch/insufficient-capacity": NoCapacity,
        "global/quota-exceeded": NoCapacity,
        "global/invalid-api-key": AuthFailed,
        "global/account-inactive": AuthFailed,
        "global/object-does-not-exist": MachineNotFound,
        "global/invalid-parameters": Unsupported,
    },
)  # fmt: skip
SERVICES: Mapping[str, Service] = {"lambda": LAMBDA}
