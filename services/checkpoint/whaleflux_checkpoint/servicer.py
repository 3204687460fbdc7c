"""CheckpointService over the store. Bytes never pass through here; manifests do.

Each report of pieces is a record of its own, so that the agents of a large job do not contend. The transaction that
commits compares the job's fence: an attempt that is over cannot commit, whatever its clocks and caches say.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from whaleflux import names, telemetry
from whaleflux.clock import Clock, SystemClock
from whaleflux.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from whaleflux.manifests.job_fields import DEFAULT_CHECKPOINTS_KEPT
from whaleflux.reasons import ErrorReason
from whaleflux.rpc.paging import list_page, page_size
from whaleflux.store import keys
from whaleflux.store.api import (
    Absent,
    ConditionFailed,
    Delete,
    Entry,
    NoneCreated,
    Present,
    Put,
    Store,
    Unchanged,
)
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.v1 import checkpoint_pb2 as pb
from whaleflux.v1 import checkpoint_pb2_grpc as rpc
from whaleflux_checkpoint import convert, records
from whaleflux_checkpoint.checks import check_names, check_place, check_proof, check_report
from whaleflux_checkpoint.commit import RACES, Commit, fence_of, refuse_if_fenced
from whaleflux_checkpoint.core import state_machine
from whaleflux_checkpoint.core.state_machine import State
from whaleflux_checkpoint.moves import move
from whaleflux_checkpoint.rights import Rights

_DELETABLE_AT_ONCE = 100
_NOTHING_YET = "nothing was committed yet; start from the beginning"
_Context = grpc.aio.ServicerContext[object, object]


class Checkpoints(rpc.CheckpointServiceServicer):
    """See the module."""

    def __init__(
        self, store: Store, clock: Clock | None = None, queue_access: Callable[[str], Access] = lambda _: OPEN
    ) -> None:
        self._store, self._clock = store, clock or SystemClock()
        self._commit, self._rights = Commit(store, self._clock), Rights(store, queue_access)

    async def BeginCheckpoint(self, request: pb.BeginCheckpointRequest, context: _Context | None) -> pb.Checkpoint:
        state_machine.check_begin(
            request.step,
            request.epoch,
            request.serial,
            request.world_size,
            request.location,
            request.data_position,
            request.keep,
        )
        fence = fence_of(request.job, request.epoch)
        placed = await self._rights.check_acts_for(request.job, request.epoch)
        if placed is not None:
            check_place(request, placed)
        name = names.checkpoint(request.job, request.step, request.epoch, request.serial)
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
            keep=request.keep or DEFAULT_CHECKPOINTS_KEPT,
            traceparent=telemetry.current_traceparent(),
            job_uid=request.job_uid,
            serial=request.serial,
            storage=request.storage,
            resharding=request.resharding,
            sites=sorted(placed.sites) if placed is not None else (),
        )
        made.create_time.FromDatetime(self._clock.now())
        try:
            await self._store.commit(Put(key, convert.encode(made)), when=[Absent(key), fence])
        except ConditionFailed as lost:
            refuse_if_fenced(lost, request.job, request.epoch)
        begun = convert.decode(await records.existing(self._store, key, name))
        if convert.state_of(begun) is not State.WRITING:
            raise AlreadyExists("checkpoint", name, "it is never written again; save with another serial")
        return begun

    async def ReportPieces(self, request: pb.ReportPiecesRequest, context: _Context | None) -> pb.ReportPiecesResponse:
        key = convert.checkpoint_key(request.checkpoint)
        placed = await self._rights.check_acts_for(convert.job_of(request.checkpoint), request.epoch)
        entry = await records.existing(self._store, key, request.checkpoint)
        known = convert.decode(entry)
        self._rights.check_own(known, placed)
        check_report(request, known)
        if convert.state_of(known) is State.WRITING:
            await self._store_report(request, known)
            known = await self._commit.if_complete(request.checkpoint)
        return pb.ReportPiecesResponse(checkpoint=known, deletable=await self._deletable(known))

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: _Context | None) -> pb.Checkpoint:
        key = convert.checkpoint_key(request.name)
        placed = await self._rights.check_reads(convert.job_of(request.name), "checkpoint", request.name)
        entry = await records.existing(self._store, key, request.name)
        self._rights.check_own(convert.decode(entry), placed)
        return await records.whole(self._store, entry)

    async def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, context: _Context | None
    ) -> pb.ListCheckpointsResponse:
        scope = records.scope(request.parent)
        shown = await self._rights.lists(request.parent)
        page = await list_page(
            self._store,
            keys.CHECKPOINTS,
            convert.decode,
            size=page_size(request.page_size),
            token=request.page_token,
            scope=scope,
            keep=shown,
        )
        newest_first = sorted(page.items, key=lambda c: (convert.job_of(c.name), -c.step, -c.epoch))
        return pb.ListCheckpointsResponse(
            checkpoints=newest_first, next_page_token=page.next_page_token, unreadable=page.unreadable
        )

    async def FindRestorable(self, request: pb.FindRestorableRequest, context: _Context | None) -> pb.Checkpoint:
        names.split(request.job, "queues", "jobs", field="job")
        none = f"{request.job}/checkpoints/-"
        placed = await self._rights.check_reads(request.job, "checkpoint", none, _NOTHING_YET)
        job_uid = placed.job_uid if placed is not None else request.job_uid
        known = await records.of_job(self._store, request.job)
        entries = {entry.key: entry for entry, _ in known.values}
        saved = [convert.saved_of(one) for _, one in known.values]
        found = state_machine.newest_restorable(saved, job_uid=job_uid, exclude=frozenset(request.exclude))
        if found is None and (known.unreadable or any(one.state is State.UNKNOWN for one in saved)):
            raise FailedPrecondition(
                f"{request.job} has checkpoints of a newer version, or damaged records, and no others; update the checkpoint service",
                reason=ErrorReason.RECORD_UNREADABLE,
            )
        if found is None:
            raise NotFound("checkpoint", none, _NOTHING_YET)
        return await records.whole(self._store, entries[convert.checkpoint_key(found.name)])

    async def ListDeletable(
        self, request: pb.ListDeletableRequest, context: _Context | None
    ) -> pb.ListDeletableResponse:
        may_delete = self._rights.deletes()
        page = await list_page(
            self._store,
            keys.CHECKPOINTS_DELETABLE,
            convert.marked,
            size=page_size(request.page_size),
            token=request.page_token,
            keep=lambda mark: may_delete(mark[1]),
        )
        entries = [await self._store.get(convert.checkpoint_key(name)) for name, _ in page.items]
        found = [convert.decode(entry) for entry in entries if entry is not None]
        return pb.ListDeletableResponse(checkpoints=found, next_page_token=page.next_page_token)

    async def ConfirmDeleted(
        self, request: pb.ConfirmDeletedRequest, context: _Context | None
    ) -> pb.ConfirmDeletedResponse:
        check_names(request.names)
        entries = [await self._store.get(convert.checkpoint_key(name)) for name in request.names]
        known = [(entry, convert.decode(entry)) for entry in entries if entry is not None]
        self._rights.check_deletes(one for _, one in known)
        for entry, one in known:
            if convert.state_of(one) in state_machine.DELETABLE:
                await self._forget(one.name, entry)
        return pb.ConfirmDeletedResponse()

    async def AbandonCheckpoint(self, request: pb.AbandonCheckpointRequest, context: _Context | None) -> pb.Checkpoint:
        def given_up(known: pb.Checkpoint) -> State | None:
            return State.ABANDONED if convert.state_of(known) is State.WRITING else None

        return await self._change(request.name, request.epoch, given_up, request.message)

    async def MarkLost(self, request: pb.MarkLostRequest, context: _Context | None) -> pb.Checkpoint:
        def lost(known: pb.Checkpoint) -> State | None:
            if convert.state_of(known) is State.LOST:
                return None
            state_machine.check_step_to(convert.saved_of(known), State.LOST)
            check_proof(request.read, known)
            return State.LOST

        return await self._change(request.name, request.epoch, lost, request.message)

    async def MarkIntact(self, request: pb.MarkIntactRequest, context: _Context | None) -> pb.Checkpoint:
        def intact(known: pb.Checkpoint) -> State | None:
            if convert.state_of(known) in state_machine.RESTORABLE:
                return None
            if convert.state_of(known) is not State.LOST:
                state_machine.check_step_to(convert.saved_of(known), State.COMMITTED)
                raise FailedPrecondition(f"{known.name} is not lost")
            return State.COMMITTED

        return await self._change(request.name, request.epoch, intact, "")

    async def _change(
        self, name: str, epoch: int, decide: Callable[[pb.Checkpoint], State | None], message: str
    ) -> pb.Checkpoint:
        """Moves a checkpoint on behalf of the job's current attempt; `decide` gives the next state, None to leave it."""
        key = convert.checkpoint_key(name)
        placed = await self._rights.check_acts_for(convert.job_of(name), epoch)
        fence = fence_of(convert.job_of(name), epoch)
        for _ in range(RACES):
            entry = await records.existing(self._store, key, name)
            known = await records.whole(self._store, entry)
            self._rights.check_own(known, placed)
            state = decide(known)
            if state is None:
                return known
            try:
                await move(self._store, entry, state, message[:1000], when=[fence])
            except ConditionFailed as failed:
                refuse_if_fenced(failed, convert.job_of(name), epoch)
                continue  # it was changed meanwhile: look again
            return convert.decode(await records.existing(self._store, key, name))
        raise Aborted(f"{name} changes too fast; try again", retry_after_s=1.0)

    async def _store_report(self, request: pb.ReportPiecesRequest, known: pb.Checkpoint) -> None:
        report = pb.ReportedPieces(complete_ranks=request.complete_ranks, pieces=request.pieces)
        key = convert.report_key(known.name, request.complete_ranks)
        fence, checkpoint_key = fence_of(convert.job_of(known.name), request.epoch), convert.checkpoint_key(known.name)
        try:
            await self._store.commit(Put(key, report.SerializeToString()), when=[fence, Present(checkpoint_key)])
        except ConditionFailed as lost:
            refuse_if_fenced(lost, convert.job_of(known.name), request.epoch)
            await records.existing(self._store, checkpoint_key, known.name)  # it was deleted meanwhile

    async def _deletable(self, known: pb.Checkpoint) -> list[pb.Checkpoint]:
        scope = keys.of_name(keys.CHECKPOINTS_DELETABLE, convert.job_of(known.name)) + "/"
        marked = (await self._store.list(scope, limit=_DELETABLE_AT_ONCE)).entries
        entries = [await self._store.get(convert.checkpoint_key(convert.marked(mark)[0])) for mark in marked]
        return [convert.decode(entry) for entry in entries if entry is not None]

    async def _forget(self, name: str, entry: Entry) -> None:
        prefix = convert.pieces_prefix(name)
        listed = await self._store.list(prefix)
        for start in range(0, len(listed.entries), 100):  # a transaction has at most 128 operations
            await self._store.commit(*(Delete(e.key) for e in listed.entries[start : start + 100]))
        record = Delete(entry.key), Delete(convert.deletable_key(name))
        await self._store.commit(*record, when=[Unchanged(entry), NoneCreated(prefix, listed.revision)])
