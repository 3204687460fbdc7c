"""When the newest checkpoint of each job was committed: what a job loses when it makes room is what it did since."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub

EVERY_S = 30.0  # the checkpoint service offers no watch; who loses least is a matter of minutes
_KEPT = frozenset({pb.CHECKPOINT_STATE_COMMITTED, pb.CHECKPOINT_STATE_CERTIFIED})


async def follow(
    told: Callable[[Mapping[str, datetime]], None], checkpoint: CheckpointServiceStub, clock: Clock
) -> None:
    """Tells all that are known, by job, each time that they differ from before."""
    known: Mapping[str, datetime] = {}
    while True:
        with contextlib.suppress(StatusError):  # asked again soon; until then what was known counts
            newest = await _newest(checkpoint)
            if newest != known:
                told(newest)
                known = newest
        await clock.sleep(EVERY_S)


async def _newest(checkpoint: CheckpointServiceStub) -> dict[str, datetime]:
    newest: dict[str, datetime] = {}
    token, more = "", True
    while more:
        request = pb.ListCheckpointsRequest(parent="queues/-/jobs/-", page_size=500, page_token=token)
        page = await checkpoint.ListCheckpoints(request, timeout=10.0)
        for one in page.checkpoints:
            if one.state in _KEPT and one.HasField("commit_time"):
                queue, job, _ = names.split(one.name, "queues", "jobs", "checkpoints")
                at, name = one.commit_time.ToDatetime(tzinfo=UTC), names.job(queue, job)
                newest[name] = max(at, newest.get(name, at))
        token = page.next_page_token
        more = bool(token)
    return newest
