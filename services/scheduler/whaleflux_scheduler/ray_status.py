"""What people are told of a Ray cluster: its status, and why nothing is started or ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from whaleflux.store import keys
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import ray_parts, ray_sizing
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.core.ray_parts import Part, Role
from whaleflux_scheduler.core.ray_sizing import Sizing
from whaleflux_scheduler.ray_readings import Read
from whaleflux_scheduler.ray_records import StoredRayCluster
from whaleflux_scheduler.ray_view import Known, RayView, failed


def status_of(view: RayView, name: str, now_s: float) -> pb.RayClusterStatus | None:
    """What is known of it now (`now_s`: the monotonic clock); None: this leader has not looked at it yet."""
    stored = view.clusters.get(keys.of_name(keys.RAY_CLUSTERS, name))
    known = view.find(stored.value.uid) if stored is not None else None
    if stored is None or known is None:
        return None
    parts = [part for part in view.parts(known) if not part.gone]
    reading, age_s = view.readings.of(name), view.readings.age_s(name)
    read = reading.read if reading is not None else None
    came_s_ago = now_s - reading.came_s if reading is not None else 0.0
    return pb.RayClusterStatus(
        address=view.address(stored, known),
        dashboard=reading.dashboard if reading is not None else "",
        session=reading.session if reading is not None else "",
        reading_age_s=age_s,
        stale=view.reading(stored) is None,
        message=known.message,
        parts=[_part_message(part, read, came_s_ago, reading.been if reading is not None else ()) for part in parts],
        gpus=sum(part.worker.gpus for part in parts if not part.ended),
        nodes=len(read.instances) if read is not None else 0,
        waiting=read.waiting if read is not None else 0,
        unmet=known.unmet,
        demand=_with_those_under_way(read, parts) if read is not None else None,
    )


def why_unknown(view: RayView, stored: StoredRayCluster, parts: Sequence[Part]) -> str:
    """Why it is not known what waits in it."""
    role = ray_parts.first_role(stored.value)
    first = next((p for p in parts if p.role is role and not p.ended), None)
    if first is None:
        return f"its {role.word} is about to be made again"
    if first.state is not JobState.RUNNING:
        return f"its {role.word} is {first.state.name}{view.last_words(first)}; see: whaleflux explain {first.job}"
    age_s = view.readings.age_s(stored.value.name)
    silent = "was not heard yet" if age_s is None else f"was silent for {age_s:.0f} s"
    return f"its {role.word} {silent}: what waits is not known, so nothing is started or ended{view.last_words(first)}; see: whaleflux logs {first.job}"


def why_none_are_started(view: RayView, known: Known, left_s: float) -> str:
    """Workers that ended before they had joined hold up the next ones."""
    last = max((part for part in view.parts(known) if failed(part)), key=lambda part: part.since, default=None)
    if last is None:
        return f"workers ended before they had joined; the next are started in {left_s:.0f} s"
    return (
        f"{last.job} ended before it had joined{view.last_words(last)}; the next are started in {left_s:.0f} s. "
        f"See: whaleflux logs {last.job}"
    )


def said(sizing: Sizing, max_gpus: int, read: Read) -> str:
    """What was decided, in one sentence."""
    words = [f"{read.waiting} wait" if read.waiting else "nothing waits"]
    if sizing.start:
        words.append(f"{len(sizing.start)} workers more are started")
    if sizing.end:
        words.append(f"{len(sizing.end)} that waited for GPUs are not needed any more")
    if sizing.short_gpus:
        words.append(f"{sizing.short_gpus} GPUs more are wanted, and max_gpus is {max_gpus}")
    return "; ".join(words)


def _with_those_under_way(read: Read, parts: Sequence[Part]) -> pb.RayDemand:
    demand = pb.RayDemand()
    demand.CopyFrom(read.demand)
    for part in parts:
        if part.role is Role.WORKER and not part.ended and part.job not in read.instances:
            coming = ray_sizing.under_way(part)
            demand.nodes.add(id=coming.id, status=coming.status, total=coming.total, labels=coming.labels)
    return demand


def _part_message(part: Part, read: Read | None, came_s_ago: float, been: Collection[str]) -> pb.RayClusterPart:
    return pb.RayClusterPart(
        job=part.job,
        role=f"RAY_ROLE_{part.role.name}",
        state=f"JOB_STATE_{part.state.name}",
        gpus=part.worker.gpus,
        gpu_type=part.worker.gpu_type,
        message=_part_words(part, read, came_s_ago, been),
    )


def _part_words(part: Part, read: Read | None, came_s_ago: float, been: Collection[str]) -> str:
    if part.ended:
        return "ends"
    if part.role is not Role.WORKER or part.state is not JobState.RUNNING:
        return ""
    nodes = read.demand.nodes if read is not None else ()
    node = next((one for one in nodes if one.instance.rpartition("/")[0] == part.job), None)
    if node is None:
        return "has left, and ends" if part.job in been else "on its way"
    if node.status == "IDLE":
        return f"idle for {node.idle_ms / 1000 + came_s_ago:.0f} s"
    return "drains" if node.status == "DRAINING" else "works"
