"""Whose jobs may be seen, read and changed by whom: every method of the scheduler that touches a job, for every kind of caller."""

import asyncio
import contextlib

import pytest

from tests.support.scheduler_world import World, node
from whaleflux.errors import AlreadyExists, Compacted, InvalidArgument, NotFound, PermissionDenied, StatusError
from whaleflux.rpc import auth, owners
from whaleflux.rpc.auth import Identity, Principal
from whaleflux.trust import ownership
from whaleflux.v1 import inventory_pb2
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import job_privacy

SECRET = "hunter2"
PRIVATE = pb.JobSpec(
    command=["python", f"--token={SECRET}"], gpus=1, environment={"TOKEN": SECRET}, setup=[f"echo {SECRET}"], datasets=["d"],
    working_directory=f"/home/{SECRET}",
)  # fmt: skip


def who(role, name, groups=(), queues=None):
    return Principal(Identity(role, name), frozenset(groups), queues)


ANN = who("user", "ann")
MATE = who("user", "bob", ["research"])  # in a group that the team's queue names
NAMED = who("user", "carl")  # named by it himself
EVE = who("user", "eve", ["other"])
CALLERS = {
    "owner": ANN,
    "mate": MATE,
    "named": NAMED,
    "stranger": EVE,
    "viewer": who("viewer", "vic"),
    "operator": who("operator", "op"),
    "admin": who("admin", "root"),
    "service": who("health_monitor", "1"),
    "scoped owner": who("user", "ann", queues=frozenset({"elsewhere"})),
}
# What each may do with ann's job in an open queue, and in one for groups/research and users/carl: sees, reads, changes.
MAY = {
    "owner": ("src", "src"),
    "mate": ("s", "src"),
    "named": ("s", "s"),
    "stranger": ("s", ""),
    "viewer": ("s", "s"),
    "operator": ("src", "src"),
    "admin": ("src", "src"),
    "service": ("src", "src"),
    "scoped owner": ("", ""),
}
QUEUES = ("open", "team")
CHANGES = {
    "CancelJob": pb.CancelJobRequest,
    "HoldJob": pb.HoldJobRequest,
    "ReleaseJob": pb.ReleaseJobRequest,
    "RequeueJob": pb.RequeueJobRequest,
    "SetJobPriority": pb.SetJobPriorityRequest,
    "DeleteJob": pb.DeleteJobRequest,
}


@contextlib.asynccontextmanager
async def fleet():
    """ann's job `j` waits in both queues; in the team's queue there is `hidden`, which mate owns."""
    async with World() as world:
        world.inventory.datasets["datasets/d"] = inventory_pb2.Dataset(name="datasets/d")
        for queue, members in (("open", ()), ("team", ("groups/research", "users/carl", "users/ann"))):
            made = pb.Queue(members=members)
            await world.scheduler.CreateQueue(pb.CreateQueueRequest(queue_id=queue, queue=made), None)
            await create(world, ANN, queue, "j", PRIVATE)
        await create(world, MATE, "team", "hidden")
        left = pb.UpdateQueueRequest(queue=pb.Queue(name="queues/team"), remove_members=["users/ann"])
        await world.scheduler.UpdateQueue(left, None)
        await world.caught_up()
        yield world


async def create(world, caller, queue, job_id="", spec=None, **more):
    spec = spec or pb.JobSpec(command=["x"], gpus=1)
    request = pb.CreateJobRequest(
        parent=f"queues/{queue}", job_id=job_id, job=pb.Job(spec=spec), wait_for_capacity=True, **more
    )
    with auth.acting_as(caller):
        return await world.scheduler.CreateJob(request, None)


async def answered(world, caller, method, request):
    """What a call comes to, with the question asked that the boundary insists on."""
    with auth.acting_as(caller):
        asked = ownership.watch_questions()
        try:
            return await getattr(world.scheduler, method)(request, None)
        except StatusError as error:
            return error
        finally:
            assert asked.yes, f"{method} did not ask"


async def first(world, caller, method, *given):
    """The first answer of a stream, or why there is none."""
    with auth.acting_as(caller):
        asked = ownership.watch_questions()
        stream = getattr(world.scheduler, method)(*given, None)
        async with contextlib.aclosing(stream):
            try:
                async with asyncio.timeout(15):
                    return await anext(stream, None)
            except StatusError as error:
                return error
            finally:
                assert asked.yes, f"{method} did not ask"


@pytest.fixture(scope="module")
def table():
    return [(name, queue, MAY[name][i]) for name in CALLERS for i, queue in enumerate(QUEUES)]


async def test_a_job_is_there_for_who_sees_it_and_absent_in_the_same_words_for_others(table):
    async with fleet() as world:
        for caller, queue, may in table:
            for method, request in (("GetJob", pb.GetJobRequest), ("ExplainJob", pb.ExplainJobRequest)):
                found = await answered(world, CALLERS[caller], method, request(name=f"queues/{queue}/jobs/j"))
                if "s" in may:
                    assert not isinstance(found, StatusError), (caller, queue, method)
                    job = found if method == "GetJob" else found.job
                    assert (SECRET in str(found)) == ("r" in may), (caller, queue)
                    assert (job.spec.gpus, job.submitter, list(job.spec.command) != []) == (1, "user/ann", "r" in may)
                else:
                    absent = await answered(world, CALLERS[caller], method, request(name=f"queues/{queue}/jobs/x"))
                    assert isinstance(found, NotFound), (caller, queue)
                    assert found.message.replace("jobs/j", "jobs/x") == absent.message, (
                        "nothing tells it from an absent one"
                    )


@pytest.mark.parametrize("method", CHANGES)
async def test_a_job_is_changed_by_its_owner_its_team_and_operators(table, method):
    for caller, queue, may in table:
        if CALLERS[caller].role in ("viewer",):
            continue  # the role table refuses
        async with fleet() as world:
            name = f"queues/{queue}/jobs/j"
            if method == "DeleteJob" and "c" in may:
                await world.scheduler.CancelJob(pb.CancelJobRequest(name=name), None)
            before = await world.store.list("/whaleflux/v1/jobs/")
            found = await answered(world, CALLERS[caller], method, CHANGES[method](name=name))
            after = (await world.store.list("/whaleflux/v1/jobs/")).revision
            assert isinstance(found, StatusError) == ("c" not in may), (caller, queue, found)
            reasons = {"c": "", "s": "NOT_OWNER", "": "JOB_NOT_FOUND"}
            assert getattr(found, "reason", "") == reasons["c" if "c" in may else may[:1]], (caller, queue, found)
            assert "c" in may or after == before.revision, "nothing was changed"


async def test_a_refusal_names_the_owner_and_how_to_get_access():
    async with fleet() as world:
        found = await answered(world, EVE, "CancelJob", pb.CancelJobRequest(name="queues/open/jobs/j"))
        assert "belongs to user/ann; ask them, an operator" in found.message


async def test_output_and_sessions_are_for_those_who_read_and_change_it(table):
    async with fleet() as world:
        await world.add(node("s/a"))
        for queue in QUEUES:
            await world.reaches(f"queues/{queue}/jobs/j", "RUNNING")
        for caller, queue, may in table:
            name = f"queues/{queue}/jobs/j"
            refused = PermissionDenied if "s" in may else NotFound
            logs = await first(world, CALLERS[caller], "StreamLogs", pb.StreamLogsRequest(name=name, attempt=9))
            assert isinstance(logs, InvalidArgument if "r" in may else refused), (caller, queue, logs)
            attached = await first(world, CALLERS[caller], "AttachJob", opens(name))
            assert isinstance(attached, InvalidArgument if "c" in may else refused), (caller, queue, attached)


async def opens(name):
    yield pb.AttachJobRequest(open=pb.AttachOpen(name=name, rank=9, port=1))


async def test_lists_watches_allocations_and_history_leave_out_what_is_not_there(table):
    async with fleet() as world:
        await world.add(node("s/a"))
        for queue in QUEUES:
            await world.reaches(f"queues/{queue}/jobs/j", "RUNNING")
        for caller, queue, may in table:
            name = f"queues/{queue}/jobs/j"
            with auth.acting_as(CALLERS[caller]):
                listed = await world.scheduler.ListJobs(pb.ListJobsRequest(), None)
                held = await world.scheduler.ListAllocations(pb.ListAllocationsRequest(), None)
                watched = await until_bookmark(world.scheduler.WatchJobs(pb.WatchJobsRequest(), None))
            for found in (
                [job.name for job in listed.jobs],
                [one.job for one in held.allocations],
                [job.name for job in watched],
            ):
                assert (name in found) == ("s" in may), (caller, queue, found)
            assert (SECRET in str([job for job in (*listed.jobs, *watched) if job.name == name])) == ("r" in may)


async def until_bookmark(stream):
    """The jobs that a watch begins with."""
    found = []
    async with contextlib.aclosing(stream):
        async for change in stream:
            if change.HasField("bookmark"):
                return found
            found.append(change.added)


async def test_pages_go_on_over_what_is_left_out():
    async with fleet() as world:
        for i in range(12):
            await create(world, ANN if i % 3 == 0 else MATE, "open" if i % 3 == 0 else "team", f"p{i}")
        await world.caught_up()
        found, token = [], ""
        while True:
            with auth.acting_as(EVE):
                page = await world.scheduler.ListJobs(pb.ListJobsRequest(page_size=2, page_token=token), None)
            found += [job.name for job in page.jobs]
            token = page.next_page_token
            if not token:
                break
            assert len(page.jobs) == 2
        assert sorted(found) == sorted(f"queues/open/jobs/{job}" for job in ("j", "p0", "p3", "p6", "p9"))


async def test_a_queue_that_is_not_there_takes_no_jobs_and_is_not_told():
    async with fleet() as world:
        messages = set()
        for queue in ("team", "absent"):
            for validate_only in (True, False):
                with pytest.raises(NotFound) as refused:
                    await create(world, EVE, queue, "new", validate_only=validate_only)
                messages.add(refused.value.message.replace("team", "absent"))
            with auth.acting_as(EVE), pytest.raises(NotFound) as unseen:
                await world.scheduler.GetQueue(pb.GetQueueRequest(name=f"queues/{queue}"), None)
            messages.add(unseen.value.message.replace("team", "absent"))
        assert len(messages) == 2, "one for each method"
        with auth.acting_as(EVE):
            listed = await world.scheduler.ListQueues(pb.ListQueuesRequest(), None)
            assert [one.name for one in listed.queues] == ["queues/default", "queues/open"]
        assert (await create(world, NAMED, "team", "his")).submitter == "user/carl"


async def test_what_is_not_there_is_no_dependency_and_names_of_others_are_not_replaced():
    async with fleet() as world:
        spec = pb.JobSpec(command=["x"], gpus=1, depends_on=[pb.Dependency(job="team/hidden")])
        with pytest.raises(InvalidArgument, match="there is no job queues/team/jobs/hidden"):
            await create(world, EVE, "open", "d", spec)
        with pytest.raises(AlreadyExists) as taken:
            await create(world, EVE, "open", "j")
        assert "--replace" not in taken.value.message
        ended = await world.scheduler.CancelJob(pb.CancelJobRequest(name="queues/open/jobs/j"), None)
        with pytest.raises(PermissionDenied, match="belongs to user/ann"):
            await create(world, EVE, "open", "j", replaces=ended.etag)
        assert (await create(world, ANN, "open", "j", replaces=ended.etag)).state == pb.JOB_STATE_QUEUED


async def test_one_request_id_with_the_same_content_is_two_jobs_of_two_people():
    async with fleet() as world:
        mine = await create(world, ANN, "open", "same", request_id="r")
        with pytest.raises(AlreadyExists):
            await create(world, EVE, "open", "same", request_id="r")
        assert (await create(world, ANN, "open", "same", request_id="r")).uid == mine.uid


async def test_priorities_of_users_are_capped_and_those_of_operators_are_not():
    async with fleet() as world:
        await world.scheduler.UpdateQueue(most("open", 200), None)
        await world.caught_up()
        high = pb.JobSpec(command=["x"], gpus=1, priority=201)
        with pytest.raises(PermissionDenied, match="above the 200") as refused:
            await create(world, EVE, "open", "h", high)
        assert refused.value.reason == "PRIORITY_CAPPED"
        assert (await create(world, CALLERS["operator"], "open", "h", high)).spec.priority == 201
        name = (await create(world, EVE, "open", "low")).name
        with auth.acting_as(EVE):
            await world.scheduler.SetJobPriority(pb.SetJobPriorityRequest(name=name, priority=200), None)
            with pytest.raises(PermissionDenied, match="ask an operator"):
                await world.scheduler.SetJobPriority(pb.SetJobPriorityRequest(name=name, priority=201), None)
        await world.scheduler.SetJobPriority(pb.SetJobPriorityRequest(name=name, priority=1000), None)


def most(queue, priority):
    request = pb.UpdateQueueRequest(queue=pb.Queue(name=f"queues/{queue}", max_priority=priority))
    request.update_mask.paths.append("max_priority")
    return request


async def test_only_the_router_submits_for_others_and_within_what_they_may():
    async with fleet() as world:
        high = pb.JobSpec(command=["x"], gpus=1, priority=500)
        with pytest.raises(InvalidArgument, match="on_behalf_of"):
            await create(world, CALLERS["admin"], "open", "r", high, on_behalf_of="user/eve")
        router = who("inference_router", "1")
        made = await create(world, router, "open", "r", high, on_behalf_of="user/eve")
        assert (made.submitter, made.spec.priority, made.cause.actor) == ("user/eve", 100, "inference_router/1")
        made = await create(world, router, "open", "o", high, on_behalf_of="operator/op")
        assert made.spec.priority == 500
        with pytest.raises(InvalidArgument):
            await create(world, router, "open", "x", high, on_behalf_of="agent/a/n1")


async def test_a_token_for_some_queues_says_so():
    async with fleet() as world:
        scoped = who("user", "ci", queues=frozenset({"ci"}))
        with pytest.raises(PermissionDenied, match="this token is for queues/ci alone"):
            await create(world, scoped, "open", "t")


async def test_a_dataset_that_is_for_others_is_refused_like_an_absent_one():
    async with fleet() as world:
        world.inventory.datasets["datasets/hers"] = inventory_pb2.Dataset(
            name="datasets/hers", owner="user/ann", members=["groups/research"]
        )
        said = []
        for dataset in ("hers", "none"):
            with pytest.raises(InvalidArgument) as refused:
                await create(world, EVE, "open", "d", pb.JobSpec(command=["x"], gpus=1, datasets=[dataset]))
            said.append(refused.value.message.replace("hers", "none"))
        assert said[0] == said[1]
        for caller in (ANN, MATE):
            await create(world, caller, "open", f"d{caller.name}", pb.JobSpec(command=["x"], gpus=1, datasets=["hers"]))


class TestWatch:
    async def test_changes_of_others_do_not_come_and_what_ceases_to_be_there_is_told_as_deleted(self):
        async with fleet() as world:
            seen = Watching(world, who("user", "dan"))
            await seen.until(lambda: seen.synced)
            assert seen.names == {"queues/open/jobs/j"}
            await create(world, MATE, "team", "more")
            await create(world, EVE, "open", "more")
            await seen.until(lambda: "queues/open/jobs/more" in seen.names)
            assert seen.names == {"queues/open/jobs/j", "queues/open/jobs/more"}
            await world.scheduler.CancelJob(pb.CancelJobRequest(name="queues/team/jobs/hidden"), None)
            await world.scheduler.DeleteJob(pb.DeleteJobRequest(name="queues/team/jobs/hidden"), None)
            await world.scheduler.CancelJob(pb.CancelJobRequest(name="queues/open/jobs/j"), None)
            await world.scheduler.DeleteJob(pb.DeleteJobRequest(name="queues/open/jobs/j"), None)
            await seen.until(lambda: seen.deleted)
            assert seen.deleted == ["queues/open/jobs/j"], "nothing of a deletion in a queue that is not there"
            seen.task.cancel()

    async def test_who_sees_other_queues_than_before_is_told_to_list_again(self):
        async with fleet() as world:
            seen = Watching(world, who("user", "dan"))
            await seen.until(lambda: seen.synced)
            came = pb.UpdateQueueRequest(queue=pb.Queue(name="queues/team"), add_members=["users/dan"])
            await world.scheduler.UpdateQueue(came, None)
            await asyncio.sleep(1.1)
            await create(world, EVE, "open", "any")
            await seen.until(seen.task.done)
            assert isinstance(seen.task.exception(), Compacted)


class Watching:
    """A watch of all jobs that runs beside."""

    def __init__(self, world, caller):
        self.names, self.deleted, self.synced = set(), [], False
        with auth.acting_as(caller):
            self.task = asyncio.create_task(self._run(world.scheduler.WatchJobs(pb.WatchJobsRequest(), None)))

    async def _run(self, stream):
        async with contextlib.aclosing(stream):
            async for change in stream:
                match change.WhichOneof("event"):
                    case "added" | "modified" as which:
                        self.names.add(getattr(change, which).name)
                    case "deleted":
                        self.deleted.append(change.deleted)
                    case "bookmark":
                        self.synced = True

    async def until(self, true):
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.01)


def test_texts_name_no_job_that_is_not_there():
    def access(queue):
        return {"open": ownership.OPEN}.get(queue, ownership.Access(frozenset({"groups/x"})))

    from whaleflux.trust.sight import OTHERS_JOB, Sight

    sight = Sight(EVE, access)
    job = pb.Job(
        name="queues/open/jobs/mine", submitter="user/eve", state_message="makes room for queues/secret/jobs/top"
    )
    job.cause.resource = "queues/secret/jobs/top"
    job.claim.victims.extend(["queues/secret/jobs/v", "queues/open/jobs/w"])
    job.decision.ahead.extend(["queues/secret/jobs/a", "queues/open/jobs/b"])
    job.decision.reasons.append(
        "idle GPUs may be kept for queues/secret/jobs/a, queues/open/jobs/b, for which others stop"
    )
    job.attempt.end_reason = "preempted: makes room for queues/secret/jobs/top"
    shown = job_privacy.shown(job, sight, "open")
    assert "secret" not in str(shown)
    assert list(shown.claim.victims) == [OTHERS_JOB, "queues/open/jobs/w"]
    assert (
        shown.decision.reasons[0]
        == f"idle GPUs may be kept for {OTHERS_JOB}, queues/open/jobs/b, for which others stop"
    )
    assert shown.state_message == f"makes room for {OTHERS_JOB}"


def test_why_somebody_holds_a_job_is_for_those_who_read_it():
    """Its hold shows who and since when; the words in which it waits say no more than that."""
    from whaleflux.trust.sight import Sight

    sight, why = Sight(EVE, lambda queue: ownership.OPEN), "waits: held by user/ann: lawyers look at it"
    job = pb.Job(name="queues/open/jobs/hers", submitter="user/ann", state=pb.JOB_STATE_QUEUED, state_message=why)
    job.hold.by, job.hold.reason = "user/ann", "lawyers look at it"
    job.decision.summary = why
    noted = pb.JobDecision(kind=pb.DECISION_KIND_WAITS, message=why.removeprefix("waits: "))
    (told,) = job_privacy.shown_history([noted], sight, job.name, reads=False)
    shown = job_privacy.shown(job, sight, "open")
    assert "lawyers" not in f"{shown}{told}"
    assert shown.state_message == shown.decision.summary == "waits: held by user/ann"
    assert told.message == "held by user/ann"


def test_texts_name_no_reservation_that_is_not_there():
    from whaleflux.trust.sight import OTHERS_RESERVATION, Sight

    def access(queue):
        return ownership.OPEN if queue == "open" else ownership.Access(frozenset({"groups/x"}))

    kept = {"reservations/launch": "secret", "reservations/power": "", "reservations/ours": "open"}
    job = pb.Job(name="queues/open/jobs/mine", submitter="user/eve", state=pb.JOB_STATE_SUSPENDING)
    job.state_message = "makes room for reservations/launch"
    job.decision.reasons.append("GPUs are kept for reservations/launch, reservations/power, reservations/ours")
    shown = job_privacy.shown(job, Sight(EVE, access, kept.get), "open")
    assert shown.state_message == f"makes room for {OTHERS_RESERVATION}"
    told = f"GPUs are kept for {OTHERS_RESERVATION}, reservations/power, reservations/ours"
    assert list(shown.decision.reasons) == [told]


def test_which_data_a_job_reads_is_its_own_business():
    from whaleflux.trust.sight import Sight

    def shown(caller):
        job = pb.Job(name="queues/open/jobs/mine", submitter="user/ann", state=pb.JOB_STATE_QUEUED)
        job.decision.summary, job.state_message = (
            "waits: no room",
            "waits: no room; its data is there: datasets/secret on n",
        )
        job.decision.reasons.extend(["its data is there: datasets/secret on n", "near its old nodes"])
        return job_privacy.shown(job, Sight(caller, lambda _: ownership.OPEN, lambda _: ""), "open")

    assert "datasets/secret" in str(shown(ANN)) and len(shown(ANN).decision.reasons) == 2
    others = shown(EVE)
    assert (others.state_message, list(others.decision.reasons)) == ("waits: no room", ["near its old nodes"])


def test_every_field_of_a_job_is_public_or_private_on_purpose():
    """A field that is new is private; whoever finds it missing here says which it is."""
    private = {
        "JobSpec": "command image datasets require_local_data partial_data datasets_by_rank environment retry checkpoint working_directory stop_on_nan setup code "
        "parallelism training depends_on secrets secrets_groups",
        "Job": "traceparent loss request_fingerprint request_key claim awaits ray",
        "Attempt": "rendezvous traceparent restore_checkpoint loss remote_datasets split",
        "Task": "message endpoint stuck isolation",
    }
    for name, public in job_privacy.PUBLIC.items():
        fields = {field.name for field in getattr(pb, name).DESCRIPTOR.fields}
        assert fields == public | set(private[name].split()), f"{name}: are they others' business? (job_privacy.py)"


def test_every_method_about_a_job_is_in_these_tables():
    scheduler = {
        m.rpartition("/")[2]
        for m, rule in owners.TABLE.items()
        if "Scheduler" in m and rule.asks is owners.Asks.SERVICER
    }
    elsewhere = {"GetCode", "DownloadCode"}  # test_scheduler_code.py
    tested = {
        *CHANGES,
        "GetJob",
        "ExplainJob",
        "ListJobs",
        "WatchJobs",
        "ListAllocations",
        "ListJobHistory",
        "StreamLogs",
        "AttachJob",
    }
    reservations = {f"{verb}Reservation" for verb in ("Create", "Get", "Update", "Delete")} | {"ListReservations"}
    clusters = {f"{verb}RayCluster" for verb in ("Create", "Get", "Update", "Delete")} | {
        "ListRayClusters"
    }  # test_ray_loop.py
    assert scheduler == tested | elsewhere | reservations | clusters | {"CreateJob", "GetQueue", "ListQueues"}
