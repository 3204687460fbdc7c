"""Jobs for the nodes that a Ray cluster should get: what each is given, and what those that are on their way count as. Pure."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whaleflux import names
from whaleflux.v1 import scheduler_pb2 as pb

ADDRESS, TOTAL = "RAY_GROWN_FOR", "RAY_GROWN_BY"  # variables of such jobs, by which they are known again
ENDED = frozenset({pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED})
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Growth:
    """How a cluster is grown: whose interpreter has Ray on the nodes, when workers leave, and how many GPUs all of them may have."""

    address: str
    queue: str = "default"
    python: str = "python3"
    idle_s: float = 60.0
    grace_s: float = 30.0
    max_gpus: int = 64
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Worker:
    """What one job is given. `cpus` is what Ray may count on, `cpus_held` what the job asks for."""

    gpus: int
    gpu_type: str
    gpu_memory_mib: int
    cpus: int
    cpus_held: int
    site: str = ""

    @property
    def total(self) -> Mapping[str, float]:
        """As Ray will tell it."""
        family = self.gpu_type.partition("-")[0]
        gpu = {"GPU": self.gpus, "gpu_memory": self.gpus * self.gpu_memory_mib, f"accelerator_type:{family}": self.gpus}
        return {"CPU": self.cpus} | (gpu if self.gpus else {})


def workers(plan: pb.RayPlan, room_gpus: int) -> Iterator[Worker]:
    """One for each node to add, as long as there is room for its GPUs.

    A node on whose devices bundles share memory becomes one worker for each GPU: Ray adds memory up over a node, and of one GPU the sum is
    what that GPU has.
    """
    for addition in plan.additions:
        cpus = max(1, math.ceil(sum(one.resources.get("CPU", 0) * one.count for one in addition.bundles)))
        parts = (
            addition.gpus
            if addition.gpus > 1 and any(map(_shares_memory, addition.bundles)) and _each_on_one(addition)
            else 1
        )
        gpus = addition.gpus // parts
        site = names.split(addition.nodes[0], "sites", "nodes")[0] if addition.nodes else ""
        for _ in range(addition.count * parts):
            if gpus > room_gpus:
                return
            room_gpus -= gpus
            yield Worker(gpus, addition.gpu_type, addition.gpu_memory_mib, cpus, max(1, cpus // parts), site)


def _shares_memory(bundle: pb.RayBundle) -> bool:
    return bundle.resources.get("GPU", 0) < 1 and bundle.resources.get("gpu_memory", 0) > 0


def _each_on_one(addition: pb.RayAddition) -> bool:
    return all(bundle.resources.get("GPU", 0) <= 1 for bundle in addition.bundles)


def job_file(worker: Worker, how: Growth, job_id: str) -> dict[str, Any]:
    """The job that starts it, as a job file has it."""
    program = Path(__file__).with_name("worker.py").read_text(encoding="utf-8")
    arguments = {
        "--address": how.address, "--gpus": worker.gpus, "--cpus": worker.cpus, "--gpu-memory-mib": worker.gpu_memory_mib,
        "--gpu-type": worker.gpu_type, "--site": worker.site, "--idle-s": how.idle_s, "--grace-s": max(1.0, how.grace_s - 5),
    }  # fmt: skip
    words = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in arguments.items())
    found: dict[str, Any] = {
        "name": job_id,
        "queue": how.queue,
        "run": f"exec {shlex.quote(how.python)} - {words} <<'WHALEFLUX'\n{program}WHALEFLUX\n",
        "launch": "once",
        "workdir": "none",
        "gpus": worker.gpus,
        "nodes": {"max": 1},
        "sites": [worker.site] if worker.site else [],
        "cpus_per_rank": max(1, worker.cpus_held // max(1, worker.gpus)),
        "priority": how.priority,
        "retry": {"max_restarts": 0},
        "stop_grace": f"{how.grace_s:g} s",
        "environment": {ADDRESS: how.address, TOTAL: json.dumps(worker.total)},
    }
    return found | ({"gpu": {"any": [worker.gpu_type]}} if worker.gpus else {"launch": "per_rank"})


def grown_for(jobs: Iterable[pb.Job], address: str) -> list[pb.Job]:
    """The cluster's workers that have not ended."""
    return [job for job in jobs if job.state not in ENDED and job.spec.environment.get(ADDRESS) == address]


def gpus_of(jobs: Iterable[pb.Job]) -> int:
    return sum(job.spec.gpus for job in jobs)


def with_those_under_way(demand: pb.RayDemand, jobs: Iterable[pb.Job]) -> pb.RayDemand:
    """The demand, with workers that have not joined yet as nodes of the cluster: what they will hold is not asked for twice."""
    joined = {node.instance.rpartition("/")[0] for node in demand.nodes if node.status != "DEAD"}
    found = pb.RayDemand()
    found.CopyFrom(demand)
    for job in jobs:
        if job.name not in joined and (total := _total(job.spec.environment)):
            found.nodes.add(id=job.name, status="STARTING", total=total, labels=_labels(job))
    return found


def _total(environment: Mapping[str, str]) -> dict[str, float]:
    try:
        content = json.loads(environment.get(TOTAL, "{}"))
        return {str(name): float(value) for name, value in content.items()}
    except (ValueError, AttributeError, TypeError):
        return {}


def _labels(job: pb.Job) -> dict[str, str]:
    options = [option.model for option in job.spec.gpu.options] or list(job.spec.gpu.any_of)
    return {"whaleflux/gpu": options[0]} if options else {}
