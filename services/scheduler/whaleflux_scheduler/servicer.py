"""SchedulerService: thin. Any replica reads and takes jobs; what only the leader knows is refused elsewhere with NOT_LEADER."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc
from google.protobuf import empty_pb2

from whaleflux import names
from whaleflux.clock import Clock
from whaleflux.errors import FailedPrecondition, FieldViolation, InvalidArgument
from whaleflux.manifests.job_spec import spec_of
from whaleflux.rpc import changes
from whaleflux.rpc.etags import check_etag, etag_of
from whaleflux.rpc.watching import fill, watch_resources
from whaleflux.store import keys
from whaleflux.store.api import ConditionFailed, Store
from whaleflux.trust import ownership
from whaleflux.trust.sight import Sight
from whaleflux.trust.watched import Watched
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux.v1 import scheduler_pb2_grpc as rpc
from whaleflux_scheduler import allocations, convert, decision_records, job_privacy, logs
from whaleflux_scheduler.attach import AttachBroker, opening
from whaleflux_scheduler.code_transfer import CodeTransfer
from whaleflux_scheduler.convert import StoredJob
from whaleflux_scheduler.core.model import JobState
from whaleflux_scheduler.fleet_sites import FleetSites
from whaleflux_scheduler.job_history import JobHistory
from whaleflux_scheduler.job_verbs import RACES, JobVerbs, contended
from whaleflux_scheduler.job_view import present_stored
from whaleflux_scheduler.jobs import Jobs, check_deletable, deletion, job_key
from whaleflux_scheduler.leader_session import LeaderSession, Leading
from whaleflux_scheduler.queues import Queues, queue_message
from whaleflux_scheduler.ray_book import RayBook
from whaleflux_scheduler.ray_plans import RayPlans
from whaleflux_scheduler.reservation_book import ReservationBook
from whaleflux_scheduler.serving_plans import ServingPlans
from whaleflux_scheduler.submit import Submissions
from whaleflux_scheduler.training_plans import TrainingPlans

_Context = grpc.aio.ServicerContext[object, object]


class Scheduler(rpc.SchedulerServiceServicer):
    """See the module."""

    def __init__(
        self,
        store: Store,
        jobs: Jobs,
        submissions: Submissions,
        leader: LeaderSession,
        broker: logs.LogBroker,
        attaching: AttachBroker,
        code: CodeTransfer,
        clock: Clock,
        history: JobHistory,
        plans: RayPlans,
        trainings: TrainingPlans,
        servings: ServingPlans,
        sites: FleetSites,
    ) -> None:
        self._history, self._plans, self._trainings, self._servings = history, plans, trainings, servings
        self._store, self._jobs, self._submissions, self._code = store, jobs, submissions, code
        self._leader, self._broker, self._clock = leader, broker, clock
        self._verbs, self._queues = JobVerbs(store, jobs, clock), Queues(store, jobs, clock)
        self._attaching, self._access = attaching, jobs.access
        self._reservations = ReservationBook(store, jobs.access, clock)
        self._ray = RayBook(store, jobs.access, clock, self._ray_status, sites)

    # queues

    async def CreateQueue(self, request: pb.CreateQueueRequest, context: _Context | None) -> pb.Queue:
        return await self._queues.create(request)

    async def GetQueue(self, request: pb.GetQueueRequest, context: _Context | None) -> pb.Queue:
        found = queue_message(await self._queues.seen(request.name, self._access.sight()))
        await self._show_use([found])
        return found

    async def ListQueues(self, request: pb.ListQueuesRequest, context: _Context | None) -> pb.ListQueuesResponse:
        sight = self._listing()
        page = await self._queues.page(request, sight)
        await self._show_use(page.items)
        unreadable = [name for name in page.unreadable if sight.sees_queue(names.last(name))]
        return pb.ListQueuesResponse(queues=page.items, next_page_token=page.next_page_token, unreadable=unreadable)

    async def _show_use(self, queues: Sequence[pb.Queue]) -> None:
        """What only the leader counts."""
        leading = self._leader.current
        uses = await leading.view.queue_use([names.last(queue.name) for queue in queues]) if leading is not None else {}
        for queue in queues:
            if (use := uses.get(names.last(queue.name))) is not None:
                stuck = use.stuck if self._access.sight().everything else ()
                queue.use.CopyFrom(
                    pb.QueueUse(
                        held_gpus=use.held,
                        borrowed_gpus=use.over,
                        fair_share_gpus=use.score,
                        stuck_jobs=stuck,
                        held_data_bytes=use.data_bytes,
                    )
                )

    async def UpdateQueue(self, request: pb.UpdateQueueRequest, context: _Context | None) -> pb.Queue:
        queue = await self._queues.update(request)
        await self._access.knows_queues(int(queue.etag.strip('"')))  # so that who asks next is told what follows
        return queue

    async def DeleteQueue(self, request: pb.DeleteQueueRequest, context: _Context | None) -> empty_pb2.Empty:
        await self._queues.delete(request)
        return empty_pb2.Empty()

    # jobs

    async def CreateJob(self, request: pb.CreateJobRequest, context: _Context | None) -> pb.Job:
        job = await self._submissions.draft(request)
        leading = await self._leader.leading() if request.validate_only else self._leader.current
        rented = ""
        if (
            leading is not None and not request.wait_for_capacity
        ):  # a follower does not know the fleet: what it takes waits
            rented = await _held_or_rented(leading, job)
        if request.validate_only and leading is not None:
            decision = await leading.view.dry_run(convert.job_of(job))
            job.decision.CopyFrom(
                job_privacy.shown_decision(convert.decision_message(decision), self._access.sight(), job.name)
            )
            _say(job, rented)
            return job
        if job.spec.code:
            await self._code.hold(job.spec.code)
        stored, revision = await self._submissions.store(job, named=bool(request.job_id), replaces=request.replaces)
        self._jobs.wrote(revision)
        _say(stored, rented)
        return stored

    async def GetCode(self, request: pb.GetCodeRequest, context: _Context | None) -> pb.Code:
        return await self._code.get(request.digest)

    async def UploadCode(self, requests: AsyncIterator[pb.UploadCodeRequest], context: _Context | None) -> pb.Code:
        return await self._code.upload(requests)

    async def DownloadCode(
        self, request: pb.DownloadCodeRequest, context: _Context | None
    ) -> AsyncIterator[pb.DownloadCodeResponse]:
        async with contextlib.aclosing(self._code.download(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def GetJob(self, request: pb.GetJobRequest, context: _Context | None) -> pb.Job:
        sight = self._access.sight()
        return self._present(await self._jobs.get(request.name, sight), sight)

    async def ListJobs(self, request: pb.ListJobsRequest, context: _Context | None) -> pb.ListJobsResponse:
        sight = self._listing()
        page, token = await self._jobs.page(request, sight)
        revision, shown = self._jobs.cache.revision, (self._present(stored, sight) for stored in page)
        return pb.ListJobsResponse(jobs=shown, next_page_token=token, resource_version=revision)

    async def WatchJobs(
        self, request: pb.WatchJobsRequest, context: _Context | None
    ) -> AsyncIterator[pb.WatchJobsResponse]:
        only, sight = job_key(request.name) if request.name else "", self._listing()
        changes = watch_resources(
            self._store, only or keys.JOBS, request.resource_version, self._jobs.decode, clock=self._clock
        )
        seen = Watched(sight, self._clock, self._access.watch_rules(sight))
        async with contextlib.aclosing(changes):
            async for change in changes:
                if only and change.key not in ("", only):  # another job whose name begins with this one's
                    continue
                if (told := seen.as_told(change)) is not None:
                    shown = None if told.value is None else self._present(told.value, sight)
                    yield fill(pb.WatchJobsResponse(), told, shown)

    async def ListJobHistory(
        self, request: pb.ListJobHistoryRequest, context: _Context | None
    ) -> pb.ListJobHistoryResponse:
        return await self._history.page(request, self._listing())

    async def CancelJob(self, request: pb.CancelJobRequest, context: _Context | None) -> pb.Job:
        return self._present(await self._verbs.cancel(request), self._access.sight())

    async def HoldJob(self, request: pb.HoldJobRequest, context: _Context | None) -> pb.Job:
        return self._present(await self._verbs.hold(request), self._access.sight())

    async def ReleaseJob(self, request: pb.ReleaseJobRequest, context: _Context | None) -> pb.Job:
        return self._present(await self._verbs.release(request), self._access.sight())

    async def RequeueJob(self, request: pb.RequeueJobRequest, context: _Context | None) -> pb.Job:
        return self._present(await self._verbs.requeue(request), self._access.sight())

    async def SetJobPriority(self, request: pb.SetJobPriorityRequest, context: _Context | None) -> pb.Job:
        return self._present(await self._verbs.set_priority(request), self._access.sight())

    async def DeleteJob(self, request: pb.DeleteJobRequest, context: _Context | None) -> empty_pb2.Empty:
        sight = self._access.sight()
        for _ in range(RACES):
            stored = await self._jobs.newest(request.name, sight)
            self._access.check_change(stored, sight)
            check_etag(request.etag, stored.entry)
            check_deletable(stored)
            marked = pb.Job()
            marked.CopyFrom(stored.message)
            marked.last_change.CopyFrom(changes.deletion(self._clock.now()))
            value = convert.JOBS.pack(marked)
            try:
                self._jobs.wrote(await changes.delete(self._store, stored.entry, value, also=deletion(stored)[1:]))
            except ConditionFailed:
                continue
            return empty_pb2.Empty()
        raise contended(request.name)

    async def ExplainJob(self, request: pb.ExplainJobRequest, context: _Context | None) -> pb.ExplainJobResponse:
        sight = self._access.sight()
        stored = await self._jobs.get(request.name, sight)
        response = pb.ExplainJobResponse(job=self._present(stored, sight))
        if request.history:
            told = map(decision_records.message_of, await self._jobs.decisions(stored))
            reads = sight.reads(stored.value.queue, stored.message.submitter)
            response.history.extend(job_privacy.shown_history(told, sight, request.name, reads=reads))
        if stored.value.state in (JobState.QUEUED, JobState.RECOVERING):
            view = (await self._leader.leading()).view
            decision = convert.decision_message(await view.explain(stored.value))
            if not sight.reads(stored.value.queue, stored.message.submitter):
                job_privacy.without_data(decision)
            response.decision.CopyFrom(job_privacy.shown_decision(decision, sight, request.name))
        else:
            response.decision.CopyFrom(response.job.decision)
            if stored.value.spec.is_elastic and stored.value.state is JobState.RUNNING:
                view = (await self._leader.leading()).view
                response.decision.reasons.extend(filter(None, [await view.why_it_stays(stored.value)]))
        return response

    async def StreamLogs(
        self, request: pb.StreamLogsRequest, context: _Context | None
    ) -> AsyncIterator[pb.StreamLogsResponse]:
        await self._leader.leading()
        sight = self._access.sight()
        stored = await self._jobs.get(request.name, sight)
        self._access.check_read(stored, sight)
        async with (
            self._broker.reading(request) as reader,
            contextlib.aclosing(self._jobs.follow(stored)) as states,
        ):
            async with contextlib.aclosing(logs.merged(self._broker, reader, states)) as lines:
                async for line in lines:
                    self._access.check_read(stored, sight)  # the queue may be for others by now
                    yield line

    async def AttachJob(
        self, requests: AsyncIterator[pb.AttachJobRequest], context: _Context | None
    ) -> AsyncIterator[pb.AttachJobResponse]:
        await self._leader.leading()
        opened, sight = await opening(requests), self._access.sight()
        stored = await self._jobs.get(opened.name, sight)
        self._access.check_change(stored, sight)
        sent = self._while_allowed(requests, stored, sight)
        async with contextlib.aclosing(
            self._attaching.serve(stored.value, opened, sent, stored.message.submitter)
        ) as responses:
            async for response in responses:
                self._access.check_change(stored, sight)
                yield response

    async def _while_allowed(
        self, requests: AsyncIterator[pb.AttachJobRequest], stored: StoredJob, sight: Sight
    ) -> AsyncIterator[pb.AttachJobRequest]:
        """What the caller sends, for as long as the job is theirs to enter: its queue may be for others by now."""
        async for request in requests:
            self._access.check_change(stored, sight)
            yield request

    async def ListAllocations(
        self, request: pb.ListAllocationsRequest, context: _Context | None
    ) -> pb.ListAllocationsResponse:
        return await allocations.page(self._jobs, request, self._listing())

    async def PlanRebalance(self, request: pb.PlanRebalanceRequest, context: _Context | None) -> pb.RebalancePlan:
        return await (await self._leader.leading()).rebalances.plan()

    async def PlanBurst(self, request: pb.PlanBurstRequest, context: _Context | None) -> pb.BurstPlan:
        return await (await self._leader.leading()).bursts.plan()

    async def ApplyRebalance(self, request: pb.ApplyRebalanceRequest, context: _Context | None) -> pb.RebalancePlan:
        if not request.etag:
            raise InvalidArgument(FieldViolation("etag", "is empty; give the etag of a plan that PlanRebalance made"))
        rebalances = (await self._leader.leading()).rebalances
        return await (rebalances.check if request.validate_only else rebalances.apply)(request.etag)

    async def PlanRay(self, request: pb.PlanRayRequest, context: _Context | None) -> pb.RayPlan:
        return await self._plans.planned(request, await self._leader.leading())

    async def PlanTraining(self, request: pb.PlanTrainingRequest, context: _Context | None) -> pb.PlanTrainingResponse:
        return await self._trainings.planned(request, await self._leader.leading())

    async def PlanServing(self, request: pb.PlanServingRequest, context: _Context | None) -> pb.PlanServingResponse:
        return await self._servings.planned(request, await self._leader.leading())

    # reservations

    async def CreateReservation(self, request: pb.CreateReservationRequest, context: _Context | None) -> pb.Reservation:
        return await self._reservations.create(request, await self._leader.leading())

    async def GetReservation(self, request: pb.GetReservationRequest, context: _Context | None) -> pb.Reservation:
        return await self._reservations.get(request.name, self._access.sight())

    async def ListReservations(
        self, request: pb.ListReservationsRequest, context: _Context | None
    ) -> pb.ListReservationsResponse:
        page = await self._reservations.page(request, self._listing())
        return pb.ListReservationsResponse(
            reservations=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def UpdateReservation(self, request: pb.UpdateReservationRequest, context: _Context | None) -> pb.Reservation:
        return await self._reservations.update(request, await self._leader.leading())

    async def DeleteReservation(
        self, request: pb.DeleteReservationRequest, context: _Context | None
    ) -> empty_pb2.Empty:
        await self._reservations.delete(request)
        return empty_pb2.Empty()

    # Ray clusters

    async def CreateRayCluster(self, request: pb.CreateRayClusterRequest, context: _Context | None) -> pb.RayCluster:
        return await self._ray.create(request)

    async def GetRayCluster(self, request: pb.GetRayClusterRequest, context: _Context | None) -> pb.RayCluster:
        return await self._ray.get(request.name, self._access.sight())

    async def ListRayClusters(
        self, request: pb.ListRayClustersRequest, context: _Context | None
    ) -> pb.ListRayClustersResponse:
        page = await self._ray.page(request, self._listing())
        return pb.ListRayClustersResponse(
            ray_clusters=page.items, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def UpdateRayCluster(self, request: pb.UpdateRayClusterRequest, context: _Context | None) -> pb.RayCluster:
        return await self._ray.update(request)

    async def DeleteRayCluster(self, request: pb.DeleteRayClusterRequest, context: _Context | None) -> pb.RayCluster:
        return await self._ray.delete(request)

    def _ray_status(self, name: str) -> pb.RayClusterStatus | None:
        """What only the leader knows."""
        leading = self._leader.current
        return leading.ray.status(name) if leading is not None else None

    def _listing(self) -> Sight:
        """The caller's, for what leaves out what it does not see, which may be all there is."""
        ownership.note_asked()
        return self._access.sight()

    def _present(self, stored: StoredJob, sight: Sight) -> pb.Job:
        leading = self._leader.current
        shown = leading.view.present(stored) if leading is not None else present_stored(stored, self._clock)
        shown.etag = etag_of(stored.entry)
        return job_privacy.shown(shown, sight, stored.value.queue)


async def _held_or_rented(leading: Leading, job: pb.Job) -> str:
    """What is rented for a job that the fleet's own nodes could never hold, in words; "" of one that they could. Raises FailedPrecondition."""
    try:
        await leading.view.check_capacity(names.top(job.name), spec_of(job.spec))
    except FailedPrecondition as short:
        return await leading.bursts.admits(convert.job_of(job), short)
    return ""


def _say(job: pb.Job, what: str) -> None:
    """In the answer; the record has what the planner says."""
    if what:
        job.decision.reasons.insert(0, what)
