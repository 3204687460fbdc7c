"""Between the owners' messages and the core."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from whaleflux import convert, names
from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.v1 import console_pb2 as pb
from whaleflux.v1 import health_pb2, inventory_pb2, router_pb2, scheduler_pb2, types_pb2
from whaleflux_console.core.chronicle import Device, JobFacts, NodePrice
from whaleflux_console.core.declared_plan import plan_of
from whaleflux_console.core.facts import WHOLE_PPM, Adjustment, Attempt, Ending, Holding, Outcome, PriceKind
from whaleflux_console.core.fragmentation import WaitingGang
from whaleflux_console.core.price_book import Price
from whaleflux_console.core.served_tokens import Counters

# An attempt that ended so lost nothing but what its own end says: it was done, or stopped and saved as somebody asked.
_NO_FAILURE = frozenset(
    {"done", "drain", "preempted", "requeued", "moved", "resized", "cancelled", "budget", "time_limit"}
)
_TAKES_WORK = frozenset({health_pb2.NODE_PHASE_READY, health_pb2.NODE_PHASE_SUSPECT, health_pb2.NODE_PHASE_REGISTERED})
_KINDS = {
    types_pb2.PRICE_KIND_ON_DEMAND: PriceKind.ON_DEMAND,
    types_pb2.PRICE_KIND_RESERVED: PriceKind.RESERVED,
    types_pb2.PRICE_KIND_SPOT: PriceKind.SPOT,
    types_pb2.PRICE_KIND_OWNED: PriceKind.OWNED,
    types_pb2.PRICE_KIND_UNSPECIFIED: PriceKind.OWNED,
}


def millis(message: Any, field: str) -> int | None:
    """A time of a message, milliseconds since 1970; None where it is not set."""
    at = getattr(message, field)
    return int(at.seconds) * 1000 + int(at.nanos) // 1_000_000 if message.HasField(field) else None


def devices_of(node: inventory_pb2.Node, health: health_pb2.NodeHealth | None) -> tuple[Device, ...]:
    """What work can hold there. Raises InvalidArgument for a node that cannot be read."""
    facts = convert.node_from_proto(node)
    takes = node.intent in {inventory_pb2.NODE_INTENT_ACTIVE, inventory_pb2.NODE_INTENT_UNSPECIFIED}
    lives = health is None or health.phase in _TAKES_WORK
    parents = {gpu.uuid: gpu.model for gpu in facts.gpus}
    return tuple(
        Device(
            card=gpu.parent_uuid or gpu.uuid,
            device=gpu.uuid,
            node=node.name,
            gpu_class=parents.get(gpu.parent_uuid, "") or gpu.model.split(" ")[0],
            part_ppm=max(1, min(WHOLE_PPM, round(gpu.part_of_gpu * WHOLE_PPM))),
            available=takes and lives and gpu.offered,
            memory_bytes=gpu.memory_bytes,
        )
        for gpu in facts.gpus
        if gpu.uuid
    )


def node_price_of(node: inventory_pb2.Node) -> NodePrice | None:
    """What the node says that its cards cost; None: nothing."""
    told = node.price if node.HasField("price") else node.facts.price
    if told.usd_per_gpu_hour <= 0:
        return None
    return NodePrice(round(told.usd_per_gpu_hour * 1_000_000), _KINDS.get(told.kind, PriceKind.OWNED))


def job_facts(job: scheduler_pb2.Job, model: str, now_ms: int) -> JobFacts:
    """A job's attempts and what they hold."""
    attempts = [one for one in (*job.past_attempts, job.attempt) if one.number and one.HasField("allocate_time")]
    found = tuple(_attempt(job, one, model) for one in attempts)
    holdings = tuple(held for one in attempts for held in _holdings(job, one, now_ms))
    return JobFacts(job.name, found, holdings, _outcome(job))


def counters_of(replica: router_pb2.Replica) -> Counters | None:
    """What its engine counts; None: nothing that is known."""
    told = (
        replica.input_tokens if replica.HasField("input_tokens") else None,
        replica.output_tokens if replica.HasField("output_tokens") else None,
    )
    return None if told == (None, None) else Counters(*told)


_ENDINGS = {
    scheduler_pb2.JOB_STATE_SUCCEEDED: Ending.SUCCEEDED,
    scheduler_pb2.JOB_STATE_FAILED: Ending.FAILED,
    scheduler_pb2.JOB_STATE_CANCELLED: Ending.CANCELLED,
}


def _outcome(job: scheduler_pb2.Job) -> Outcome | None:
    serves = job.spec.kind == scheduler_pb2.JOB_KIND_SERVICE
    ending = None if serves else _ENDINGS.get(job.state)
    return Outcome(job.uid, ending) if ending is not None else None


def waiting_gang(job: scheduler_pb2.Job) -> WaitingGang | None:
    """What the job waits for where it is a place that it lacks, promised or not; None: it does not wait, or for something else."""
    spec = job.spec
    claims, promised = job.HasField("claim"), job.claim.purpose == scheduler_pb2.CLAIM_PURPOSE_RESERVATION
    waits = job.state == scheduler_pb2.JOB_STATE_QUEUED and (promised if claims else bool(job.decision.exclusions))
    parts = spec.gpu.mig_profile or spec.gpu.mig_memory_bytes or spec.gpu.share_memory_bytes
    if not waits or not spec.gpus or parts:
        return None
    return WaitingGang(job.name, spec.gpus, tuple(spec.gpu.any_of), spec.gpu.min_memory_bytes, tuple(spec.sites))


def price_of(message: pb.GpuPrice) -> Price:
    """A declared price. Raises InvalidArgument for one that says nothing."""
    start_ms = millis(message, "start_time")
    if start_ms is None:
        raise InvalidArgument(FieldViolation("start_time", f"{message.name} has no beginning"))
    return Price(
        name=message.name,
        kind=_KINDS.get(message.kind, PriceKind.OWNED),
        micros_per_hour=message.micros_per_gpu_hour,
        start_ms=start_ms,
        end_ms=millis(message, "end_time"),
        source=message.source,
        source_date=message.source_date,
        node=message.node,
        site=message.site,
        gpu_class=message.gpu_class,
    )


def adjustment_of(message: pb.Adjustment) -> Adjustment:
    """A declared adjustment."""
    return Adjustment(
        name=message.name,
        micros=message.micros,
        start_ms=millis(message, "start_time") or 0,
        end_ms=millis(message, "end_time") or 0,
        site=names.last(message.site) if message.site else "",
        gpu_class=message.gpu_class,
        reason=message.reason,
    )


def _attempt(job: scheduler_pb2.Job, one: scheduler_pb2.Attempt, model: str) -> Attempt:
    queue, _ = names.split(job.name, "queues", "jobs")
    end_ms, reason = millis(one, "end_time"), one.end_reason.partition(":")[0]
    serves = job.spec.kind == scheduler_pb2.JOB_KIND_SERVICE  # what it served is not lost by its end
    succeeded = one.number == job.attempt.number and job.state == scheduler_pb2.JOB_STATE_SUCCEEDED
    return Attempt(
        job=job.name,
        uid=job.uid,
        attempt=one.number,
        queue=names.queue(queue),
        user=job.submitter,
        model=model,
        allocate_ms=millis(one, "allocate_time") or 0,
        run_ms=millis(one, "run_time"),
        first_step_ms=millis(one, "first_step_time"),
        end_ms=end_ms,
        failed=end_ms is not None and reason not in _NO_FAILURE and not succeeded and not serves,
        restored_step=_step_of(one.restore_checkpoint),
        last_step=_last_step(job, one),
        epoch=one.epoch,
        communication_s=one.communication_s or None,
        best_communication_s=one.best_communication_s if one.HasField("best_communication_s") else None,
        best_free_communication_s=one.best_free_communication_s if one.HasField("best_free_communication_s") else None,
        of_its_model=bool(job.spec.parallelism.model or job.spec.environment.get("MESH")),
        plan=plan_of(
            one.split.pipeline or job.spec.parallelism.pipeline, one.split.mesh or job.spec.environment.get("MESH", "")
        ),
        cross_node=len({task.node for task in one.tasks}) > 1,
    )


def _last_step(job: scheduler_pb2.Job, one: scheduler_pb2.Attempt) -> int | None:
    step = one.step if one.HasField("end_time") or one.number != job.attempt.number else job.step
    return step if step > 0 else None


def _step_of(checkpoint: str) -> int | None:
    """The step that a checkpoint's id begins with: s{step}-e{epoch}-n{serial}."""
    word = checkpoint.rpartition("/")[2].partition("-")[0].removeprefix("s")
    return int(word) if checkpoint and word.isdigit() else None


def _holdings(job: scheduler_pb2.Job, one: scheduler_pb2.Attempt, now_ms: int) -> Iterator[Holding]:
    start_ms = millis(one, "allocate_time") or 0
    end_ms = millis(one, "end_time") or now_ms
    for task in one.tasks:
        for device, share in _shares(task):
            yield Holding(device, job.name, job.uid, one.number, share, start_ms, end_ms)


def _shares(task: scheduler_pb2.Task) -> Iterable[tuple[str, int]]:
    """Each device that the task holds with how much of it; `gpu_parts` are all parts of all its devices together, by memory."""
    uuids = list(task.gpu_uuids)
    whole = not task.share_memory_bytes
    each = WHOLE_PPM if whole or not uuids else round(task.gpu_parts / len(uuids) * WHOLE_PPM)
    return [(uuid, max(1, min(WHOLE_PPM, each))) for uuid in uuids]
