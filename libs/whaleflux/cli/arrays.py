"""Arrays as commands meet them: a name that may stand for many jobs, and many jobs that are shown as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from whaleflux import names
from whaleflux.cli import output
from whaleflux.cli.state import pages


def members(client: Any, name: str) -> list[Any]:
    """The jobs of the array that is called queues/{queue}/jobs/{array}, in their order; none when there is no such array."""
    from whaleflux.v1 import scheduler_pb2

    request = scheduler_pb2.ListJobsRequest(parent=names.queue(names.top(name)), show_ended=True, page_size=1000)
    listed = pages(client.scheduler.ListJobs, request, "jobs")
    return sorted((j for j in listed if j.spec.array.name == names.last(name)), key=lambda j: int(j.spec.array.index))


def expanded(client: Any, jobs: Sequence[str]) -> dict[str, str]:
    """Each named job, and in place of an array its members, each with the array's name ("" for others)."""
    from whaleflux.errors import NotFound
    from whaleflux.v1 import scheduler_pb2

    found: dict[str, str] = {}
    for name in jobs:
        try:
            client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=10)
            found[name] = ""
        except NotFound:
            many = members(client, name)
            found |= {member.name: name for member in many} if many else {name: ""}
    return found


def in_words(found: dict[str, str]) -> str:
    """For a question: jobs by name, arrays with the number of their members."""
    alone = [name for name, array in found.items() if not array]
    counted = Counter(array for array in found.values() if array)
    return ", ".join([*alone, *(f"all {count} members of {array}" for array, count in counted.items())])


def grouped(shown: Sequence[Any], known: Sequence[Any]) -> list[Any]:
    """The jobs to be listed, with one row in place of an array's members, which counts all `known` ones."""
    rows: dict[str, Any] = {}
    for job in shown:
        array = array_of(job)
        if not array:
            rows[job.name] = job
        elif array not in rows:
            rows[array] = _row(array, [one for one in known if array_of(one) == array])
    return list(rows.values())


def array_of(job: Any) -> str:
    """The full name of a job's array; "" when it is in none."""
    array = job.spec.array.name
    return names.job(names.top(job.name), array) if array else ""


def _row(array: str, jobs: Sequence[Any]) -> Any:
    """One job that stands for all; its state is in words."""
    if len(jobs) == 1:
        return jobs[0]
    row = type(jobs[0])(name=f"{array}[{len(jobs)}]", create_time=jobs[0].create_time, step=-1)
    counts = Counter(map(output.job_state, jobs))
    row.state_message = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    row.spec.gpus = sum(int(one.spec.gpus) for one in jobs if not one.HasField("end_time"))
    row.cost_usd = sum(float(one.cost_usd) for one in jobs)
    return row
