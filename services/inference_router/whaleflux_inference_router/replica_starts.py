"""Jobs of replicas: made on the GPUs that serve the model now, made anew when they have ended, or wait for GPUs while others would serve."""

from __future__ import annotations

from collections.abc import Collection

from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, InvalidArgument, NotFound, StatusError
from whaleflux.v1 import router_pb2 as pb
from whaleflux_inference_router import convert
from whaleflux_inference_router.core.replicas import Wanted
from whaleflux_inference_router.replica_jobs import ReplicaJobs
from whaleflux_inference_router.serving_sizes import ReplicaSizes

REPLACE_EVERY_S = 10.0  # for a job that has ended
RESIZE_EVERY_S = 10.0  # for the replicas of a model that wait for GPUs


class ReplicaStarts:
    """One leadership's view; what was decided is in the job."""

    def __init__(self, jobs: ReplicaJobs, clock: Clock) -> None:
        self._jobs, self._clock, self._sizes = jobs, clock, ReplicaSizes(jobs.serving_sizes, clock)
        self._replaced_at_s: dict[str, float] = {}  # by job
        self._resized_at_s: dict[str, float] = {}  # by model

    async def ensure(self, model: pb.Model, one: Wanted, replica: pb.Replica) -> str:
        """A replica's job exists and has not ended; one that ends again and again is started now and then. Returns what is in the way."""
        job, owner = replica.job, replica.owner
        if not self._jobs.synced or not convert.is_engine_known(model, one.version):
            return ""
        if self._jobs.of(job, owner) is None:
            try:
                engine = await self._sizes.sized(model, one.version, one.site)
                await self._jobs.ensure_job(model, one.id, engine, one.site)
            except (FailedPrecondition, NotFound, InvalidArgument) as refused:
                return refused.message
        elif self._jobs.has_ended(job, owner):
            if self._is_time(self._replaced_at_s, job, REPLACE_EVERY_S):
                await self._jobs.end_job(job, owner)
        elif self._jobs.is_waiting(job, owner) and convert.engine_at(model, one.version, one.site).shape:
            await self._size_anew(model, one, replica)
        return ""

    async def _size_anew(self, model: pb.Model, one: Wanted, replica: pb.Replica) -> None:
        """A replica that waits for GPUs while others would serve now gets those: one of a model at a time, so that not all run for the same."""
        spec = self._jobs.jobs[replica.job].spec
        try:
            better = await self._sizes.better(model, one.version, one.site, spec.gpu.any_of, spec.gpus)
        except StatusError:
            return  # it waits on
        if better is not None and self._is_time(self._resized_at_s, model.name, RESIZE_EVERY_S):
            await self._jobs.end_job(replica.job, replica.owner)

    def _is_time(self, done_at_s: dict[str, float], name: str, every_s: float) -> bool:
        """Whether it may be done again; it is done then."""
        now_s = self._clock.monotonic()
        if now_s - done_at_s.get(name, -every_s) < every_s:
            return False
        done_at_s[name] = now_s
        return True

    def keep_only(self, models: Collection[str], jobs: Collection[str]) -> None:
        """Forgets what exists no more."""
        self._sizes.keep_only(models)
        for known, kept in ((self._replaced_at_s, jobs), (self._resized_at_s, models)):
            for gone in known.keys() - set(kept):
                del known[gone]
