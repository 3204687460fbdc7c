"""What callers read of what others do: events, history, incidents, datasets. Each is made by its owner's own code, read by each kind of caller."""

import contextlib

import pytest

from tests.support.scheduler_world import World, node
from tests.support.virtual_time import LoopClock
from whaleflux.clock import VirtualClock
from whaleflux.errors import AlreadyExists, Compacted, InvalidArgument, NotFound, PermissionDenied, StatusError
from whaleflux.events.memory import MemoryBus
from whaleflux.events.publisher import EntryChange
from whaleflux.events.subjects import Subject
from whaleflux.rpc import auth
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.store import keys
from whaleflux.store.api import Delete, Entry, Put
from whaleflux.store.memory import MemoryStore
from whaleflux.trust import ownership
from whaleflux.trust.ownership import OPEN, Access
from whaleflux.trust.sight import OTHERS_JOB, OTHERS_RESERVATION, Sight
from whaleflux.v1 import events_pb2, health_pb2, inventory_pb2
from whaleflux.v1 import router_pb2 as models
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_health_monitor.servicer import HealthServicer
from whaleflux_inference_router import news as router_news
from whaleflux_inventory import event_sight
from whaleflux_inventory import news as inventory_news
from whaleflux_inventory.core import event_filter
from whaleflux_inventory.data_quotas import DataQuotas, nothing_held
from whaleflux_inventory.datasets import Datasets
from whaleflux_inventory.event_history import EventHistory
from whaleflux_scheduler import news as scheduler_news

SECRET = "hunter2"


def who(role, name, groups=(), queues=None):
    return Principal(Identity(role, name), frozenset(groups), queues)


ANN, MATE, EVE = who("user", "ann"), who("user", "bob", ["research"]), who("user", "eve")
VIEWER, OPERATOR, SERVICE = who("viewer", "vic"), who("operator", "op"), who("scheduler", "1")
QUEUES = {"open": OPEN, "serving": OPEN, "team": Access(frozenset({"groups/research"}))}


def access(queue):
    return QUEUES.get(queue, ownership.Access(frozenset({"groups/-"})))


def test_a_queue_that_was_asked_for_after_it_changed_is_seen_otherwise_at_the_next_look_all_the_same():
    queues = {"team": QUEUES["team"]}
    sight = Sight(EVE, queues.__getitem__)
    assert not sight.look_again(queues)
    queues["team"] = OPEN
    assert sight.sees_queue("team"), "by a job that changed meanwhile"
    assert sight.look_again(queues)
    assert not sight.look_again(queues)


def told(describe, record, before=None):
    """The event that an owner's publisher makes of a record."""
    at = VirtualClock().now()
    entries = [Entry("k", one.SerializeToString(), 1, 1) if one is not None else None for one in (before, record)]
    change = EntryChange("k", *entries, 1, "id")
    made = describe(change, at)
    return events_pb2.Event.FromString(made.data)


def job_event(queue):
    job = pb.Job(
        name=f"queues/{queue}/jobs/j",
        submitter="user/ann",
        state=pb.JOB_STATE_FAILED,
        state_message=f"rank 0 said {SECRET}",
    )
    job.decision.preempts.append("queues/team/jobs/other")
    return told(lambda change, now: scheduler_news.of_job(change, now, None, job), job)


def seen(event, caller):
    """As the caller reads it; None: not at all."""
    copy = events_pb2.Event()
    copy.CopyFrom(event)
    return event_sight.shown(copy, Sight(caller, access))


class TestEvents:
    @pytest.mark.parametrize(
        ("queue", "caller", "sees", "reads"),
        [
            ("open", ANN, True, True), ("open", MATE, True, False), ("open", EVE, True, False), ("open", VIEWER, True, False),
            ("open", OPERATOR, True, True), ("team", ANN, True, True), ("team", MATE, True, True), ("team", EVE, False, False),
            ("team", VIEWER, True, False), ("team", OPERATOR, True, True), ("gone", EVE, False, False), ("gone", ANN, True, True),
        ],
    )  # fmt: skip
    def test_of_a_job_its_team_reads_the_words_and_who_sees_it_the_facts(self, queue, caller, sees, reads):
        found = seen(job_event(queue), caller)
        assert (found is not None) == sees
        assert (SECRET in str(found)) == reads
        assert found is None or found.attributes["gpus"] == "0", "what it is and cost is told"

    def test_of_models_keys_and_datasets_whose_they_are_stands_in_the_event(self):
        key = told(router_news.of_api_key, models.ApiKey(name="apiKeys/k", owner="user/ann", display_name=SECRET))
        mine = inventory_pb2.Dataset(name="datasets/d", owner="user/ann", members=["groups/research"])
        dataset = told(inventory_news.of_dataset, mine)
        model = told(router_news.of_model, models.Model(name="models/m", owner="user/ann", queue="queues/team"))
        replica = models.Replica(
            name="models/m/replicas/r", owner="user/ann", address="10.1.1.1:7", state=models.REPLICA_STATE_READY
        )
        engine = told(router_news.of_replica, replica)
        for event, callers in (
            (key, [ANN]),
            (dataset, [ANN, MATE, VIEWER]),
            (model, [ANN, MATE, VIEWER]),
            (engine, [ANN, MATE, EVE, VIEWER]),
        ):
            readers = [caller for caller in (ANN, MATE, EVE, VIEWER) if seen(event, caller) is not None]
            assert readers == callers, event.resource
            assert seen(event, OPERATOR) == event
        assert "10.1.1.1" not in str(seen(engine, EVE))
        assert "10.1.1.1" in str(seen(engine, ANN))

    def test_every_kind_has_a_judge_or_is_for_operators(self):
        asked = {event_filter.KINDS[kind] for kind in event_filter.KINDS} - {
            ("joinTokens",), ("offers",), ("leases",), ("budgets",), ("recommendations",)
        }  # fmt: skip
        for collections in asked:
            name = "/".join(f"{one}/open" for one in collections)
            assert seen(events_pb2.Event(resource=name, attributes={"owner": "user/ann"}), ANN) is not None, name
        for name in ("joinTokens/t", "offers/o", "leases/l", "secrets/s", "users/u", "anything/else"):
            assert seen(events_pb2.Event(resource=name), VIEWER) is None

    def test_events_of_reservations_are_for_those_who_see_its_queue(self):
        for queue, callers in (("queues/team", [MATE, VIEWER]), ("queues/open", [ANN, MATE, EVE, VIEWER])):
            event = events_pb2.Event(
                resource="reservations/r", attributes={"queue": queue}, message="for reservations/r"
            )
            assert [c for c in (ANN, MATE, EVE, VIEWER) if seen(event, c) is not None] == callers
        upkeep = events_pb2.Event(resource="reservations/m", message="makes room for reservations/secret")
        assert seen(upkeep, EVE).message == f"makes room for {OTHERS_RESERVATION}"

    async def test_pages_go_on_over_what_is_left_out_and_work_is_bounded(self, monkeypatch):
        monkeypatch.setattr("whaleflux_inventory.event_history.READ_AT_ONCE", 10)
        bus, history = MemoryBus(LoopClock()), None
        for number in range(100):
            event = job_event("open" if number % 25 == 0 else "team")
            event.id = str(number)
            await bus.publish(str(Subject.of(event.resource, event.what)), event.SerializeToString(), id=event.id)
        history, found, token, pages = EventHistory(bus, access), [], "", 0
        with auth.acting_as(EVE):
            while pages == 0 or token:
                asked = ownership.watch_questions()
                answer = await history.ListEvents(events_pb2.ListEventsRequest(page_token=token), None)
                assert asked.yes
                found += [event.id for event in answer.events]
                token, pages = answer.next_page_token, pages + 1
        assert found == ["75", "50", "25", "0"]
        assert pages >= 2

    def test_names_of_others_are_taken_out_of_what_one_may_read(self):
        event = events_pb2.Event(resource="incidents/i", message=f"lost queues/team/jobs/x\n{SECRET}")
        event.attributes["jobs"] = "queues/team/jobs/x,queues/open/jobs/y"
        found = seen(event, EVE)
        assert (found.message, found.attributes["jobs"]) == (f"lost {OTHERS_JOB}", f"{OTHERS_JOB},queues/open/jobs/y")


async def test_history_shows_what_one_sees_and_words_to_who_reads_it():
    async with World(bus=MemoryBus(LoopClock())) as world:
        await world.add(node("s/a"))
        for queue, members in (("open", ()), ("team", ["groups/research"])):
            made = pb.CreateQueueRequest(queue_id=queue, queue=pb.Queue(members=members))
            await world.scheduler.CreateQueue(made, None)
            with auth.acting_as(ANN if queue == "open" else MATE):
                job = pb.Job(spec=pb.JobSpec(command=["x"], gpus=1))
                await world.scheduler.CreateJob(
                    pb.CreateJobRequest(parent=f"queues/{queue}", job_id="j", job=job), None
                )
            await world.scheduler.CancelJob(pb.CancelJobRequest(name=f"queues/{queue}/jobs/j", reason=SECRET), None)
        for caller, names, words in ((ANN, {"open"}, {"open"}), (MATE, {"open", "team"}, {"team"}), (EVE, {"open"}, set()),
                                     (VIEWER, {"open", "team"}, set()), (OPERATOR, {"open", "team"}, {"open", "team"})):  # fmt: skip
            with auth.acting_as(caller):
                listed = await world.scheduler.ListJobHistory(pb.ListJobHistoryRequest(), None)
            found = {record.job.split("/")[1]: record.end_reason for record in listed.records}
            assert (set(found), {queue for queue, why in found.items() if SECRET in why}) == (names, words), caller.name


async def test_an_incident_names_no_jobs_of_others_and_quotes_no_program():
    store, incident = MemoryStore(), health_pb2.Incident(name="incidents/i", message=f"rank 0 ended\n{SECRET}")
    incident.jobs.extend(["queues/team/jobs/x", "queues/open/jobs/y"])
    incident.epochs["queues/team/jobs/x"] = incident.epochs["queues/open/jobs/y"] = 1
    incident.traceparents["queues/open/jobs/y"] = "00-1"
    await store.commit(Put(keys.INCIDENTS + "i", incident.SerializeToString()))
    health = HealthServicer(store, None, VirtualClock(), None, access)
    for caller, others in ((EVE, False), (MATE, True), (VIEWER, True), (OPERATOR, True)):
        with auth.acting_as(caller):
            asked = ownership.watch_questions()
            one = await health.GetIncident(health_pb2.GetIncidentRequest(name="incidents/i"), None)
            listed = (await health.ListIncidents(health_pb2.ListIncidentsRequest(), None)).incidents
        assert asked.yes
        assert [one] == list(listed)
        assert ("queues/team" in str(one)) == others, caller.name
        assert (SECRET in str(one)) == (caller is OPERATOR)
        assert "queues/open/jobs/y" in one.epochs


async def test_a_watch_of_incidents_tells_what_their_list_shows_and_begins_anew_when_a_queue_opens():
    store, clock, queues = MemoryStore(), VirtualClock(), dict(QUEUES)
    await store.commit(Put(keys.INCIDENTS + "i", hit("queues/team/jobs/x").SerializeToString()))
    health = HealthServicer(store, None, clock, None, lambda queue: queues.get(queue, OPEN))
    with auth.acting_as(EVE):
        asked, watch = (
            ownership.watch_questions(),
            health.WatchIncidents(health_pb2.WatchIncidentsRequest(), None),
        )
        listed = await health.ListIncidents(health_pb2.ListIncidentsRequest(), None)
        first, mark = [await anext(watch) for _ in range(2)]
    assert asked.yes
    assert (first.added, mark.resource_version) == (listed.incidents[0], listed.resource_version)
    assert list(first.added.jobs) == [OTHERS_JOB]
    await store.commit(Delete(keys.INCIDENTS + "i"))
    gone = await anext(watch)
    assert (gone.deleted, gone.resource_version) == ("incidents/i", listed.resource_version + 1)
    queues["team"] = OPEN
    await clock.advance(2.0)
    await store.commit(Put(keys.INCIDENTS + "j", hit("queues/team/jobs/x").SerializeToString()))
    with pytest.raises(Compacted):
        await anext(watch)
    with auth.acting_as(EVE):
        resumed = health.WatchIncidents(health_pb2.WatchIncidentsRequest(resource_version=gone.resource_version), None)
        assert list((await anext(resumed)).added.jobs) == ["queues/team/jobs/x"]


def hit(job):
    return health_pb2.Incident(name="incidents/i", jobs=[job], message=f"lost {job}")


class TestDatasets:
    @contextlib.asynccontextmanager
    async def made(self):
        datasets = datasets_of(MemoryStore())
        for name, members in (("all", []), ("team", ["groups/research"])):
            request = inventory_pb2.CreateDatasetRequest(dataset_id=name, request_id="r")
            request.dataset.uri = "/mnt/d"
            request.dataset.members.extend(members)
            with auth.acting_as(ANN):
                assert (await datasets.create(request)).owner == "user/ann"
            with auth.acting_as(EVE), pytest.raises(AlreadyExists, match="choose another name"):
                await datasets.create(request)
        yield datasets

    @pytest.mark.parametrize(
        ("caller", "sees", "changes"),
        [
            (ANN, {"all", "team"}, {"all", "team"}), (MATE, {"all", "team"}, {"team"}), (EVE, {"all"}, set()),
            (VIEWER, {"all", "team"}, set()), (OPERATOR, {"all", "team"}, {"all", "team"}), (SERVICE, {"all", "team"}, {"all", "team"}),
            (who("agent", "a/n1"), {"all", "team"}, set()), (who("app", "web"), {"all"}, set()),
        ],
    )  # fmt: skip
    async def test_who_may_use_one_sees_it_and_its_owner_and_groups_forget_it(self, caller, sees, changes):
        async with self.made() as datasets:
            with auth.acting_as(caller):
                page = await datasets.page(inventory_pb2.ListDatasetsRequest())
                assert {one.name.removeprefix("datasets/") for one in page.items} == sees
                for name in ("all", "team"):
                    asked = ownership.watch_questions()
                    got = await result(datasets.get(f"datasets/{name}"))
                    gone = await result(datasets.delete(inventory_pb2.DeleteDatasetRequest(name=f"datasets/{name}")))
                    assert asked.yes
                    assert isinstance(got, NotFound) == (name not in sees)
                    refused = PermissionDenied if name in sees else NotFound
                    assert isinstance(gone, type(None) if name in changes else refused), (caller.name, name)

    async def test_members_are_somebody(self):
        datasets = datasets_of(MemoryStore())
        request = inventory_pb2.CreateDatasetRequest(
            dataset_id="d", dataset=inventory_pb2.Dataset(uri="/d", members=["ann"])
        )
        with auth.acting_as(ANN), pytest.raises(InvalidArgument, match=r"members\[0\]"):
            await datasets.create(request)


def datasets_of(store):
    return Datasets(store, VirtualClock(), no_problem, DataQuotas(store, lambda _: ownership.OPEN, nothing_held))


async def no_problem(secret):
    return ""


async def result(call):
    try:
        return await call
    except StatusError as error:
        return error
