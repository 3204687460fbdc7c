"""Sending a job: whatever happens meanwhile, who sends it knows whether it is there."""

from __future__ import annotations

import time
from typing import Any

from whaleflux import fingerprint
from whaleflux.cli import output
from whaleflux.errors import StatusError

LOOKS, LOOK_AGAIN_S = 3, 0.3  # a request that was under way may still be stored


def created(client: Any, request: Any) -> Any:
    """The job as it is stored. Ctrl-C, and an answer that does not come, end with whether it is there."""
    try:
        return client.scheduler.CreateJob(request, timeout=20)
    except KeyboardInterrupt:
        output.note("\n" + found_or_not(client, request))
        raise


def found_or_not(client: Any, request: Any) -> str:
    """Whether what `request` asked for was stored, and what to do next."""
    for look in range(LOOKS):
        try:
            if name := _find(client, request):
                return f"{name} was submitted; follow it: whaleflux logs -f {name}; end it: whaleflux cancel {name}"
        except StatusError as error:
            return f"it is not known whether it was submitted ({error.message}); see: whaleflux jobs"
        if look + 1 < LOOKS:
            time.sleep(LOOK_AGAIN_S)
    return "it was not submitted"


def _find(client: Any, request: Any) -> str:
    """Name of the job that the request has made; "" when there is none."""
    from whaleflux.v1 import scheduler_pb2

    newest = scheduler_pb2.ListJobsRequest(parent=request.parent, show_ended=True, page_size=100)
    mark = fingerprint.of_request(request)
    listed = client.scheduler.ListJobs(newest, timeout=5).jobs
    return next((job.name for job in listed if mark and job.request_fingerprint == mark), "")
