"""What a job loses when it is stopped now: the work since its last checkpoint, in words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

_TOLD = 10  # jobs of which the loss is told one by one


def of_jobs(client: Any, names: Iterable[str]) -> list[str]:
    """One line for each job, the first ten of them; one that is gone meanwhile loses nothing. Who does not answer stops nobody."""
    from whaleflux.errors import NotFound, StatusError
    from whaleflux.v1 import checkpoint_pb2, scheduler_pb2

    listed, lines = list(dict.fromkeys(names)), []
    for name in listed[:_TOLD]:
        try:
            job = client.scheduler.GetJob(scheduler_pb2.GetJobRequest(name=name), timeout=10)
        except NotFound:
            continue
        try:
            request = checkpoint_pb2.ListCheckpointsRequest(parent=name, page_size=1000)
            saved = client.checkpoint.ListCheckpoints(request, timeout=10).checkpoints
        except StatusError as error:
            lines.append(f"{name}: what it loses is not known ({error.message})")
            continue
        lines.append(f"{name}: {loss(job, saved, time.time())}")
    more = len(listed) - _TOLD
    return [*lines, *([f"and {more} more"] if more > 0 else [])]


def loss(job: Any, checkpoints: Sequence[Any], now_s: float) -> str:
    """What stopping `job` at `now_s` (Unix time) loses."""
    from whaleflux.quantities import shown_duration
    from whaleflux.v1 import checkpoint_pb2, scheduler_pb2

    if job.spec.kind == scheduler_pb2.JOB_KIND_SERVICE:
        return "a service, which starts again elsewhere"
    if not job.attempt.run_time.seconds:
        return "does not run yet, so it loses nothing"
    kept = (checkpoint_pb2.CHECKPOINT_STATE_COMMITTED, checkpoint_pb2.CHECKPOINT_STATE_CERTIFIED)
    saved = max((c for c in checkpoints if c.state in kept), key=lambda c: c.commit_time.seconds, default=None)
    began_s = job.attempt.run_time.seconds
    if saved is None:
        return f"has no checkpoint: it begins anew and loses {shown_duration(max(0.0, now_s - began_s))} of work"
    since_s = max(saved.commit_time.seconds, began_s)
    return (
        f"loses {shown_duration(max(0.0, now_s - since_s))} of work, goes on from its checkpoint at step {saved.step}"
    )
