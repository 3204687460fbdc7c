"""Submitting a job: check it, give it a name, store it. One commit, and nothing that waits for the leader."""

from __future__ import annotations

import hashlib

from whaleflux import names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FieldViolation, Invalid, NotFound, Unavailable
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, Present, Put, Store, Unchanged
from whaleflux.store.once import commit_once
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_scheduler import convert
from whaleflux_scheduler.core.validate import check_spec

DATASETS_S = 2.0  # deadline for asking inventory about one dataset
KNOWN_DATASET_S = 60.0
MOST_KNOWN = 1_000


class Submissions:
    """Makes jobs. `inventory` None: names of datasets are not checked."""

    def __init__(self, store: Store, clock: Clock, inventory: InventoryServiceStub | None) -> None:
        self._store, self._clock, self._inventory = store, clock, inventory
        self._datasets: dict[str, float] = {}  # name -> monotonic time until which it is known to exist

    async def draft(self, request: pb.CreateJobRequest) -> pb.Job:
        """The job as it would be stored. Raises Invalid with every wrong field."""
        queue = names.split(request.parent, "queues", field="parent")[0]
        job_id = names.check_id("job_id", request.job_id) if request.job_id else _made_id(request)
        if not request.job.HasField("spec"):
            raise Invalid(FieldViolation("job.spec", "is not set; say what to run and on how many GPUs"))
        now = self._clock.now()
        check_spec(convert.spec_of(request.job.spec), request.job.spec.ByteSize(), now)
        if request.job.spec.datasets:
            await self._check_datasets(request.job.spec)
        job = pb.Job(
            name=f"queues/{queue}/jobs/{job_id}",
            spec=request.job.spec,
            state=pb.JOB_STATE_QUEUED,
            step=-1,
            traceparent=telemetry.current_traceparent(),
            submitter=_submitter(),
            request_fingerprint=_fingerprint(request),
        )
        job.create_time.FromDatetime(now)
        return job

    async def store(self, job: pb.Job, *, named: bool) -> tuple[pb.Job, int]:
        """Stores it; returns it as stored (an earlier one for a repeated request) and the revision.

        A user's own name may have been used before: its epochs go on where they ended, since agents refuse lower ones.
        """
        key = keys.of_name(keys.JOBS, job.name)
        queue = job.name.split("/")[1]
        when: list[Condition] = [Absent(key), Present(keys.QUEUES + queue)]
        if named:
            fence_key = keys.of_name(keys.JOB_FENCES, job.name)
            fence = await self._store.get(fence_key)
            job.epoch = int(fence.value) if fence else 0
            when.append(Unchanged(fence) if fence else Absent(fence_key))
        value = job.SerializeToString(deterministic=True)
        try:
            revision = await commit_once(self._store, Put(key, value), when=when, key=key)
        except ConditionFailed:
            existing = await self._store.get(key)
            if existing is None:
                raise await self._why_not(queue, job.name) from None
            return self._same(job, existing), existing.revision
        job.etag = f'"{revision}"'
        return job, revision

    def _same(self, job: pb.Job, existing: Entry) -> pb.Job:
        stored = pb.Job.FromString(existing.value)
        if not job.request_fingerprint or stored.request_fingerprint != job.request_fingerprint:
            raise AlreadyExists("job", job.name, "choose another name, or leave it out and one is made")
        stored.etag = f'"{existing.revision}"'
        return stored

    async def _why_not(self, queue: str, name: str) -> Exception:
        if await self._store.get(keys.QUEUES + queue) is None:
            if queue == "default":  # always exists: the first leader of a fresh store is about to make it
                return Unavailable("no scheduler has led yet; try again", reason="NOT_LEADER", retry_after_s=0.2)
            return NotFound("queue", f"queues/{queue}", 'create it, or use "queues/default"')
        return AlreadyExists("job", name, "it is being changed at this moment; try again")

    async def _check_datasets(self, spec: pb.JobSpec) -> None:
        now_s = self._clock.monotonic()
        for i, given in enumerate(spec.datasets):
            name = given if given.startswith("datasets/") else f"datasets/{given}"
            if self._inventory is None or self._datasets.get(name, 0.0) > now_s:
                continue
            try:
                await self._inventory.GetDataset(inventory_pb2.GetDatasetRequest(name=name), timeout=DATASETS_S)
            except NotFound:
                unknown = f"{name!r} is not declared; declare it first, or see: whaleflux datasets"
                raise Invalid(FieldViolation(f"job.spec.datasets[{i}]", unknown)) from None
            if len(self._datasets) >= MOST_KNOWN:
                self._datasets.clear()
            self._datasets[name] = now_s + KNOWN_DATASET_S


def _made_id(request: pb.CreateJobRequest) -> str:
    """A ULID; for a request that may be repeated, a name that the repetition gets too."""
    if not request.request_id:
        return names.ulid()
    digest = hashlib.sha256(f"{request.parent}\0{_submitter()}\0{request.request_id}".encode()).hexdigest()
    return f"r{digest[:25]}"


def _fingerprint(request: pb.CreateJobRequest) -> str:
    if not request.request_id:
        return ""
    content = pb.CreateJobRequest(parent=request.parent, job_id=request.job_id, request_id=request.request_id)
    content.job.spec.CopyFrom(request.job.spec)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()


def _submitter() -> str:
    who = auth.caller()
    return f"{who.role}/{who.name}"
