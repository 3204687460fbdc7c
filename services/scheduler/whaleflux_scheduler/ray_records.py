"""Ray clusters between the contract (`whaleflux.v1`) and the core, and what is told of them."""

from __future__ import annotations

from datetime import datetime

from whaleflux import names
from whaleflux.events.publisher import EntryChange, OutgoingEvent
from whaleflux.events.state_events import asked_for, state_event
from whaleflux.manifests.ray_file import IDLE_S
from whaleflux.reasons import What
from whaleflux.store.codec import Codec, Stored
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_scheduler.core import ray_clusters
from whaleflux_scheduler.core.ray_clusters import RayCluster, RayClusterState

StoredRayCluster = Stored[RayCluster, pb.RayCluster]
SOURCE = "scheduler"
_STATES = frozenset(int(state) for state in RayClusterState)


def cluster_of(message: pb.RayCluster) -> RayCluster:
    """The cluster. Raises ValueError for a state of a newer version: such a record stays as it was last known."""
    if message.state and message.state not in _STATES:
        raise ValueError(f"{message.name} is in a state that this version does not know: {message.state}")
    return RayCluster(
        name=message.name,
        queue=names.last(message.queue or names.DEFAULT_QUEUE),
        priority=message.priority,
        max_gpus=message.max_gpus,
        sites=tuple(dict.fromkeys(message.sites)),
        gpu_types=tuple(dict.fromkeys(message.gpu_types)),
        idle_s=message.idle.ToNanoseconds() / 1e9 if message.HasField("idle") else IDLE_S,
        python=message.python or ray_clusters.PYTHON,
        head_cpu_millicores=message.head_cpu_millicores or ray_clusters.HEAD_MILLICORES,
        head_memory_bytes=message.head_memory_bytes,
        address=message.address,
        state=RayClusterState(message.state) if message.state else RayClusterState.UP,
        creator=message.creator,
        uid=message.uid,
        jobs_made=message.jobs_made,
    )


def _merge(one: RayCluster, message: pb.RayCluster) -> None:
    message.name, message.queue = one.name, names.queue(one.queue)
    message.priority, message.max_gpus = one.priority, one.max_gpus
    message.sites[:], message.gpu_types[:] = one.sites, one.gpu_types
    message.idle.FromNanoseconds(round(one.idle_s * 1e9))
    message.python, message.address = one.python, one.address
    message.head_cpu_millicores, message.head_memory_bytes = one.head_cpu_millicores, one.head_memory_bytes
    message.state = one.state.value  # type: ignore[assignment]  # a test compares the enums
    message.creator, message.uid, message.jobs_made = one.creator, one.uid, one.jobs_made


RAY_CLUSTERS: Codec[RayCluster, pb.RayCluster] = Codec(pb.RayCluster, cluster_of, _merge)


def of_change(change: EntryChange, now: datetime) -> OutgoingEvent | None:
    """CREATED, CHANGED and ENDING when somebody asked for it, DELETED when nothing is left of it."""
    new = pb.RayCluster.FromString(change.new.value) if change.new else None
    old = pb.RayCluster.FromString(change.old.value) if change.old else None
    told, one = _told(old, new), new or old
    if told is None or one is None:
        return None
    what, message = told
    asked = asked_for(old, new)
    return state_event(
        change,
        now,
        source=SOURCE,
        resource=one.name,
        what=what,
        previous=_state(old) if old is not None and new is not None and old.state != new.state else "",
        message=message,
        cause=None if asked is not None else types_pb2.Cause(actor=f"{SOURCE}/ray"),
        attributes={"queue": one.queue, "owner": one.creator, "max_gpus": str(one.max_gpus)},
        asked=asked,
    )


def _told(old: pb.RayCluster | None, new: pb.RayCluster | None) -> tuple[str, str] | None:
    if new is None:
        return What.DELETED, "nothing of it is left"
    if old is None:
        return What.CREATED, in_words(new)
    if old.state != new.state:
        return _state(new), "its workers drain, then its head ends"
    asked = asked_for(old, new)
    return (What.CHANGED, asked.reason) if asked is not None and asked.what == What.CHANGED else None


def in_words(one: pb.RayCluster) -> str:
    """Its bounds."""
    where = f" of {', '.join(one.gpu_types)}" if one.gpu_types else ""
    there = f" in {', '.join(one.sites)}" if one.sites else ""
    head = f", its head at {one.address}" if one.address else ""
    return f"at most {one.max_gpus} GPUs{where}{there} in {one.queue}, priority {one.priority}{head}"


def _state(message: pb.RayCluster) -> str:
    return pb.RayClusterState.Name(message.state).removeprefix("RAY_CLUSTER_STATE_")
