"""Whose models, replicas and keys may be seen, used and changed, by whom: the owner rules (`whaleflux.trust`), asked about a model's queue.

A model is for whom the queue is for in which its replicas run, so that its jobs, their events and their costs are for the same people.
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

from whaleflux import names
from whaleflux.errors import NotFound, PermissionDenied
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth, roles
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.trust import ownership
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.trust.sight import Sight
from whaleflux.trust.view import UNKNOWN
from whaleflux.v1 import router_pb2 as pb

SERVING = "serving"  # the queue of models that name none; the router makes it when it first needs it
ANYBODY = Principal(Identity(roles.APP, "-"))  # who asks where no key is asked for

_MODEL = frozenset(
    {
        "name", "engine", "replicas", "context_window_tokens", "objective", "classes", "create_time", "ready_replicas", "owner", "queue",
        "version", "etag",
    }
)  # fmt: skip
_ENGINE = frozenset({"kind", "gpus", "gpu_models"})
_REPLICA = frozenset(
    {
        "name",
        "state",
        "gpu_model",
        "gpus",
        "usd_per_hour",
        "in_flight",
        "transition_time",
        "gpu_memory_bytes",
        "queue",
        "owner",
        "version",
    }
)
PUBLIC = {"Model": _MODEL, "Engine": _ENGINE, "Replica": _REPLICA}  # by message: what others than its team read


def _as_named(subject: str) -> Principal | None:
    role, _, name = subject.partition("/")
    return Principal(Identity(role, name))


class ModelRights:
    """`access`: whom a queue is for. `known`: who a record names, with the groups of today; None: not admitted any more."""

    def __init__(
        self, access: Callable[[str], Access] = lambda _: OPEN, known: Callable[[str], Principal | None] = _as_named
    ) -> None:
        self._access, self.known = access, known

    def of_queue(self, queue: str) -> Access:
        """Whom it is for; the serving queue is open before there is one."""
        access = self._access(queue)
        return OPEN if access is UNKNOWN and queue == SERVING else access

    def sight(self) -> Sight:
        """The caller's, also for what leaves out what it does not see."""
        ownership.note_asked()
        return Sight(auth.principal(), self.of_queue)

    def sight_of(self, principal: Principal) -> Sight:
        """Somebody's who is not the caller: of a key's owner."""
        return Sight(principal, self.of_queue)

    def check_use(self, queue: str) -> None:
        """Raises NotFound for a queue in which the caller may not run replicas."""
        if not ownership.may_use(auth.principal(), queue, self.of_queue(queue)):
            raise NotFound("queue", names.queue(queue), "use one of: whaleflux queue ls")

    def check_more(self, model: str, queue: str) -> None:
        """Raises PermissionDenied for more replicas by who may change the model, as its owner, and not use its queue any more."""
        if not ownership.may_use(auth.principal(), queue, self.of_queue(queue)):
            raise PermissionDenied(
                f"{model} runs in {names.queue(queue)}, which is not for you now: it may have fewer replicas, not more; ask an operator, or to "
                "be put into a group that the queue names",
                reason=ErrorReason.NOT_OWNER,
                metadata={"name": model},
            )


def queue_of(model: pb.Model | pb.Replica) -> str:
    """Id of the queue in which it runs."""
    return names.last(model.queue) or SERVING


def sees(sight: Sight, model: pb.Model) -> bool:
    """Whether the model is there for them, to be used."""
    return sight.sees(queue_of(model), model.owner)


def shown_model(model: pb.Model, sight: Sight) -> pb.Model:
    """The model as it may be read: what serves it is its owner's and team's to know. Changes `model` itself."""
    if not sight.reads(queue_of(model), model.owner):
        _keep(model, _MODEL)
        _keep(model.engine, _ENGINE)
    return model


def shown_replica(replica: pb.Replica, sight: Sight, owner: str) -> pb.Replica:
    """The same: who has the address of an engine needs no key. Changes `replica` itself."""
    if not sight.reads(queue_of(replica), owner):
        _keep(replica, _REPLICA)
    return replica


def _keep(message: Message, fields: frozenset[str]) -> None:
    for field, _ in message.ListFields():
        if field.name not in fields:
            message.ClearField(field.name)
