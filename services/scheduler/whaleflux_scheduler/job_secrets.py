"""Secrets of jobs: whether a job may have what it names, and the values for the agents of its tasks. Nothing of a value is kept."""

from __future__ import annotations

from collections.abc import Sequence

from whaleflux import names
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, PermissionDenied
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth
from whaleflux.trust import ownership
from whaleflux.v1 import agent_pb2, inventory_pb2, secrets_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux.v1.secrets_pb2_grpc import SecretServiceStub
from whaleflux_scheduler.code_transfer import check_placed
from whaleflux_scheduler.core.model import Job
from whaleflux_scheduler.jobs import Jobs

CHECK_S = 5.0  # deadline for asking inventory
OPEN_S = 20.0  # a key management service may be far away


class JobSecrets:
    """Asks inventory, which alone opens them. `secrets` None: there is no inventory to ask."""

    def __init__(self, jobs: Jobs, secrets: SecretServiceStub | None, inventory: InventoryServiceStub | None) -> None:
        self._jobs, self._maybe_secrets, self._inventory = jobs, secrets, inventory

    @property
    def _secrets(self) -> SecretServiceStub:
        if self._maybe_secrets is None:
            raise FailedPrecondition(
                "this scheduler knows no inventory, which keeps secrets (its setting inventory)",
                reason=ErrorReason.SECRETS_KEY_MISSING,
            )
        return self._maybe_secrets

    async def admit(self, spec: pb.JobSpec, queue: str, owner: str, caller: auth.Principal) -> None:
        """Notes in a spec which groups its owner has by this login. Raises InvalidArgument naming each secret that it may not use there."""
        del spec.secrets_groups[:]
        if not spec.secrets:
            return
        if ownership.is_owner(caller, owner):  # else it is for the owner of a model, who makes no call now
            spec.secrets_groups.extend(names.group(group) for group in sorted(caller.groups))
        request = _request(spec, owner, queue)
        request.validate_only = True
        answer = await self._secrets.OpenSecrets(request, timeout=CHECK_S)
        if answer.problems:
            raise InvalidArgument(
                [FieldViolation(f"job.spec.secrets[{one.index}]", one.message) for one in answer.problems]
            )

    async def open(self, request: agent_pb2.OpenTaskSecretsRequest) -> agent_pb2.OpenTaskSecretsResponse:
        """For an agent with a task of the job in that epoch. Raises PermissionDenied for others, and where a secret may not be used now."""
        stored = await self._jobs.placed(request.job)
        job, message = stored.value, stored.message
        check_placed(job, request.epoch)
        if request.dataset:
            asked = await self._of_dataset(job, request.dataset)
        else:
            asked = _request(message.spec, message.submitter, _queue(job))
        if not asked.choices:
            return agent_pb2.OpenTaskSecretsResponse()
        answer = await self._secrets.OpenSecrets(asked, timeout=OPEN_S)
        if answer.problems:
            raise PermissionDenied(
                "; ".join(dict.fromkeys(one.message for one in answer.problems)),
                reason=ErrorReason.NOT_OWNER,
                metadata={"job": job.name},
            )
        return agent_pb2.OpenTaskSecretsResponse(secrets=answer.opened)

    async def _of_dataset(self, job: Job, dataset: str) -> secrets_pb2.OpenSecretsRequest:
        """On behalf of who declared it."""
        if self._inventory is None or dataset not in map(names.dataset, job.spec.datasets):
            raise NotFound("dataset", dataset, f"{job.name} does not name it")
        found = await self._inventory.GetDataset(inventory_pb2.GetDatasetRequest(name=dataset), timeout=CHECK_S)
        request = secrets_pb2.OpenSecretsRequest(subject=found.credentials.owner, queue=_queue(job))
        if found.credentials.secret:
            request.choices.add(name=found.credentials.secret, as_text=True)
        return request


def _request(spec: pb.JobSpec, submitter: str, queue: str) -> secrets_pb2.OpenSecretsRequest:
    return secrets_pb2.OpenSecretsRequest(
        subject=submitter, queue=queue, groups=spec.secrets_groups, choices=_choices(spec.secrets)
    )


def _choices(uses: Sequence[pb.SecretUse]) -> list[secrets_pb2.SecretChoice]:
    return [
        secrets_pb2.SecretChoice(name=use.secret, version=use.version, as_text=bool(use.variable and not use.file))
        for use in uses
    ]


def _queue(job: Job) -> str:
    return names.queue(names.top(job.name))
