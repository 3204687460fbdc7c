"""`whaleflux ray grow`: what waits is read, the scheduler says which nodes, and each becomes a job that joins the cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whaleflux import names
from whaleflux.cli import output, sending
from whaleflux.cli.output import Format
from whaleflux.cli.state import confirm, fleet, pages
from whaleflux.errors import FieldViolation, InvalidArgument, StatusError
from whaleflux.ray_cluster import growth, reading
from whaleflux.ray_cluster.growth import Growth, Worker

EVERY_S = 1.0
_MOST_AT_ONCE = 100  # jobs of one look
_MOST_JOBS = 100_000


@dataclass(frozen=True, slots=True)
class Wish:
    """How the command was called."""

    follow: bool
    yes: bool
    fmt: Format


def run(how: Growth, python: str, wish: Wish) -> None:
    """Once, or each second. Raises InvalidArgument for what cannot be, StatusError of the fleet where it looks once."""
    if wish.fmt is not Format.table and not wish.fmt.is_json:
        raise InvalidArgument(FieldViolation("-o", f"{wish.fmt.value} is not made of jobs here; use table or json"))
    if wish.follow and not wish.yes:
        raise InvalidArgument(FieldViolation("--follow", "asks nobody each time; repeat with --yes"))
    told = ""
    while True:
        try:
            told = _once(how, python, wish, told)
        except StatusError as error:
            if not wish.follow or isinstance(error, InvalidArgument):
                raise
            output.note(str(error))
        if not wish.follow:
            return
        time.sleep(EVERY_S)


def _once(how: Growth, python: str, wish: Wish, told: str) -> str:
    """One look; what was said of it, which is said once."""
    from google.protobuf import json_format

    from whaleflux.v1 import scheduler_pb2 as pb

    read = json_format.ParseDict(
        dict(reading.read_once(how.address, python)), pb.RayDemand(), ignore_unknown_fields=True
    )
    with fleet() as client:
        listed = pages(client.scheduler.ListJobs, _jobs_of(how), "jobs", _MOST_JOBS)
        there = growth.grown_for(listed, how.address)
        asked = pb.PlanRayRequest(demand=growth.with_those_under_way(read, there))
        plan = client.scheduler.PlanRay(asked, timeout=30)
        more = list(growth.workers(plan, how.max_gpus - growth.gpus_of(there)))[:_MOST_AT_ONCE]
        said = _said(plan, more, there, how)
        if said != told:
            output.note(said)
        if more:
            confirm(f"start {len(more)} worker{'s' * (len(more) != 1)}?", wish.yes)
        jobs = [sending.created(client, _request(worker, how)) for worker in more]
    _show(jobs, more, wish)
    return said


def _jobs_of(how: Growth) -> Any:
    from whaleflux.v1 import scheduler_pb2 as pb

    return pb.ListJobsRequest(parent=names.queue(how.queue), page_size=500)


def _request(worker: Worker, how: Growth) -> Any:
    import yaml

    from whaleflux.manifests.yaml_files import jobs_from_yaml
    from whaleflux.v1 import scheduler_pb2 as pb

    job_id = f"ray-worker-{names.ulid().lower()}"
    manifest = jobs_from_yaml(yaml.safe_dump(growth.job_file(worker, how, job_id)), Path.cwd())[0]
    return pb.CreateJobRequest(
        parent=names.queue(manifest.queue),
        job_id=manifest.job_id,
        job=pb.Job(spec=manifest.spec),
        request_id=names.ulid(),
        wait_for_capacity=True,
    )


def _said(plan: Any, more: Sequence[Worker], there: Sequence[Any], how: Growth) -> str:
    wanted, given = plan.gpus, sum(worker.gpus for worker in more)
    words = [f"{len(there)} workers with {growth.gpus_of(there)} GPUs; {given} more to come"]
    if given < wanted:
        words.append(f"{wanted - given} GPUs more are wanted, and --max-gpus is {how.max_gpus}")
    words += [f"{one.count} x not to be had: {one.why}" for one in plan.unmet[:5]]
    return "; ".join(words)


def _show(jobs: Sequence[Any], more: Sequence[Worker], wish: Wish) -> None:
    if wish.fmt.is_json:
        output.say_json([output.as_json(job) for job in jobs], wish.fmt)
    elif jobs:
        rows = [(names.last(job.name), str(one.gpus), one.gpu_type or "-") for job, one in zip(jobs, more, strict=True)]
        output.table(("JOB", "GPUS", "TYPE"), rows)
