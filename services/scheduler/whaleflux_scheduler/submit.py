"""Submitting a job: check it, give it a name, store it. One commit, and nothing that waits for the leader."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from whaleflux import fingerprint, names, telemetry
from whaleflux.clock import Clock
from whaleflux.errors import AlreadyExists, FieldViolation, InvalidArgument, NotFound, Unavailable
from whaleflux.manifests.job_spec import spec_of
from whaleflux.reasons import ErrorReason
from whaleflux.rpc import auth, changes, roles
from whaleflux.rpc.etags import check_etag
from whaleflux.store import keys
from whaleflux.store.api import Absent, Condition, ConditionFailed, Entry, Present, Put, Store, Unchanged
from whaleflux.store.once import commit_once
from whaleflux.trust import ownership
from whaleflux.trust.ownership import Access
from whaleflux.trust.sight import Sight
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1.inventory_pb2_grpc import InventoryServiceStub
from whaleflux_scheduler import convert
from whaleflux_scheduler.core import dependencies
from whaleflux_scheduler.core.model import Awaited, Job, When
from whaleflux_scheduler.core.validate import check_spec
from whaleflux_scheduler.job_access import JobAccess, queue_not_there
from whaleflux_scheduler.job_secrets import JobSecrets
from whaleflux_scheduler.jobs import check_deletable
from whaleflux_scheduler.reservation_use import check_use

DATASETS_S = 2.0  # deadline for asking inventory about one dataset
KNOWN_DATASET_S, KNOWN_MEMBERS_S = 60.0, 1.0  # of one that is for all, and of one that is for some
MOST_KNOWN = 1_000
MOST_AWAITED = 2_000  # jobs whose end one waits for
MOST_SAID = 20  # mistakes in dependencies; more would only repeat them
PASSING_TRIES, PASSING_PAUSE_S = 25, 0.2  # five seconds: a fresh fleet has its first leader in one or two


class Submissions:
    """Makes jobs. `inventory` None: names of datasets are not checked."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        inventory: InventoryServiceStub | None,
        access: JobAccess,
        secrets: JobSecrets,
    ) -> None:
        self._store, self._clock, self._inventory = store, clock, inventory
        self._access, self._secrets = access, secrets
        self._datasets: dict[str, _Dataset] = {}

    async def draft(self, request: pb.CreateJobRequest) -> pb.Job:
        """The job as it would be stored. Raises InvalidArgument with every wrong field, NotFound for a queue that is not there.

        What is not there for the caller is not there at all, in its dependencies and datasets too.
        """
        queue = names.split(request.parent, "queues", field="parent")[0]
        job_id = check_job_id(request.job_id) if request.job_id else names.ulid()
        if not request.job.HasField("spec"):
            raise InvalidArgument(FieldViolation("job.spec", "is not set; say what to run and on how many GPUs"))
        now = self._clock.now()
        check_spec(spec_of(request.job.spec), request.job.spec.ByteSize(), now)
        _check_member(request.job.spec, job_id)
        owner = _owner(request)
        await self._access.check_use(queue, request.job.spec.priority)
        if request.job.spec.reservation:
            await check_use(self._store, self._access, request.job.spec.reservation, queue)
        if request.job.spec.datasets:
            await self._check_datasets(request.job.spec)
        job = pb.Job(
            name=names.job(queue, job_id),
            state=pb.JOB_STATE_QUEUED,
            step=-1,
            traceparent=telemetry.current_traceparent(),
            submitter=owner,
            request_fingerprint=fingerprint.of_request(request),
            request_key="" if request.job_id else _request_key(request),
            uid=names.ulid() if request.job_id else job_id,
        )
        job.spec.CopyFrom(request.job.spec)
        job.spec.datasets[:] = map(names.dataset, request.job.spec.datasets)  # agents ask for them by these
        job.spec.datasets_by_rank[:] = map(names.dataset, request.job.spec.datasets_by_rank)
        job.cause.actor = changes.actor()
        await self._secrets.admit(job.spec, request.parent, owner, auth.principal())
        if request.on_behalf_of:
            job.spec.priority = self._access.highest_of(queue, owner, job.spec.priority)
        if request.validate_only and request.replaces:
            await self._check_replaced(job.name, request.replaces)
        convert.set_time(job.create_time, now)
        job.state_time.CopyFrom(job.create_time)
        await self._await_others(job, frozenset(request.submitted_before) if request.validate_only else frozenset())
        return job

    async def _await_others(self, job: pb.Job, before: frozenset[str]) -> None:
        """Notes which jobs it waits for, as they are now. Raises InvalidArgument for those that are unknown or ended otherwise.

        Those that come `before` it are not looked up: whatever has their names now may be replaced. A name may be an array's.
        """
        wrong, sight = list[FieldViolation](), self._access.sight()
        arrays = {name.rpartition("-")[0] for name in before}
        for i, asked in enumerate(job.spec.depends_on):
            name, at = names.job_of_reference(asked.job, names.top(job.name)), f"job.spec.depends_on[{i}]"
            if name in before or name in arrays:
                job.awaits.add(job=name, when=asked.when or pb.DEPENDENCY_CONDITION_SUCCEEDED)
                continue
            found = await self._jobs_called(name, sight)
            if not found:
                unknown = f"there is no job {name}; submit it first, or in the same command; see: whaleflux jobs -a"
                wrong.append(FieldViolation(f"{at}.job", unknown))
            for one in found:
                awaited = Awaited(one.name, one.uid, When(asked.when) or When.SUCCEEDED)
                if broken := dependencies.never((awaited,), {one.uid: one.state} if one.readable else {}):
                    wrong.append(FieldViolation(f"{at}.when", f"{broken[1]}; that can never be: leave it out"))
                job.awaits.add(job=awaited.job, uid=awaited.uid, when=awaited.when.value)
            if len(job.awaits) > MOST_AWAITED:
                break
        if len(job.awaits) > MOST_AWAITED:
            many = f"names more than {MOST_AWAITED} jobs with the members of arrays; wait for a job that waits for them"
            wrong.append(FieldViolation("job.spec.depends_on", many))
        if wrong:
            raise InvalidArgument(wrong[:MOST_SAID])

    async def _jobs_called(self, name: str, sight: Sight) -> list[Job]:
        """The job of that name, or the members of the array of that name; none when there is neither, or not for the caller."""
        key = keys.of_name(keys.JOBS, name)
        if (entry := await self._store.get(key)) is not None:
            found = [convert.read_job(entry)]
        else:
            listed = await self._store.list(key + "-", limit=MOST_AWAITED * 2)
            members = (convert.read_job(entry) for entry in listed.entries)
            found = [one for one in members if one.message.spec.array.name == names.last(name)]
        return [one.value for one in found if not self._access.hides(one, sight)]

    async def store(self, job: pb.Job, *, named: bool, replaces: str = "") -> tuple[pb.Job, int]:
        """Stores it; returns it as stored (an earlier one for a repeated request) and the revision. Waits for what passes by itself."""
        for _ in range(PASSING_TRIES):
            try:
                return await self._store_once(job, named=named, replaces=replaces)
            except _Passing as passing:
                said = passing.said
            await self._clock.sleep(PASSING_PAUSE_S)
        raise said

    async def _store_once(self, job: pb.Job, *, named: bool, replaces: str) -> tuple[pb.Job, int]:
        """A user's own name may have been used before: its epochs go on where they ended, since agents refuse lower ones.

        `replaces`: the etag of an ended job of that name, whose record it overwrites. Raises _Passing where another try may go through.
        """
        key = keys.of_name(keys.JOBS, job.name)
        queue = names.top(job.name)
        place = await self._place_of(key, job, replaces) if replaces and named else Absent(key)
        when: list[Condition] = [place, Present(keys.QUEUES + queue)]
        if named:
            fence_key = keys.of_name(keys.JOB_FENCES, job.name)
            fence = await self._store.get(fence_key)
            job.epoch = int(fence.value) if fence else 0
            when.append(Unchanged(fence) if fence else Absent(fence_key))
        writes = [Put(key, job.SerializeToString(deterministic=True))]
        if job.request_key:
            request_key = keys.JOB_REQUESTS + job.request_key
            writes.append(Put(request_key, job.name.encode()))
            when.append(Absent(request_key))
        try:
            revision = await commit_once(self._store, *writes, when=when, key=key)
        except ConditionFailed:
            existing = await self._existing(job)
            if existing is None:
                raise await self._why_not(queue, job.name) from None
            return self._same(job, existing), existing.revision
        job.etag = f'"{revision}"'
        return job, revision

    async def _place_of(self, key: str, job: pb.Job, etag: str) -> Condition:
        """What has to hold while it takes the place of an ended job. Raises FailedPrecondition, Aborted where that may not be."""
        old = await self._store.get(key)
        if old is None:
            return Absent(key)
        stored = convert.read_job(old)
        if job.request_fingerprint and stored.message.request_fingerprint == job.request_fingerprint:
            return Absent(key)  # an earlier delivery of this request has done it
        self._access.check_change(stored, self._access.sight())
        check_etag(etag, old)
        check_deletable(stored)
        return Unchanged(old)

    async def _check_replaced(self, name: str, etag: str) -> None:
        """Raises PermissionDenied and Aborted for a job whose place the caller may not take; that it has to have ended is asked when one does."""
        old = await self._store.get(keys.of_name(keys.JOBS, name))
        if old is not None:
            self._access.check_change(convert.read_job(old), self._access.sight())
            check_etag(etag, old)

    async def _existing(self, job: pb.Job) -> Entry | None:
        """The job of that name, or the one that an earlier delivery of the same request made."""
        if not job.request_key:
            return await self._store.get(keys.of_name(keys.JOBS, job.name))
        made = await self._store.get(keys.JOB_REQUESTS + job.request_key)
        return await self._store.get(keys.of_name(keys.JOBS, made.value.decode())) if made is not None else None

    def _same(self, job: pb.Job, existing: Entry) -> pb.Job:
        known = convert.read_job(existing)
        ours = known.message.uid == job.uid  # the answer was lost, and by now it may have been placed
        asked, told = (
            (job.request_fingerprint, job.submitter),
            (known.message.request_fingerprint, known.message.submitter),
        )
        same = ours or (job.request_fingerprint and asked == told)
        if not same:
            theirs = self._access.sight().changes(known.value.queue, known.message.submitter)
            replace = "take its place with: whaleflux submit --replace, or " if theirs else ""
            advice = f"{replace}choose another name, or leave it out and one is made"
            raise AlreadyExists("job", job.name, advice)
        stored = pb.Job()
        stored.CopyFrom(known.message)
        stored.etag = f'"{existing.revision}"'
        return stored

    async def _why_not(self, queue: str, name: str) -> Exception:
        if await self._store.get(keys.QUEUES + queue) is None:
            if (
                names.queue(queue) == names.DEFAULT_QUEUE
            ):  # always exists: the first leader of a fresh store is about to make it
                no_leader = "no scheduler has led yet; try again"
                return _Passing(Unavailable(no_leader, reason=ErrorReason.NOT_LEADER, retry_after_s=0.2))
            return queue_not_there(queue)
        changing = f"{name} or {names.queue(queue)} was changed at that moment; try again"
        return _Passing(Unavailable(changing, reason=ErrorReason.CACHE_BEHIND, retry_after_s=0.2))

    async def _check_datasets(self, spec: pb.JobSpec) -> None:
        """Raises InvalidArgument for the first that is not there, or not for the caller."""
        who = auth.principal()
        for i, given in enumerate(spec.datasets):
            name = names.dataset(given)
            if self._inventory is None:
                continue
            known = await self._dataset(self._inventory, name)
            if known is None or not (ownership.may_see(who, known.access) or ownership.is_owner(who, known.owner)):
                unknown = (
                    f"{name!r} is not declared; declare it with: whaleflux datasets add {names.last(name)} --source PATH, "
                    "or use one of: whaleflux datasets ls"
                )
                raise InvalidArgument(FieldViolation(f"job.spec.datasets[{i}]", unknown))

    async def who_may_use(self, dataset: str) -> tuple[str, Access] | None:
        """Its owner, and whom it is for; None: it is not declared, or there is nobody to ask."""
        known = await self._dataset(self._inventory, dataset) if self._inventory is not None else None
        return None if known is None else (known.owner, known.access)

    async def _dataset(self, inventory: InventoryServiceStub, name: str) -> _Dataset | None:
        """Who may use it; None: it is not declared. One that is for some is asked for again after a second."""
        now_s, known = self._clock.monotonic(), self._datasets.get(name)
        if known is not None and known.until_s > now_s:
            return known
        try:
            found = await inventory.GetDataset(inventory_pb2.GetDatasetRequest(name=name), timeout=DATASETS_S)
        except NotFound:
            return None
        if len(self._datasets) >= MOST_KNOWN:
            self._datasets.clear()
        known_s = KNOWN_MEMBERS_S if found.members else KNOWN_DATASET_S
        known = self._datasets[name] = _Dataset(now_s + known_s, found.owner, Access(frozenset(found.members)))
        return known


@dataclass(frozen=True, slots=True)
class _Dataset:
    """Whose a dataset is and whom it is for, until then (monotonic)."""

    until_s: float
    owner: str
    access: Access


class _Passing(Exception):
    """What was in the way is gone by now, or about to be; `said` when it stays."""

    def __init__(self, said: Unavailable) -> None:
        super().__init__(said.message)
        self.said = said


def check_job_id(job_id: str) -> str:
    """An id that a user gives: any but those that are made, so that a made name never comes again."""
    if names.is_made(names.check_id("job_id", job_id)):
        reserved = f"{job_id!r} has the form of the ids that are made for jobs without a name and for Ray clusters; choose another, or leave it out"
        raise InvalidArgument(FieldViolation("job_id", reserved))
    return job_id


def _check_member(spec: pb.JobSpec, job_id: str) -> None:
    """A member of an array is called after it: so nobody's jobs count as members of another array of that name."""
    if spec.array.name and job_id != (called := f"{spec.array.name}-{spec.array.index}"):
        raise InvalidArgument(FieldViolation("job_id", f"member {spec.array.index} of an array is called {called!r}"))


def _request_key(request: pb.CreateJobRequest) -> str:
    """The same for each delivery of one request, "" for requests that cannot be repeated."""
    if not request.request_id:
        return ""
    return hashlib.sha256(f"{request.parent}\0{_submitter()}\0{request.request_id}".encode()).hexdigest()


def _submitter() -> str:
    return auth.caller().subject


def _owner(request: pb.CreateJobRequest) -> str:
    """Whose job it is to be. Raises InvalidArgument where somebody names another who may not."""
    if not request.on_behalf_of:
        return _submitter()
    role, _, name = request.on_behalf_of.partition("/")
    if auth.caller().role != roles.INFERENCE_ROUTER:
        raise InvalidArgument(FieldViolation("on_behalf_of", "is for the inference router to say; leave it out"))
    if role not in roles.HUMANS or not name:
        raise InvalidArgument(
            FieldViolation("on_behalf_of", f"{request.on_behalf_of[:80]!r} is not role/name of somebody")
        )
    return request.on_behalf_of
