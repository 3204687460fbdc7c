"""Events as one caller may read them: of what is not there for the caller there are none, and others' private words are left out.

Whose something is, and whom it is for, stands in the event's attributes, as its owner's publisher wrote it down: records may be gone by now.
"""

from __future__ import annotations

from collections.abc import Callable

from whaleflux import names
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.trust.sight import Sight
from whaleflux.v1 import events_pb2 as pb

SERVING = "serving"  # the queue of models that name none
_PRIVATE = ("address", "preempts")  # attributes that only its owner and team read


def shown(event: pb.Event, sight: Sight) -> pb.Event | None:
    """The event as it may be read; None: it is not there for the caller. Changes `event` itself."""
    if sight.everything:
        return event
    judge = _JUDGES.get(names.collections(event.resource))
    if judge is None or not judge(event, sight):
        return None
    _clean(event, sight)
    return event


def _of_job(event: pb.Event, sight: Sight) -> bool:
    """What its program said, and what else people wrote, is for who reads the job."""
    queue, whose = names.top(event.resource), event.attributes.get("submitter", "")
    if not sight.sees(queue, whose):
        return False
    if not sight.reads(queue, whose):
        _only_facts(event)
    return True


def _of_checkpoint(event: pb.Event, sight: Sight) -> bool:
    return sight.sees_queue(names.top(event.resource))


def _of_queue(event: pb.Event, sight: Sight) -> bool:
    return sight.sees_queue(names.last(event.resource))


def _of_reservation(event: pb.Event, sight: Sight) -> bool:
    """Maintenance, which is for no queue, concerns everybody."""
    queue = event.attributes.get("queue", "")
    return not queue or sight.sees_queue(names.last(queue))


def _of_ray_cluster(event: pb.Event, sight: Sight) -> bool:
    return sight.sees(names.last(event.attributes.get("queue", "")), event.attributes.get("owner", ""))


def _of_model(event: pb.Event, sight: Sight) -> bool:
    queue, whose = event.attributes.get("queue", SERVING), event.attributes.get("owner", "")
    if not sight.sees(queue, whose):
        return False
    if not sight.reads(queue, whose):
        _only_facts(event)
    return True


def _of_dataset(event: pb.Event, sight: Sight) -> bool:
    members = frozenset(filter(None, event.attributes.get("members", "").split(",")))
    seen = ownership.may_see(sight.principal, Access(members))
    return seen or ownership.is_owner(sight.principal, event.attributes.get("owner", ""))


def _of_api_key(event: pb.Event, sight: Sight) -> bool:
    return ownership.is_owner(sight.principal, event.attributes.get("owner", ""))


def _of_everybody(event: pb.Event, sight: Sight) -> bool:
    return True


def _of_incident(event: pb.Event, sight: Sight) -> bool:
    """Its sentence may go on with the last words of a program: behind the first line."""
    event.message = event.message.partition("\n")[0]
    if "jobs" in event.attributes:
        event.attributes["jobs"] = ",".join(sight.known(filter(None, event.attributes["jobs"].split(","))))
    event.cause.ClearField("traceparent")
    return True


_JUDGES: dict[tuple[str, ...], Callable[[pb.Event, Sight], bool]] = {  # of other kinds only operators read
    ("queues", "jobs"): _of_job,
    ("queues", "jobs", "checkpoints"): _of_checkpoint,
    ("queues",): _of_queue,
    ("reservations",): _of_reservation,
    ("rayClusters",): _of_ray_cluster,
    ("models",): _of_model,
    ("models", "replicas"): _of_model,
    ("datasets",): _of_dataset,
    ("apiKeys",): _of_api_key,
    ("incidents",): _of_incident,
    ("sites",): _of_everybody,
    ("prices",): _of_everybody,
    ("adjustments",): _of_everybody,
    ("sites", "nodes"): _of_everybody,
}


def _only_facts(event: pb.Event) -> None:
    event.message = event.cause.message = ""
    event.cause.ClearField("traceparent")
    for attribute in _PRIVATE:
        event.attributes.pop(attribute, None)


def _clean(event: pb.Event, sight: Sight) -> None:
    event.message = sight.cleaned(event.message, event.resource)
    event.cause.message = sight.cleaned(event.cause.message, event.resource)
    event.cause.resource = sight.cleaned(event.cause.resource, event.resource)
    for key, value in event.attributes.items():
        if (text := sight.cleaned(value, event.resource)) != value:
            event.attributes[key] = text
