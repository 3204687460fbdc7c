"""Machines of Amazon EC2.

`token` goes as ClientToken, for which EC2 makes one machine however often it is asked; tags say whose a machine is. Calls block, so they
are made in few threads of their own; the library repeats none of them: when to ask again is the keeper's to say. Keys come from the
offer's secret alone; an offer without one rents by the role of the machine or pod that inventory runs on.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from whaleflux_inventory.core.lease_rules import Machine
from whaleflux_inventory.core.offers import Offer
from whaleflux_inventory.providers import aws_shapes
from whaleflux_inventory.providers.api import MAX_MACHINES, AuthFailed, LaunchRequest, Unsupported

log = logging.getLogger(__name__)
THREADS = 8
CONNECT_WITHIN_S, READ_WITHIN_S = 5, 20
NOTICES_WITHIN_S = 8.0  # beside the list, within its deadline
PAGE = 1_000
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_TOKEN = "AWS_SESSION_TOKEN"
_ROLES = frozenset(
    {"assume-role-with-web-identity", "container-role", "iam-role"}
)  # what a machine or pod is by itself


class AwsKind:
    """One library session and its threads, for all accounts and regions."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="ec2")
        self._session: Any = None
        self._making = threading.Lock()  # the library makes clients one at a time

    def problems(self, offer: Offer) -> dict[str, str]:
        if importlib.util.find_spec("botocore") is None:
            return {"provider": "aws needs a library that inventory has not: pip install 'whaleflux[clouds]' there"}
        return aws_shapes.problems(offer)

    def open(self, offer: Offer, keys: Mapping[str, str]) -> Aws:
        """Raises AuthFailed for a secret that lacks a part."""
        missing = [key for key in _KEYS if offer.secret and not keys.get(key)]
        if missing:
            raise AuthFailed(f"{offer.secret} has no {' and no '.join(missing)}; write NAME=VALUE lines")
        return Aws(self, offer.region, keys)

    async def called(self, account: Aws, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """One call, in a thread. Raises ProviderError, or whatever leaves its outcome unknown."""
        asked = asyncio.get_running_loop().run_in_executor(self._threads, self._call, account, operation, arguments)
        return await asked  # given up before it has begun, it never begins

    def _call(self, account: Aws, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        from botocore import exceptions

        try:
            if account.client is None:
                account.client = self._client(account.region, account.keys)
            answer: dict[str, Any] = getattr(account.client, operation)(**arguments)
        except exceptions.ClientError as error:
            said = error.response.get("Error", {})
            refused = aws_shapes.refusal(str(said.get("Code", "")), str(said.get("Message", "")))
            raise refused or OSError(f"{operation}: {error}"[:300]) from None
        except (exceptions.NoCredentialsError, exceptions.CredentialRetrievalError):
            raise AuthFailed("the offer names no secret, and inventory's machine or pod has no role of AWS") from None
        except exceptions.ParamValidationError as wrong:  # before anything was sent
            raise Unsupported(str(wrong)[:300]) from None
        return answer

    def _client(self, region: str, keys: Mapping[str, str]) -> Any:
        from botocore.config import Config
        from botocore.session import Session

        with self._making:
            if self._session is None:
                self._session = Session()
                resolver = self._session.get_component("credential_provider")
                resolver.providers = [one for one in resolver.providers if one.METHOD in _ROLES]
            bounds = Config(
                connect_timeout=CONNECT_WITHIN_S,
                read_timeout=READ_WITHIN_S,
                retries={"total_max_attempts": 1},
                max_pool_connections=THREADS,
                user_agent_extra="whaleflux",
            )
            return self._session.create_client(
                "ec2",
                region_name=region,
                aws_access_key_id=keys.get(_KEYS[0]),
                aws_secret_access_key=keys.get(_KEYS[1]),
                aws_session_token=keys.get(_TOKEN),
                config=bounds,
            )


class Aws:
    """One account in one region. `client` is made at its first call."""

    lag_s = 60.0

    def __init__(self, kind: AwsKind, region: str, keys: Mapping[str, str]) -> None:
        self._kind, self.region, self.keys = kind, region, keys
        self.client: Any = None
        self._said = False

    async def launch(self, request: LaunchRequest) -> str:
        """The machine of the request's token: asked again, the same."""
        answer = await self._called("run_instances", **aws_shapes.run_arguments(request))
        made = [one["InstanceId"] for one in answer.get("Instances", ())]
        if len(made) != 1:
            raise OSError(f"RunInstances answered with {len(made)} machines")
        return str(made[0])

    async def machines(self, fleet: str) -> Sequence[Machine]:
        """With what AWS has announced of each, where the keys allow to ask."""
        found, spot = dict[str, Machine](), False
        async for page in self._pages("describe_instances", Filters=[aws_shapes.of_fleet(fleet)]):
            for instance in (one for there in page.get("Reservations", ()) for one in there.get("Instances", ())):
                machine = aws_shapes.machine_of(instance)
                found[machine.id] = machine
                spot |= not machine.ended and instance.get("InstanceLifecycle") == "spot"
        if all(machine.ended for machine in found.values()):
            return list(found.values())
        notices = await self._notices(fleet, spot=spot)
        return [_noticed(machine, notices) for machine in found.values()]

    async def terminate(self, machine_id: str) -> None:
        await self._called("terminate_instances", InstanceIds=[machine_id])

    async def _notices(self, fleet: str, *, spot: bool) -> dict[str, tuple[float, str]]:
        """What cannot be read is not known: agents hear of it on their machines, and the list counts without it."""
        found = dict[str, tuple[float, str]]()
        try:
            async with asyncio.timeout(NOTICES_WITHIN_S):
                async for page in self._pages("describe_instance_status", Filters=[aws_shapes.planned_events()]):
                    found |= aws_shapes.planned(page.get("InstanceStatuses", ()))
                if spot:
                    asked = {"Filters": [aws_shapes.of_fleet(fleet)]}
                    async for page in self._pages("describe_spot_instance_requests", **asked):
                        found |= aws_shapes.interrupted(page.get("SpotInstanceRequests", ()))
        except Exception as error:
            level = logging.DEBUG if self._said else logging.WARNING  # once, until it is known again
            self._said = True
            log.log(level, "what AWS has announced in %s is not known now: %r", self.region, error)
        return found

    async def _pages(self, operation: str, **arguments: Any) -> AsyncIterator[dict[str, Any]]:
        """Raises OSError where there is more than one list is read for."""
        token: dict[str, str] = {}
        for _ in range(MAX_MACHINES // PAGE):
            page = await self._called(operation, MaxResults=PAGE, **arguments, **token)
            yield page
            if not page.get("NextToken"):
                return
            token = {"NextToken": page["NextToken"]}
        raise OSError(f"{operation} in {self.region} lists more than {MAX_MACHINES}")

    async def _called(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return await self._kind.called(self, operation, arguments)


def _noticed(machine: Machine, notices: Mapping[str, tuple[float, str]]) -> Machine:
    taken_s, why = notices.get(machine.id, (0.0, ""))
    return machine if machine.ended or not taken_s else replace(machine, taken_s=taken_s, taken_why=why)
