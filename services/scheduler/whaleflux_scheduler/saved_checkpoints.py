"""The newest checkpoint of each running job: what a job loses when it makes room is what it did since, and who can read it bounds its sizes.

The checkpoint service is asked job by job, of those alone that could be asked to make room, some at a time: what it costs grows with what
runs, not with all that was ever saved.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from whaleflux.clock import Clock
from whaleflux.errors import StatusError
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1.checkpoint_pb2_grpc import CheckpointServiceStub
from whaleflux_scheduler.core.model import Job, JobState
from whaleflux_scheduler.core.planned_sizes import Saved
from whaleflux_scheduler.replanning import saved_of

EVERY_S = 30.0  # the checkpoint service offers no watch; who loses least is a matter of minutes
MOST_ASKED = 300  # jobs in one look; those that were asked about longest ago go first
AT_ONCE = 8
ANSWER_S = 10.0
_KEPT = frozenset({pb.CHECKPOINT_STATE_COMMITTED, pb.CHECKPOINT_STATE_CERTIFIED})


@dataclass(frozen=True, slots=True)
class Newest:
    """When the newest checkpoint of a job was committed, and the one that it would go on from: that of the latest step."""

    at: datetime
    age: tuple[int, int, int]  # step, epoch, serial of that
    saved: Saved


def could_make_room(jobs: Iterable[Job]) -> list[str]:
    """Names of those that run and may be stopped for others."""
    return [job.name for job in jobs if job.state is JobState.RUNNING and not job.spec.is_service and job.spec.gpus > 0]


class SavedCheckpoints:
    """Asks about the jobs that `names` answers, and tells all that is known of these, by job, each time that it differs from before."""

    def __init__(
        self,
        told: Callable[[Mapping[str, Newest]], None],
        checkpoint: CheckpointServiceStub,
        names: Callable[[], Iterable[str]],
        clock: Clock,
    ) -> None:
        self._told, self._checkpoint, self._names, self._clock = told, checkpoint, names, clock
        self._known: dict[str, Newest] = {}
        self._asked: dict[str, float] = {}  # when, monotonic

    async def run(self) -> None:
        """For ever. What cannot be asked is asked again; until then what was known counts."""
        while True:
            await self.look()
            await self._clock.sleep(EVERY_S)

    async def look(self) -> None:
        """Asks once about some."""
        names = set(self._names())
        self._asked = {name: at_s for name, at_s in self._asked.items() if name in names}
        known = {name: at for name, at in self._known.items() if name in names}
        due = sorted(names, key=lambda name: (self._asked.get(name, 0.0), name))[:MOST_ASKED]
        for start in range(0, len(due), AT_ONCE):
            some = due[start : start + AT_ONCE]
            newest = await asyncio.gather(*map(self._newest, some))
            known.update((name, at) for name, at in zip(some, newest, strict=True) if at is not None)
        if known != self._known:
            self._known = known
            self._told(dict(known))

    async def _newest(self, job: str) -> Newest | None:
        """None: there is none, or nobody answers."""
        self._asked[job] = self._clock.monotonic()
        newest: Newest | None = None
        request = pb.ListCheckpointsRequest(parent=job, page_size=500)
        with contextlib.suppress(StatusError):
            while True:
                page = await self._checkpoint.ListCheckpoints(request, timeout=ANSWER_S)
                for one in page.checkpoints:
                    if one.state in _KEPT and one.HasField("commit_time"):
                        newest = _newer(newest, one)
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
        return newest


def _newer(known: Newest | None, one: pb.Checkpoint) -> Newest:
    at, age = one.commit_time.ToDatetime(tzinfo=UTC), (one.step, one.epoch, one.serial)
    if known is None:
        return Newest(at, age, saved_of(one))
    last = known if age < known.age else Newest(at, age, saved_of(one))
    return Newest(max(at, known.at), last.age, last.saved)
