"""Gets what a task may know of secrets from the scheduler, once for each attempt, and puts it where the task finds it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path

from whaleflux import telemetry
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.reasons import ErrorReason
from whaleflux.retry import Backoff, worth_repeating
from whaleflux.telemetry import Event
from whaleflux.v1 import agent_pb2, agent_pb2_grpc, inventory_pb2, secrets_pb2
from whaleflux_agent.core.work import Work
from whaleflux_agent.runtime.api import LaunchFailed
from whaleflux_agent.secret_files import SecretFiles

RETRY = Backoff(first_s=0.5, longest_s=10.0)
_CALL_S = 30.0
_log = telemetry.get_logger("whaleflux.agent")

Tell = Callable[[str], Awaitable[None]]
"""Says what is waited for."""


class SecretAccess:
    """The task runner's and the dataset cache's only way to a value. Values go into `files` and headers, and nowhere else."""

    def __init__(self, files: SecretFiles, stub: agent_pb2_grpc.TaskServiceStub, clock: Clock) -> None:
        self._files, self._stub, self._clock = files, stub, clock

    async def bring(self, work: Work, tell: Tell) -> None:
        """Makes the folder of a task hold the values that its job names now. Raises LaunchFailed when they cannot be had.

        A folder that is there is left as it is: what runs of the task (its setup) was given that.
        """
        uses = work.spec.secrets
        if not uses or await asyncio.to_thread(self._files.exists, work.task):
            return
        opened = await self._opened(work, "", tell)
        if [one.name for one in opened] != [use.secret for use in uses]:
            raise LaunchFailed(
                f"secrets of {work.job}: the scheduler gave others than were asked for; update it or this agent"
            )
        values = [one.value for one in opened]
        await asyncio.to_thread(self._files.write, work.task, uses, values, for_anybody=bool(work.spec.image))
        versions = ", ".join(f"{one.name} version {one.version}" for one in opened)
        _log.info(Event.SECRETS_GIVEN, task=work.task, job=work.job, secrets=versions)

    async def header(self, work: Work, dataset: inventory_pb2.Dataset, tell: Tell) -> str:
        """What is shown to the server that has a dataset: the value of the header Authorization. Raises LaunchFailed."""
        opened = await self._opened(work, dataset.name, tell)
        if len(opened) != 1:
            raise LaunchFailed(f"{dataset.name}: the scheduler gave no credentials for it; declare it anew")
        return authorization(dataset.credentials.scheme, opened[0].value)

    def folder(self, task: str) -> Path:
        return self._files.folder(task)

    def masked(self, task: str, text: str) -> str:
        """See `SecretFiles.masked`."""
        return self._files.masked(task, text)

    async def forget(self, work: Work) -> None:
        """Nothing of the task is left."""
        if work.spec.secrets:
            await asyncio.to_thread(self._files.remove, work.task)

    async def sweep(self, needed: frozenset[str]) -> None:
        """See `SecretFiles.sweep`."""
        await asyncio.to_thread(self._files.sweep, needed)

    async def _opened(self, work: Work, dataset: str, tell: Tell) -> list[secrets_pb2.OpenedSecret]:
        """Outages are waited out; what is refused fails the launch, with why."""
        request = agent_pb2.OpenTaskSecretsRequest(job=work.job, epoch=work.epoch, dataset=dataset)
        failures, said = 0, ""
        while True:
            try:
                return list((await self._stub.OpenTaskSecrets(request, timeout=_CALL_S)).secrets)
            except StatusError as error:
                if not worth_repeating(error):
                    wrong = (
                        error.reason == ErrorReason.NOT_OWNER
                    )  # the secret, not this node: the next one gets no other answer
                    raise LaunchFailed(f"secrets of {dataset or work.job}: {error.message}", unfit=wrong) from None
                if error.message != said:
                    said = error.message
                    await tell(f"secrets, which cannot be had now ({said}) and are asked for again,")
            failures += 1
            await self._clock.sleep(RETRY.pause_s(failures))


def authorization(scheme: int, value: bytes) -> str:
    """The header Authorization (RFC 9110, 11.6.2) for a token, or for user:password (RFC 7617). Raises LaunchFailed for what fits in none."""
    value = value.strip()
    if scheme == inventory_pb2.CREDENTIAL_SCHEME_BASIC:
        return "Basic " + base64.b64encode(value).decode()
    if not value.isascii() or any(byte <= 32 or byte == 127 for byte in value):
        raise LaunchFailed(
            "the secret of this dataset is no token of one line; for user:password declare it with --basic"
        )
    return "Bearer " + value.decode()
