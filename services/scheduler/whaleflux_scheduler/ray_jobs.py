"""The jobs of a Ray cluster as records: what a head, a reader and a worker run, and what they are read back as."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from whaleflux import names, ray_cluster, telemetry
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import types_pb2
from whaleflux_scheduler import convert
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import Job, JobState, TaskPhase
from whaleflux_scheduler.core.ray_clusters import RayCluster
from whaleflux_scheduler.core.ray_parts import Part, Role, Worker

ACTOR = "scheduler/ray"
GRACE_S, HEAD_GRACE_S = 30, 15  # between SIGTERM and SIGKILL
_READER_MILLICORES = 500
_HOST_MEMORY_BYTES = 2 << 30  # what a worker's raylet takes beside the memory that Ray counts on
_PROGRAMS = Path(ray_cluster.__file__).parent
_FOLDER = "ray_beside"  # of the programs, in the task's own folder


def record(cluster: RayCluster, role: Role, number: int, now: datetime, joins: pb.RayPart, worker: Worker) -> pb.Job:
    """A job that is about to be stored, on behalf of who made the cluster. `joins`: the head that a worker joins."""
    job_id, uid = names.ray_job_id(cluster.id, role.word, number, cluster.uid), names.ulid(now.timestamp())
    job = pb.Job(
        name=names.job(cluster.queue, job_id),
        state=pb.JOB_STATE_QUEUED,
        step=-1,
        traceparent=telemetry.new_traceparent(),
        submitter=cluster.creator,
        uid=uid,
        spec=_worker(cluster, worker, joins) if role is Role.WORKER else _first(cluster, role),
        ray=pb.RayPart(cluster=cluster.name, cluster_uid=cluster.uid, role=f"RAY_ROLE_{role.name}"),
    )
    if role is Role.WORKER:
        job.ray.address, job.ray.session = joins.address, joins.session
        job.ray.total.update(worker.total)
    job.cause.actor = ACTOR
    convert.set_time(job.create_time, now)
    job.state_time.CopyFrom(job.create_time)
    return job


def _first(cluster: RayCluster, role: Role) -> pb.JobSpec:
    """A head, or what reads one that is there."""
    if role is Role.READER:
        words = [f"--address={shlex.quote(cluster.address)}"]
    else:
        words = ['--host="$MASTER_ADDR"', '--port="$PORT"', f"--memory-bytes={cluster.head_memory_bytes}"]
    spec = pb.JobSpec(
        command=_script(cluster.python, "head", words, ("reader", "worker", "head")),
        ranks=1,
        kind=pb.JOB_KIND_SERVICE,
        priority=cluster.priority,
        cpu_millicores_per_rank=cluster.head_cpu_millicores if role is Role.HEAD else _READER_MILLICORES,
        memory_bytes_per_rank=cluster.head_memory_bytes if role is Role.HEAD else 0,
    )
    spec.stop_grace.FromSeconds(HEAD_GRACE_S)
    return spec


def _worker(cluster: RayCluster, worker: Worker, joins: pb.RayPart) -> pb.JobSpec:
    asked = {
        "--address": joins.address, "--gpus": worker.gpus, "--cpus": worker.cpus, "--gpu-memory-mib": worker.gpu_memory_mib,
        "--gpu-type": worker.gpu_type, "--memory-bytes": worker.memory_bytes, "--site": worker.site, "--idle-s": cluster.idle_s,
        "--grace-s": GRACE_S - 5,
    }  # fmt: skip
    words = [f"{name}={shlex.quote(str(value))}" for name, value in asked.items()]
    words += [f"--label={shlex.quote(f'{key}={value}')}" for key, value in worker.labels]
    ranks = max(1, worker.gpus)
    memory = worker.memory_bytes_held + _HOST_MEMORY_BYTES if worker.memory_bytes_held else 0
    spec = pb.JobSpec(
        command=_script(cluster.python, "worker", words, ("worker",)),
        gpus=worker.gpus,
        ranks=0 if worker.gpus else 1,
        launch_once=worker.gpus > 0,
        nodes=pb.NodeCount(max=1, labels=dict(worker.labels)),
        gpu=pb.GpuRequirement(any_of=[worker.gpu_type]) if worker.gpus else None,
        sites=[worker.site] if worker.site else cluster.sites,
        priority=cluster.priority,
        cpu_millicores_per_rank=max(1, worker.cpus_held // ranks) * 1000,
        memory_bytes_per_rank=-(-memory // ranks),
        retry=types_pb2.RetryPolicy(max_restarts=0),
    )
    spec.stop_grace.FromSeconds(GRACE_S)
    return spec


def _script(python: str, module: str, words: list[str], programs: tuple[str, ...]) -> list[str]:
    """Writes the programs into the task's folder, and becomes one of them."""
    lines = [f"mkdir -p {_FOLDER}", f": > {_FOLDER}/__init__.py"]
    for program in programs:
        text = (_PROGRAMS / f"{program}.py").read_text(encoding="utf-8")
        lines += [f"cat > {_FOLDER}/{program}.py <<'WHALEFLUX'", f"{text}WHALEFLUX"]
    lines.append(f"exec {shlex.quote(python)} -m {_FOLDER}.{module} {' '.join(words)}")
    return ["bash", "-euo", "pipefail", "-c", "\n".join(lines) + "\n"]


# what is read back


def part_of(stored: StoredJob) -> Part:
    """The job as a part of its cluster."""
    job, ray = stored.value, stored.message.ray
    since = job.end_time if job.ended and job.end_time is not None else job.state_time or job.create_time
    return Part(
        job=job.name,
        role=Role(ray.role),
        state=job.state,
        since=since,
        ended=job.ended,
        gone=job.ended and not any(job.holding()),
        worker=_worker_of(stored.message),
        address=ray.address or _endpoint(job),
        session=ray.session,
    )


def _worker_of(message: pb.Job) -> Worker:
    spec, total = message.spec, message.ray.total
    return Worker(
        gpus=spec.gpus,
        gpu_type=next(iter(spec.gpu.any_of), ""),
        gpu_memory_mib=int(_of(total, "gpu_memory")) // max(1, spec.gpus),
        cpus=int(_of(total, "CPU")),
        memory_bytes=int(_of(total, "memory")),
        site=spec.sites[0] if len(spec.sites) == 1 else "",
        labels=tuple(sorted(spec.nodes.labels.items())),
    )


def _of(total: Mapping[str, float], name: str) -> float:
    return total[name] if name in total else 0.0  # noqa: SIM401 - reading a message's map makes the key


def _endpoint(job: Job) -> str:
    """host:port where a head that runs listens."""
    if job.state is not JobState.RUNNING or job.attempt is None or not job.attempt.tasks:
        return ""
    task = job.attempt.tasks[0]
    return task.endpoint if task.phase is TaskPhase.RUNNING else ""
