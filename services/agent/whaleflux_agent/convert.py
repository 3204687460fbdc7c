"""Between the contract (`whaleflux.v1`) and the agent's own data."""

from __future__ import annotations

from whaleflux.v1 import agent_pb2, scheduler_pb2
from whaleflux_agent.core.work import Work

DEFAULT_GRACE_S = 30.0


def work_from_proto(desired: agent_pb2.DesiredTask) -> Work:
    """The task as the core sees it. Never raises: what cannot be run is refused later, with a reason."""
    spec, task = desired.spec, desired.task
    return Work(
        task=task.id,
        job=desired.job,
        epoch=desired.epoch,
        gpu_indices=tuple(task.gpu_indices),
        first_rank=task.first_rank,
        group_rank=task.group_rank,
        world_size=desired.world_size,
        group_world_size=desired.group_world_size,
        rendezvous=desired.rendezvous,
        start=desired.start,
        restart_count=desired.restart_count,
        max_restarts=spec.retry.max_restarts,
        command=tuple(spec.command),
        image=spec.image,
        environment=tuple(sorted(spec.environment.items())),
        service=spec.kind == scheduler_pb2.JOB_KIND_SERVICE,
        working_directory=spec.working_directory,
        datasets=tuple(spec.datasets),
        cpu_millicores_per_rank=spec.cpu_millicores_per_rank,
        memory_bytes_per_rank=spec.memory_bytes_per_rank,
        stop_grace_s=spec.stop_grace.ToMilliseconds() / 1000 if spec.HasField("stop_grace") else DEFAULT_GRACE_S,
        traceparent=desired.traceparent,
        checkpoint_location=desired.checkpoint_location,
        restore_checkpoint=desired.restore_checkpoint,
        keep_checkpoints=spec.checkpoint.keep,
        every_steps=spec.checkpoint.every_steps,
    )
