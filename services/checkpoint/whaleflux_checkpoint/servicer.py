"""CheckpointService over the store. Bytes never pass through here; manifests do.

Each report of pieces is a record of its own, so that the agents of a large job do not contend. The transaction that
commits compares the job's fence: an attempt that is over cannot commit, whatever its clocks and caches say.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from whaleflux import names, telemetry
from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import Conflict, FieldViolation, Invalid, NotFound
from whaleflux.rpc.paging import list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import Absent, ConditionFailed, Delete, Entry, Equals, Put, Store, Unchanged
from whaleflux.telemetry import Metric
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1 import checkpoint_pb2_grpc as rpc
from whaleflux_checkpoint import convert
from whaleflux_checkpoint.core import lifecycle
from whaleflux_checkpoint.core.lifecycle import State

MAX_PIECES_PER_REPORT = 4096
_RACES = 20  # compare-and-swaps that may be lost in a row before the caller has to try again
_Context = grpc.aio.ServicerContext[object, object]


class Checkpoints(rpc.CheckpointServiceServicer):
    """See the module."""

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        self._store, self._clock = store, clock or SystemClock()

    async def BeginCheckpoint(self, request: pb.BeginCheckpointRequest, context: _Context | None) -> pb.Checkpoint:
        lifecycle.check_begin(
            request.step, request.epoch, request.world_size, request.location, request.data_position, request.keep
        )
        fence = Equals(convert.fence_key(request.job), str(request.epoch).encode())
        name = f"{request.job}/checkpoints/{lifecycle.checkpoint_id(request.step, request.epoch)}"
        key = convert.checkpoint_key(name)
        made = pb.Checkpoint(
            name=name,
            epoch=request.epoch,
            step=request.step,
            world_size=request.world_size,
            layout=request.layout,
            state=pb.CHECKPOINT_STATE_WRITING,
            location=request.location,
            data_position=request.data_position,
            keep=request.keep or lifecycle.DEFAULT_KEEP,
            traceparent=telemetry.current_traceparent(),
        )
        made.create_time.FromDatetime(self._clock.now())
        try:
            await self._store.commit(Put(key, convert.encode(made)), when=[Absent(key), fence])
        except ConditionFailed as lost:
            self._refuse_if_fenced(lost, request.job, request.epoch)
        return convert.decode(await self._existing(key, name))

    async def ReportPieces(self, request: pb.ReportPiecesRequest, context: _Context | None) -> pb.ReportPiecesResponse:
        key = convert.checkpoint_key(request.checkpoint)
        entry = await self._existing(key, request.checkpoint)
        known = convert.decode(entry)
        _check_report(request, known)
        if convert.state_of(known) is State.WRITING:
            await self._store_report(request, known)
            known = await self._commit_if_complete(request.checkpoint)
        return pb.ReportPiecesResponse(checkpoint=known, deletable=await self._deletable(known))

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: _Context | None) -> pb.Checkpoint:
        entry = await self._existing(convert.checkpoint_key(request.name), request.name)
        return await self._whole(entry)

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: _Context | None
    ) -> pb.ListCheckpointsResponse:
        page = await list_page(
            self._store,
            keys.CHECKPOINTS,
            convert.decode,
            size=page_size(request.page_size),
            token=request.page_token,
            scope=_scope(request.parent),
        )
        newest_first = sorted(page.items, key=lambda c: (convert.job_of(c.name), -c.step, -c.epoch))
        return pb.ListCheckpointsResponse(checkpoints=newest_first, next_page_token=page.next_page_token)

    async def FindRestorable(self, request: pb.FindRestorableRequest, context: _Context | None) -> pb.Checkpoint:
        names.split(request.job, "queues", "jobs", field="job")
        entries = {e.key: e for e in await self._of_job(request.job)}
        found = lifecycle.newest_restorable(
            (convert.saved_of(convert.decode(e)) for e in entries.values()), request.layout
        )
        if found is None:
            raise NotFound(
                "checkpoint", f"{request.job}/checkpoints/-", "nothing was committed yet; start from the beginning"
            )
        return await self._whole(entries[convert.checkpoint_key(found.name)])

    async def ConfirmDeleted(
        self, request: pb.ConfirmDeletedRequest, context: _Context | None
    ) -> pb.ConfirmDeletedResponse:
        for name in request.names:
            entry = await self._store.get(convert.checkpoint_key(name))
            if entry and convert.state_of(convert.decode(entry)) in lifecycle.DELETABLE:
                await self._forget(name, entry)
        return pb.ConfirmDeletedResponse()

    async def MarkLost(self, request: pb.MarkLostRequest, context: _Context | None) -> pb.Checkpoint:
        key = convert.checkpoint_key(request.name)
        entry = await self._existing(key, request.name)
        known = convert.decode(entry)
        if convert.state_of(known) is not State.LOST:
            lifecycle.check_step_to(convert.saved_of(known), State.LOST)
            await self._move(entry, State.LOST, request.message[:1000])
        return convert.decode(await self._existing(key, request.name))

    async def _store_report(self, request: pb.ReportPiecesRequest, known: pb.Checkpoint) -> None:
        report = pb.ReportedPieces(complete_ranks=request.complete_ranks, pieces=request.pieces)
        key = f"{convert.pieces_prefix(known.name)}{min(request.complete_ranks):06d}"
        fence = Equals(convert.fence_key(convert.job_of(known.name)), str(request.epoch).encode())
        try:
            await self._store.commit(Put(key, report.SerializeToString()), when=[fence])
        except ConditionFailed as lost:
            self._refuse_if_fenced(lost, convert.job_of(known.name), request.epoch)

    async def _commit_if_complete(self, name: str) -> pb.Checkpoint:
        key = convert.checkpoint_key(name)
        for _ in range(_RACES):
            entry = await self._existing(key, name)
            known = await self._whole(entry)
            complete = await self._complete_ranks(name)
            if convert.state_of(known) is not State.WRITING or not lifecycle.is_complete(known.world_size, complete):
                return known
            known.state = pb.CHECKPOINT_STATE_COMMITTED
            known.commit_time.FromDatetime(self._clock.now())
            fence = Equals(convert.fence_key(convert.job_of(name)), str(known.epoch).encode())
            try:
                await self._store.commit(Put(key, convert.encode(known)), when=[Unchanged(entry), fence])
            except ConditionFailed as lost:
                self._refuse_if_fenced(lost, convert.job_of(name), known.epoch)
                continue  # another report committed it first: look again
            telemetry.counter(Metric.CHECKPOINT_COMMITS).labels("committed").inc()
            await self._retain(known)
            return known
        raise Conflict(f"{name} changes too fast; report again", retry_after_s=1.0)

    async def _retain(self, committed: pb.Checkpoint) -> None:
        """Expires what is beyond the job's `keep`. Losing a race here is no harm: the next commit does it."""
        entries = {e.key: e for e in await self._of_job(convert.job_of(committed.name))}
        saved = [convert.saved_of(convert.decode(e)) for e in entries.values()]
        plan = lifecycle.retain(saved, convert.saved_of(committed))
        for old, state in [(s, State.EXPIRED) for s in plan.expire] + [(s, State.ABANDONED) for s in plan.abandon]:
            try:
                await self._move(entries[convert.checkpoint_key(old.name)], state, f"replaced by {committed.name}")
            except ConditionFailed:
                continue

    async def _move(self, entry: Entry, state: State, message: str) -> None:
        changed = convert.decode(entry)
        changed.state, changed.message = convert.state_number(state), message
        await self._store.commit(Put(entry.key, convert.encode(changed)), when=[Unchanged(entry)])

    async def _deletable(self, known: pb.Checkpoint) -> list[pb.Checkpoint]:
        of_job = [convert.decode(e) for e in await self._of_job(convert.job_of(known.name))]
        return [c for c in of_job if convert.state_of(c) in lifecycle.DELETABLE]

    async def _forget(self, name: str, entry: Entry) -> None:
        reports = (await self._store.list(convert.pieces_prefix(name))).entries
        for start in range(0, len(reports), 100):  # a transaction has at most 128 operations
            await self._store.commit(*(Delete(e.key) for e in reports[start : start + 100]))
        await self._store.commit(Delete(entry.key), when=[Unchanged(entry)])

    async def _of_job(self, job: str) -> Sequence[Entry]:
        return (await self._store.list(_scope(job))).entries

    async def _complete_ranks(self, name: str) -> set[int]:
        return convert.add_reports(pb.Checkpoint(), (await self._store.list(convert.pieces_prefix(name))).entries)

    async def _whole(self, entry: Entry) -> pb.Checkpoint:
        message = convert.decode(entry)
        convert.add_reports(message, (await self._store.list(convert.pieces_prefix(message.name))).entries)
        return message

    async def _existing(self, key: str, name: str) -> Entry:
        entry = await self._store.get(key)
        if entry is None:
            raise NotFound("checkpoint", name, "list what exists with: whaleflux checkpoints")
        return entry

    @staticmethod
    def _refuse_if_fenced(lost: ConditionFailed, job: str, epoch: int) -> None:
        if any(isinstance(condition, Equals) for condition in lost.failed):
            telemetry.counter(Metric.CHECKPOINT_COMMITS).labels("fenced").inc()
            raise Conflict(
                f"epoch {epoch} of {job} is over; a newer attempt runs, this one must stop",
                reason="EPOCH_FENCED",
                metadata={"job": job, "epoch": str(epoch)},
            ) from lost


def _scope(parent: str) -> str:
    """The key prefix of a parent: a job, or all jobs of a queue or of all queues ("-")."""
    if parent in {"", "queues/-", "queues/-/jobs/-"}:
        return keys.CHECKPOINTS
    queue, job = names.split(parent.replace("/jobs/-", "/jobs/0"), "queues", "jobs", field="parent")
    return f"{keys.CHECKPOINTS}{queue}/" + ("" if parent.endswith("/jobs/-") else f"{job}/")


def _check_report(request: pb.ReportPiecesRequest, known: pb.Checkpoint) -> None:
    bad = []
    if request.epoch != known.epoch:
        bad.append(FieldViolation("epoch", f"is {request.epoch}, the checkpoint is of epoch {known.epoch}"))
    ranks = set(request.complete_ranks)
    if not ranks or not ranks <= set(range(known.world_size)):
        bad.append(FieldViolation("complete_ranks", f"must name at least one rank, each 0 to {known.world_size - 1}"))
    if len(request.pieces) > MAX_PIECES_PER_REPORT:
        bad.append(
            FieldViolation(
                "pieces", f"has {len(request.pieces)}, at most {MAX_PIECES_PER_REPORT}; report fewer ranks at a time"
            )
        )
    for index, piece in enumerate(request.pieces):
        path = piece.path
        if piece.rank not in ranks:
            bad.append(FieldViolation(f"pieces[{index}].rank", "is not among complete_ranks"))
        if not path or path.startswith("/") or ".." in path.split("/") or len(path) > 1024:
            bad.append(
                FieldViolation(
                    f"pieces[{index}].path", "must be a path below the location, at most 1024 characters, without '..'"
                )
            )
        if piece.size_bytes < 0 or not piece.checksum or len(piece.checksum) > 256:
            bad.append(
                FieldViolation(
                    f"pieces[{index}]", "needs a size of 0 or more bytes and a checksum of at most 256 characters"
                )
            )
    if bad:
        raise Invalid(bad[:20])
