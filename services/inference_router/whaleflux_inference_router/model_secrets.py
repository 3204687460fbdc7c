"""Whether a model's owner may use the secrets that its engine names: told when it is declared, not when its replicas do not start."""

from __future__ import annotations

from whaleflux import names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1 import secrets_pb2
from whaleflux.v1.secrets_pb2_grpc import SecretServiceStub
from whaleflux_inference_router import rights

CALL_S = 5.0


async def check(model: pb.Model, secrets: SecretServiceStub | None) -> None:
    """Asks inventory, as the scheduler will for each replica. Raises InvalidArgument naming each that cannot be used.

    Groups of an identity provider do not count: nobody is logged in when a replica is started.
    """
    if secrets is None or not model.engine.secrets:
        return
    request = secrets_pb2.OpenSecretsRequest(
        subject=model.owner, queue=names.queue(rights.queue_of(model)), validate_only=True
    )
    for use in model.engine.secrets:
        request.choices.add(name=use.secret, version=use.version, as_text=bool(use.variable and not use.file))
    problems = (await secrets.OpenSecrets(request, timeout=CALL_S)).problems
    if problems:
        raise InvalidArgument([FieldViolation(f"engine.secrets[{one.index}]", one.message) for one in problems])
