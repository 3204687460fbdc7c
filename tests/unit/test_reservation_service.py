"""Reservations through the scheduler: asked for, refused, begun and over, told in events, kept by the next leader."""

import asyncio
from datetime import timedelta

import pytest
from google.protobuf.duration_pb2 import Duration

from tests.support.scheduler_world import World, node, until
from tests.unit.test_scheduler_parts import cut
from whaleflux import names
from whaleflux.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, StatusError
from whaleflux.events.memory import MemoryBus
from whaleflux.rpc import auth
from whaleflux.store import keys
from whaleflux.store.api import Put
from whaleflux.v1 import events_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import reservation_keeper, reservation_records

SAVES = pb.CheckpointPolicy(every_steps=10)
SOON, LONG = 120.0, 240.0  # seconds


class Reserving(World):
    """Two nodes of four GPUs."""

    async def start(self):
        await super().start()
        if not self.agents:
            await self.add(node("s/a"), node("s/b"))

    def wanted(self, gpus=4, after_s=SOON, for_s=SOON, queue="queues/default", **more):
        one = pb.Reservation(gpus=gpus, queue=queue, **more)
        self.times(one, after_s, for_s)
        return one

    def maintenance(self, *nodes, after_s=SOON, for_s=SOON):
        one = pb.Reservation(maintenance=True, nodes=nodes)
        self.times(one, after_s, for_s)
        return one

    def times(self, one, after_s, for_s):
        now = self.clock.now()
        one.start_time.FromDatetime(now + timedelta(seconds=after_s))
        one.end_time.FromDatetime(now + timedelta(seconds=after_s + for_s))

    async def reserve(self, id_="r", one=None, *, by=None, **more):
        request = pb.CreateReservationRequest(reservation_id=id_, reservation=one or self.wanted(), **more)
        if by is None:
            return await self.scheduler.CreateReservation(request, None)
        with auth.acting_as(by):
            return await self.scheduler.CreateReservation(request, None)

    async def update(self, name, *paths, **fields):
        request = pb.UpdateReservationRequest(reservation=pb.Reservation(name=name, **fields))
        request.update_mask.paths.extend(paths or fields)
        return await self.scheduler.UpdateReservation(request, None)

    async def shown(self, name):
        return await self.scheduler.GetReservation(pb.GetReservationRequest(name=name), None)

    async def stands(self, name, state):
        wanted = pb.ReservationState.Value(f"RESERVATION_STATE_{state}")

        for _ in range(300):
            if (await self.shown(name)).state == wanted:
                return await self.shown(name)
            await asyncio.sleep(1.0)
        raise AssertionError(f"{name} is never {state}: {await self.shown(name)}")


def gpus_of(one):
    return {uuid for part in one.held for uuid in part.gpu_uuids}


def has(job):
    return {uuid for task in job.attempt.tasks for uuid in task.gpu_uuids}


async def test_its_members_start_when_it_begins_and_others_leave_for_them():
    async with Reserving() as world:
        fillers = [await world.submit(4, job_id=f"f{n}", checkpoint=SAVES) for n in range(2)]
        for name in fillers:
            await world.reaches(name, "RUNNING")
        kept = await world.reserve(one=world.wanted(4))
        assert (kept.name, len(gpus_of(kept)), kept.state) == ("reservations/r", 4, pb.RESERVATION_STATE_SCHEDULED)
        member = await world.submit(4, job_id="member", reservation=kept.name)
        await asyncio.sleep(SOON - 60)
        assert (await world.job(member)).state == pb.JOB_STATE_QUEUED
        explained = await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=member), None)
        assert "waits: reservations/r begins at" in explained.decision.summary
        began = await world.stands(kept.name, "ACTIVE")
        started = await world.reaches(member, "RUNNING")
        assert has(started) == gpus_of(began) == gpus_of(kept)
        (victim,) = began.victims
        left = await world.job(victim)
        assert (left.state, left.past_attempts[-1:] or left.attempt.end_reason) and left.cause.resource == kept.name
        assert "makes room for reservations/r" in left.attempt.end_reason
        await world.stands(kept.name, "ENDED")
        assert (await world.job(member)).state == pb.JOB_STATE_RUNNING
        for agent in world.agents.values():
            agent.exit()
        await world.reaches(victim, "RUNNING")
        await world.planner.ask(lambda planner: planner.check())


async def test_a_node_under_maintenance_is_empty_in_time_and_comes_back_by_itself_whoever_leads():
    async with Reserving() as world:
        where = names.node("s", "a")
        jobs = [await world.submit(4, job_id=f"f{n}", checkpoint=SAVES) for n in range(2)]
        for name in jobs:
            await world.reaches(name, "RUNNING")
        kept = await world.reserve("m", world.maintenance(where))
        await asyncio.sleep(SOON - 30)
        await world.restart()
        await world.stands(kept.name, "ACTIVE")
        await until(lambda: _nobody_on(world, where), "nobody is there")
        (victim,) = (await world.shown(kept.name)).victims
        await world.restart()
        await asyncio.sleep(SOON / 2)
        assert await world.held_on(where) == 0
        assert (await world.job(victim)).state == pb.JOB_STATE_QUEUED
        decision = (await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=victim), None)).decision
        assert any("under maintenance until" in one.constraint for one in decision.exclusions), decision
        await world.stands(kept.name, "ENDED")
        assert {task.node for task in (await world.reaches(victim, "RUNNING")).attempt.tasks} == {where}


async def test_who_waits_for_a_node_under_maintenance_is_told_so_and_when_it_is_over():
    expected = Duration(seconds=7200)
    async with Reserving() as world:
        long = await world.submit(4, job_id="long", expected=expected)
        (task,) = (await world.reaches(long, "RUNNING")).attempt.tasks
        other = ({names.node("s", "a"), names.node("s", "b")} - {task.node}).pop()
        kept = await world.reserve("m", world.maintenance(other, for_s=1800.0))
        waits = await world.submit(4, job_id="waits", expected=expected)

        async def reasons():
            return (await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=waits), None)).decision.reasons

        over = kept.end_time.ToDatetime().strftime("%Y-%m-%dT%H:%M")
        assert any("until they begin, jobs may use them" in one for one in await reasons())
        assert any(f"expected to start {over}" in one for one in await reasons()), await reasons()
        await world.stands(kept.name, "ACTIVE")
        told = await reasons()
        assert any(f"expected to start {over}" in one for one in told), told
        assert not any("until they begin" in one or "only their members" in one for one in told), told


async def test_mig_instances_are_kept_and_their_members_get_them_while_others_do_not():
    small = pb.GpuRequirement(mig_profile="1g.10gb")
    async with World() as world:
        await world.add(cut(node("s/a"), *[("1g.10gb", 10)] * 3))
        one = pb.Reservation(gpus=2, gpu_type="H100-80GB 1g.10gb", queue="queues/default")
        one.start_time.FromDatetime(world.clock.now())
        one.end_time.FromDatetime(world.clock.now() + timedelta(seconds=LONG))
        request = pb.CreateReservationRequest(reservation_id="r", reservation=one)
        kept = await world.scheduler.CreateReservation(request, None)
        assert len(gpus_of(kept)) == 2 and all(uuid.startswith("MIG-") for uuid in gpus_of(kept))
        others = [await world.submit(1, job_id=f"other-{n}", gpu=small) for n in range(2)]
        (free,) = has(await world.reaches(others[0], "RUNNING"))
        assert free not in gpus_of(kept)
        member = await world.submit(2, job_id="member", gpu=small, reservation=kept.name)
        assert has(await world.reaches(member, "RUNNING")) == gpus_of(kept)
        waits = (await world.scheduler.ExplainJob(pb.ExplainJobRequest(name=others[1]), None)).decision
        assert waits.summary.startswith("waits")
        await world.planner.ask(lambda planner: planner.check())
        whole = await world.submit(3, job_id="whole")
        await world.reaches(whole, "RUNNING")


async def _nobody_on(world, where):
    return await world.held_on(where) == 0


async def test_what_cannot_be_kept_is_refused_and_changes_nothing():
    async with Reserving() as world:
        await world.reserve("first", world.wanted(8))
        bad = {
            "more than there is": (world.wanted(9), "reservation.gpus"),
            "in its time": (world.wanted(1), "reservation.gpus"),
            "over": (world.wanted(after_s=-1e4), "reservation.start_time"),
            "backwards": (world.wanted(for_s=-1), "reservation.end_time"),
            "far": (world.wanted(after_s=400 * 86400.0), "reservation.start_time"),
            "no queue": (world.wanted(queue="queues/absent", after_s=1e4), "reservation.queue"),
            "a bad name": (world.wanted(queue="absent"), "reservation.queue"),
            "no node": (world.wanted(nodes=["sites/s/nodes/x"]), "reservation.nodes"),
            "its nodes": (world.maintenance("sites/s/nodes/a"), "reservation.nodes"),
            "no time": (pb.Reservation(gpus=1, queue="queues/default"), "reservation.start_time"),
        }
        revision = (await world.store.list("", limit=1)).revision
        for what, (asked, field) in bad.items():
            with pytest.raises(InvalidArgument) as refused:
                await world.reserve("x", asked)
            assert refused.value.violations[0].field == field, (what, refused.value.violations)
        with pytest.raises(InvalidArgument, match="reservation_id"):
            await world.reserve("Not An Id")
        with pytest.raises(AlreadyExists, match="reservation update first"):
            await world.reserve("first")
        with pytest.raises(InvalidArgument, match=r"gpu_type.*cannot be changed"):
            await world.update("reservations/first", gpu_type="H100-80GB")
        with pytest.raises(InvalidArgument, match="update_mask: is empty"):
            await world.scheduler.UpdateReservation(
                pb.UpdateReservationRequest(reservation=pb.Reservation(name="reservations/first")), None
            )
        with pytest.raises(InvalidArgument, match=r"reservation\.gpus"):
            await world.update("reservations/first", gpus=9)
        with pytest.raises(NotFound, match="whaleflux reservation ls"):
            await world.shown("reservations/absent")
        with pytest.raises(NotFound):
            await world.submit(1, reservation="reservations/absent")
        assert (await world.store.list("", limit=1)).revision == revision


async def test_it_is_changed_as_long_as_it_fits_and_deleted_at_once():
    async with Reserving() as world:
        asked = world.wanted(4)
        kept = await world.reserve(one=asked, request_id="once")
        assert await world.reserve(one=asked, request_id="once") == kept
        dry = await world.reserve("dry", world.wanted(4), validate_only=True)
        assert len(gpus_of(dry)) == 4 and not gpus_of(dry) & gpus_of(kept)
        more = await world.update(kept.name, gpus=6)
        assert gpus_of(kept) < gpus_of(more)
        fewer = await world.update(kept.name, gpus=2)
        assert gpus_of(fewer) < gpus_of(kept) and fewer.etag != more.etag
        with pytest.raises(StatusError, match="etag"):
            await world.update(kept.name, "gpus", gpus=3, etag=kept.etag)
        long = await world.submit(8, job_id="long")
        assert (await world.job(long)).state == pb.JOB_STATE_QUEUED
        with pytest.raises(FailedPrecondition, match="whaleflux reservation rm own"):
            await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="own"), None)
            await world.reserve("own", world.wanted(1, queue="queues/own", after_s=1e4))
            await world.scheduler.DeleteQueue(pb.DeleteQueueRequest(name="queues/own"), None)
        await world.scheduler.DeleteReservation(pb.DeleteReservationRequest(name="reservations/own"), None)
        await world.scheduler.DeleteReservation(pb.DeleteReservationRequest(name=kept.name), None)
        await world.reaches(long, "RUNNING")
        listed = await world.scheduler.ListReservations(pb.ListReservationsRequest(show_ended=True), None)
        assert not listed.reservations


async def test_the_members_of_a_queue_reserve_what_it_is_guaranteed_and_no_more():
    async with Reserving() as world:
        ann, bob = auth.Identity("user", "ann"), auth.Identity("user", "bob")
        queue = pb.Queue(guaranteed_gpus=4, members=["users/ann"])
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="research", queue=queue), None)
        own = world.wanted(4, queue="queues/research")

        with pytest.raises(InvalidArgument, match="guaranteed 4 GPUs"):
            await world.reserve("large", world.wanted(5, queue="queues/research"), by=ann)
        made = await world.reserve("own", own, by=ann)
        assert made.creator == "user/ann"
        with pytest.raises(InvalidArgument, match="4 are kept in that time already"):
            await world.reserve("again", own, by=ann)
        for asked, by, error in (
            (world.maintenance("sites/s/nodes/b"), ann, PermissionDenied),
            (world.wanted(1), bob, PermissionDenied),
            (world.wanted(1, queue="queues/research", after_s=1e4), bob, NotFound),
        ):
            with pytest.raises(error):
                await world.reserve("no", asked, by=by)
        with auth.acting_as(bob):
            with pytest.raises(NotFound):
                await world.scheduler.GetReservation(pb.GetReservationRequest(name=made.name), None)
            with pytest.raises(NotFound):
                await world.scheduler.DeleteReservation(pb.DeleteReservationRequest(name=made.name), None)
            listed = await world.scheduler.ListReservations(pb.ListReservationsRequest(), None)
            assert not listed.reservations
        with pytest.raises(NotFound):  # ada, who is no member of its queue either
            await world.create(1, reservation=made.name)


async def test_what_becomes_of_it_is_told_in_events():
    bus = MemoryBus()
    async with Reserving(bus=bus) as world:
        kept = await world.reserve(one=world.wanted(8, LONG, SOON, reason="launch"))
        await world.update(kept.name, reason="later")
        world.intend("sites/s/nodes/a", 2, "MAINTENANCE")
        await asyncio.sleep(SOON)
        assert (await world.shown(kept.name)).short_gpus == 4
        world.intend("sites/s/nodes/a", 1)
        await world.stands(kept.name, "ENDED")
        await world.scheduler.DeleteReservation(pb.DeleteReservationRequest(name=kept.name), None)
        told = await told_of(bus, "reservations/r", "DELETED")
        assert [event.what for event in told] == [
            *("CREATED", "CHANGED", "SHORT", "WHOLE_AGAIN"),
            *("ACTIVE", "ENDED", "DELETED"),
        ]
        assert "8 GPUs for queues/default" in told[0].message and told[0].cause.actor == "admin/root"


async def test_one_that_is_forgotten_is_told_of_with_the_reason(monkeypatch):
    monkeypatch.setattr(reservation_keeper, "PRUNE_EVERY_S", 60.0)
    monkeypatch.setattr(reservation_records, "KEPT_ENDED", timedelta(minutes=5))
    bus = MemoryBus()
    async with Reserving(bus=bus) as world:
        kept = await world.reserve(one=world.wanted(8, 0.0, SOON))
        await asyncio.sleep(SOON)
        await world.stands(kept.name, "ENDED")
        await asyncio.sleep(600.0)
        told = await told_of(bus, "reservations/r", "DELETED")
        assert (told[-1].message, told[-1].cause.actor) == ("it was over, and is forgotten", "scheduler/reservation")


async def test_what_a_job_may_use_is_asked_when_it_is_submitted_and_a_plan_shows_where():
    async with Reserving() as world:
        now = await world.reserve("now", world.wanted(4, after_s=0.0, members=["users/ann"]))
        await world.stands(now.name, "ACTIVE")
        await world.reserve("shut", world.maintenance("sites/s/nodes/b", after_s=SOON))
        with pytest.raises(InvalidArgument, match="is for users/ann"):  # the world's user is ada
            await world.create(1, reservation=now.name)
        with pytest.raises(InvalidArgument, match="is maintenance"):
            await world.create(1, reservation="reservations/shut")
        with pytest.raises(InvalidArgument, match="not the name of a reservation"):
            await world.create(1, reservation="now")
        await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id="other"), None)
        with pytest.raises(InvalidArgument, match="queue: default"):
            await world.create(1, queue="other", reservation=now.name)
        await world.update(now.name, members=["users/ada"])
        plan = await world.create(2, dry=True, reservation=now.name)
        assert plan.decision.placed and {u for t in plan.decision.tasks for u in t.gpu_uuids} < gpus_of(now)
        await world.stands(now.name, "ENDED")
        with pytest.raises(InvalidArgument, match="is over since"):
            await world.create(1, reservation=now.name)
        with pytest.raises(InvalidArgument, match="is over since"):
            await world.update(now.name, gpus=2)


async def test_beside_a_record_that_cannot_be_read_nothing_is_kept_and_what_is_known_goes_on():
    async with Reserving() as world:
        kept = await world.reserve("known", world.wanted(4))
        newer = pb.Reservation(name="reservations/newer", state=7)  # type: ignore[arg-type]
        await world.store.commit(Put(keys.RESERVATIONS + "newer", newer.SerializeToString()))
        with pytest.raises(FailedPrecondition, match="update it"):
            await world.reserve("more", world.wanted(1))
        assert (await world.stands(kept.name, "ACTIVE")).held == kept.held
        listed = await world.scheduler.ListReservations(pb.ListReservationsRequest(), None)
        assert {one.name for one in listed.reservations} == {kept.name, newer.name}


async def told_of(bus, resource, last):
    found = []
    async with bus.subscribe(["wf.v1.>"], durable="test") as news, asyncio.timeout(60):
        async for delivery in news:
            event = events_pb2.Event.FromString(delivery.data)
            await delivery.ack()
            found += [event] if event.resource == resource else []
            if found and found[-1].what == last:
                break
    return found
