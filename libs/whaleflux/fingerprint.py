"""What one submission is known by: the same for each delivery of it, for its sender and for the scheduler."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whaleflux.v1 import scheduler_pb2


def of_request(request: scheduler_pb2.CreateJobRequest) -> str:
    """Digest of its request_id and content, as in Job.request_fingerprint; "" for a request without request_id."""
    if not request.request_id:
        return ""
    content = type(request)(parent=request.parent, job_id=request.job_id, request_id=request.request_id)
    content.job.spec.CopyFrom(request.job.spec)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()
