"""Machines of services that are asked by REST with a key: a table says how each is (`rest_services.py`).

None of them makes one machine of a request that is sent twice. So the machine's name says which request it is of, and it is looked for
before each call: the keeper repeats a call only when what the first one made would be listed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers.api import (
    MAX_MACHINES,
    AuthFailed,
    LaunchRequest,
    Unsupported,
)
from whaleflux_inventory.providers.rest_services import SERVICES, Call, Service, machine_of, name_of, refusal

MAX_ANSWER_BYTES = 8 << 20
ANSWER_WITHIN_S = 12.0  # of one call: a launch is two of them, within api.CALL_WITHIN_S
CONNECTIONS = 8
MOST_PAUSE_S = 600.0
_OWN = ("service", "url", "whaleflux")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class RestKind:
    """One client for all services; keys go with each call."""

    def __init__(self) -> None:
        self._client: Any = None

    def problems(self, offer: Offer) -> dict[str, str]:
        if importlib.util.find_spec("httpx") is None:
            return {"provider": "rest needs a library that inventory has not: pip install 'whaleflux[clouds]' there"}
        service = SERVICES.get(offer.options.get("service", ""))
        if service is None:
            return {"options.service": f"must be one of {', '.join(SERVICES)}"}
        return _problems(offer, service)

    def open(self, offer: Offer, keys: Mapping[str, str]) -> Rest:
        """Raises AuthFailed without a key."""
        service = SERVICES[offer.options["service"]]
        if not keys.get(service.key):
            raise AuthFailed(
                f"{offer.secret or 'no secret is named, which'} has no {service.key}; write NAME=VALUE lines"
            )
        return Rest(self, service, offer.options.get("url", service.url), keys[service.key])

    async def called(self, method: str, url: str, key: str, body: Mapping[str, Any] | None) -> tuple[int, Any, float]:
        """Status, JSON, and for how long it asks to be left alone. Whatever it raises leaves the outcome unknown."""
        if self._client is None:
            self._client = _client()
        headers = {"Authorization": f"Bearer {key}", "Accept": "application/json", "Accept-Encoding": "identity"}
        async with asyncio.timeout(ANSWER_WITHIN_S):
            async with self._client.stream(method, url, json=body, headers=headers) as response:
                said = await _read(response)
        try:
            answer = json.loads(said)
        except ValueError:
            answer = None
        return response.status_code, answer, _seconds(response.headers.get("retry-after", ""))


class Rest:
    """One account of a service."""

    def __init__(self, kind: RestKind, service: Service, url: str, key: str) -> None:
        self._kind, self._service, self._url, self._key = kind, service, url.rstrip("/"), key
        self.lag_s = service.lag_s
        self._turn, self._free_s = asyncio.Lock(), 0.0

    async def launch(self, request: LaunchRequest) -> str:
        """The machine that has the request's name, or a new one."""
        name = name_of(request.fleet, request.lease, request.token)
        if len(name) > self._service.name_chars:
            raise Unsupported(f"the machine's name {name!r} is longer than {self._service.name_chars} characters")
        there = [one.id for one in await self.machines(request.fleet) if one.token == request.token and not one.ended]
        if there:
            return min(there)
        made = self._service.launched(await self._called(self._service.launch(request, name)))
        if len(made) != 1:
            raise OSError(f"the launch answered with {len(made)} machines")
        return made[0]

    async def machines(self, fleet: str) -> Sequence[Machine]:
        try:
            listed = list(self._service.listed(await self._called(self._service.list)))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise OSError("the list of machines is of another shape") from None
        if len(listed) > MAX_MACHINES:
            raise OSError(f"the list has more than {MAX_MACHINES} machines")
        now_s = time.time()
        found = [machine_of(fleet, machine, name, ended=ended, now_s=now_s) for machine, name, ended in listed]
        return [machine for machine in found if machine is not None]

    async def terminate(self, machine_id: str) -> None:
        await self._called(self._service.terminate(machine_id))

    async def _called(self, call: Call) -> Any:
        """The answer's JSON. Raises ProviderError, or whatever leaves the outcome unknown."""
        await self._in_turn()
        status, answer, pause_s = await self._kind.called(call.method, f"{self._url}/{call.path}", self._key, call.body)
        if not 200 <= status < 300:
            raise refusal(self._service, status, answer, pause_s) or OSError(
                f"{call.path} answered with status {status}"
            )
        if answer is None:
            raise OSError(f"{call.path} answered with no JSON")
        return answer

    async def _in_turn(self) -> None:
        """Calls of one account are so far apart as the service wants them."""
        async with self._turn:
            now_s = asyncio.get_running_loop().time()
            await asyncio.sleep(max(0.0, self._free_s - now_s))
            self._free_s = max(now_s, self._free_s) + self._service.pause_s


def _problems(offer: Offer, service: Service) -> dict[str, str]:
    found = dict[str, str]()
    if not offer.region:
        found["region"] = "is empty; say the region as the service calls it"
    if offer.market != "on_demand":
        found["market"] = "must be on_demand: the service rents in no other way by REST"
    if not offer.secret:
        found["secret"] = f"is missing; name a secret with {service.key}=..."
    for key, value in offer.options.items():
        if key == "url" and not _is_url(value):
            found["options.url"] = "must be an https:// address (http:// is for this machine alone)"
        elif key not in (*_OWN, *service.options):
            found[f"options.{key}"] = f"is no option of it; use {', '.join((*_OWN, *service.options))}"
        elif key in service.options and not service.options[key][0].fullmatch(value):
            found[f"options.{key}"] = service.options[key][1]
    missing = {f"options.{key}": service.options[key][1] for key in service.needed if key not in offer.options}
    return found | missing


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        host = parts.hostname or ""
    except ValueError:
        return False
    secure = parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)
    return bool(host) and secure and parts.username is None and not parts.query and not parts.fragment


def _client() -> Any:
    import httpx

    return httpx.AsyncClient(
        timeout=httpx.Timeout(ANSWER_WITHIN_S, connect=5.0),
        limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=2),
        follow_redirects=False,  # a key goes nowhere else
    )


async def _read(response: Any) -> bytes:
    """No further than an answer may be long. Raises OSError for a longer one."""
    said = bytearray()
    async for chunk in response.aiter_raw():
        said += chunk
        if len(said) > MAX_ANSWER_BYTES:
            raise OSError(f"its answer has more than {MAX_ANSWER_BYTES} bytes")
    return bytes(said)


def _seconds(said: str) -> float:
    return min(float(said), MOST_PAUSE_S) if said.isdecimal() else 0.0
