"""What the router publishes: models coming, changing and going, and each replica's change of state."""

from __future__ import annotations

from datetime import UTC, datetime

from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import asked_for, state_event
from whaleflux.reasons import What
from whaleflux.v1 import router_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_inference_router.convert import state_of
from whaleflux_inference_router.rights import queue_of

SOURCE = "inference_router"


def of_model(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, CHANGED with the fields that were, or DELETED."""
    new = pb.Model.FromString(change.new.value) if change.new else None
    old = pb.Model.FromString(change.old.value) if change.old else None
    name, asked = (new or old or pb.Model()).name, asked_for(old, new)
    if new is not None and new.last_change.what == What.DELETED:
        return None  # about to go
    if old is not None and new is not None and (told := _rolled(change, old, new, now)) is not None:
        return told
    if old is not None and new is not None and asked is None and _only_measured(old, new):
        return None
    what = What.DELETED if new is None else What.CREATED if old is None else What.CHANGED
    message = asked.reason if asked is not None else ""
    whose = {"queue": queue_of(new or old or pb.Model()), "owner": (new or old or pb.Model()).owner}
    return state_event(
        change, now, source=SOURCE, resource=name, what=what, message=message, asked=asked, attributes=whose
    )


def _rolled(change: EntryChange, old: pb.Model, new: pb.Model, now: datetime) -> OutgoingEvent | None:
    """The next step of a rollout, by whoever took it; None: it is where it was."""
    if (old.rollout.state, old.rollout.to_version) == (new.rollout.state, new.rollout.to_version):
        return None
    back = new.rollout.state == pb.ROLLOUT_STATE_ROLLED_BACK
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=new.name,
        what=What.ROLLED_BACK if back else What.ROLLOUT,
        message=new.rollout.message,
        asked=asked_for(old, new),
        cause=None if asked_for(old, new) else types_pb2.Cause(resource=new.name, actor=f"{SOURCE}/rollouts"),
        attributes={
            "queue": queue_of(new),
            "owner": new.owner,
            "state": pb.RolloutState.Name(new.rollout.state).removeprefix("ROLLOUT_STATE_"),
            "version": str(new.rollout.to_version),
        },
    )


def _only_measured(old: pb.Model, new: pb.Model) -> bool:
    """Whether nothing but what starts took is new."""
    for model in (old, new):
        model.ClearField("measures")
    return old == new


def of_api_key(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED or DELETED; nothing of the secret or its digest."""
    new = pb.ApiKey.FromString(change.new.value) if change.new else None
    old = pb.ApiKey.FromString(change.old.value) if change.old else None
    if new is not None and old is not None:
        return None
    key, asked = new or old or pb.ApiKey(), asked_for(old, new)
    what = What.DELETED if new is None else What.CREATED
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=key.name,
        what=what,
        message=key.display_name,
        asked=asked,
        attributes={"owner": key.owner, "models": ",".join(key.models)[:1000]},
    )


def of_replica(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """The new state; nothing for writes that leave it as it was."""
    entry = change.new or change.old
    replica = pb.Replica.FromString(entry.value) if entry else pb.Replica()
    previous = state_of(pb.Replica.FromString(change.old.value)).value if change.old else ""
    what = state_of(replica).value if change.new else "GONE"
    if what == previous:
        return None
    attributes = {
        "address": replica.address,
        "node": replica.node,
        "gpu_model": replica.gpu_model,
        "queue": queue_of(replica),
        "owner": replica.owner,
    }
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=replica.name,
        what=what,
        previous=previous,
        message=replica.message,
        attributes=attributes,
        cause=types_pb2.Cause(resource=replica.job, actor=f"{SOURCE}/replicas"),
        at=replica.transition_time.ToDatetime(tzinfo=UTC) if change.new else None,
    )
