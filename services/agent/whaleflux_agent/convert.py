"""Between the contract (`whaleflux.v1`) and the agent's own data."""

from __future__ import annotations

from whaleflux.manifests.job_spec import spec_of
from whaleflux.v1 import agent_pb2
from whaleflux_agent.core.work import Work


def work_from_proto(desired: agent_pb2.DesiredTask) -> Work:
    """The task as the core sees it. Never raises: what cannot be run is refused later, with a reason."""
    task = desired.task
    return Work(
        task=task.id,
        job=desired.job,
        epoch=desired.epoch,
        gpu_uuids=tuple(task.gpu_uuids),
        first_rank=task.first_rank,
        group_rank=task.group_rank,
        world_size=desired.world_size,
        group_world_size=desired.group_world_size,
        rendezvous=desired.rendezvous,
        start=desired.start,
        restart_count=desired.restart_count,
        spec=spec_of(desired.spec),
        traceparent=desired.traceparent,
        checkpoint_location=desired.checkpoint_location,
        restore_checkpoint=desired.restore_checkpoint,
        elsewhere=desired.elsewhere,
        job_uid=desired.job_uid,
        remote_datasets=tuple(desired.remote_datasets),
        share_bytes=task.share_memory_bytes,
        cpu_ranks=task.ranks,
        global_ranks=tuple(task.global_ranks),
    )
