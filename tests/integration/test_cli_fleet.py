"""The command line against made-up services behind a real gRPC server: what is shown, asked, refused, and how it ends."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime

import pytest

from tests.support.acting import Unowned
from whaleflux.cli import __main__ as program
from whaleflux.cli.state import GLOBAL, complete, complete_jobs
from whaleflux.errors import AlreadyExists, FailedPrecondition, NotFound, StatusError, Unavailable
from whaleflux.events.memory import MemoryBus
from whaleflux.events.subjects import Subject
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles
from whaleflux.rpc.server import Server
from whaleflux.v1 import checkpoint_pb2 as ckpt
from whaleflux.v1 import (
    checkpoint_pb2_grpc,
    events_pb2_grpc,
    health_pb2_grpc,
    inventory_pb2_grpc,
    router_pb2_grpc,
    scheduler_pb2_grpc,
    types_pb2,
)
from whaleflux.v1 import events_pb2 as ev
from whaleflux.v1 import health_pb2 as health
from whaleflux.v1 import inventory_pb2 as inv
from whaleflux.v1 import router_pb2 as rout
from whaleflux.v1 import scheduler_pb2 as sched
from whaleflux_inventory.event_history import EventHistory

NODE = "sites/onprem/nodes/n1"
JOB = "queues/default/jobs/j1"
CA = CertificateAuthority.create(datetime.now(UTC))


def at(message, field, ago_s):
    getattr(message, field).FromSeconds(int(time.time() - ago_s))
    return message


def node():
    made = at(inv.Node(name=NODE, intent=inv.NODE_INTENT_ACTIVE), "create_time", 3600)
    made.facts.simulated = True
    made.facts.price.usd_per_gpu_hour = 2.5
    for index in range(8):
        made.facts.gpus.add(index=index, uuid=f"GPU-{index}", model="H200", healthy=True, memory_bytes=141 * 10**9)
    return made


HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x9b1A\u202e\n12:00:00  SUCCEEDED queues/default/jobs/forged"
HAPPENED = [  # resource, what, message, who, seconds ago when the tests begin: they take a minute
    (NODE, "CREATED", "joined with 8 GPU(s)", "agent/onprem/n1", 3600),
    (NODE, "READY", "signs of life arrive", "health_monitor/alive", 3590),
    (JOB, "QUEUED", "", "user/ann", 3400),
    (JOB, "RUNNING", "runs on 1 node", "scheduler/start", 3300),
    (JOB, "RECOVERING", HOSTILE, "scheduler/exit", 1500),
    ("incidents/i1", "OPENED", "n1 is silent", "health_monitor/node-lost", 1400),
    ("incidents/i1", "FENCED", "n1 is silent", "health_monitor/node-lost", 1390),
    (f"{JOB}/checkpoints/s100", "COMMITTED", "step 100", "checkpoint", 160),
    ("queues/default/jobs/gone", "DELETED", "its record is deleted", "user/ann", 100),
]


GONE = "queues/default/jobs/gone"


def account(name, attempt, state, usd, gpu_h, **more):
    made = sched.AccountRecord(
        job=name, uid=f"u-{name[-2:]}", attempt=attempt, state=state, gpus=4, cost_usd=usd, **more
    )
    made.gpu_s, made.attempts, made.submitter, made.step = gpu_h * 3600, 2, "user/ann", 120
    made.gpus_by_model["H200"] = 4
    made.nodes.append(NODE)
    made.node_count = 1
    for field, ago_s in (("create_time", 7300), ("start_time", 7200), ("end_time", 3600)):
        at(made, field, ago_s)
    return made


ACCOUNTS = [
    account(GONE, 0, sched.JOB_STATE_SUCCEEDED, 40.0, 16),
    account(GONE, 2, sched.JOB_STATE_SUCCEEDED, 30.0, 12, end_reason="done: all ranks ended well"),
    account(GONE, 1, sched.JOB_STATE_RECOVERING, 10.0, 4, end_reason="exit: boom", exit_code=-9),
    account(JOB, 0, sched.JOB_STATE_FAILED, 2.5, 1, end_reason="its budget is spent", exit_code=1),
]


async def kept_events():
    """A bus that keeps what happened; told late and in another order than it happened."""
    bus = MemoryBus()
    for number, (resource, what, message, who, ago_s) in enumerate(reversed(HAPPENED)):
        event = at(ev.Event(id=f"{number}", resource=resource, what=what, message=message), "time", ago_s)
        event.cause.actor = who
        await bus.publish(str(Subject.of(resource, what)), event.SerializeToString(), id=event.id)
    return bus


def job(state=sched.JOB_STATE_RUNNING):
    made = at(sched.Job(name=JOB, state=state, step=120, loss=1.5, cost_usd=3.25, epoch=2, etag=f'"{state}"'), "create_time", 600)  # fmt: skip
    made.spec.gpus = 4
    made.attempt.epoch = 2
    made.attempt.tasks.append(sched.Task(node=NODE, gpu_uuids=["GPU-0", "GPU-1", "GPU-2", "GPU-3"]))
    return at(made, "end_time", 5) if state == sched.JOB_STATE_SUCCEEDED else made


def logged(data, *, rank=0, epoch=1, behind=0):
    return sched.StreamLogsResponse(rank=rank, epoch=epoch, data=data, next_offset=behind)


class Inventory(inventory_pb2_grpc.InventoryServiceServicer):
    def __init__(self):
        self.drained, self.declared = [], []

    async def ListNodes(self, request, context):
        return inv.ListNodesResponse(nodes=[node()])

    async def GetNode(self, request, context):
        if request.name != NODE:
            raise NotFound("node", request.name)
        return node()

    async def ListSites(self, request, context):
        return inv.ListSitesResponse(sites=[inv.Site(name="sites/onprem")])

    async def ListDatasets(self, request, context):
        return inv.ListDatasetsResponse(datasets=[inv.Dataset(name="datasets/c4", size_bytes=10**12)])

    async def GetDataset(self, request, context):
        holds = inv.DatasetCopy(node=NODE, present_bytes=10**12, state=inv.DATASET_COPY_STATE_READY)
        full = inv.DatasetCopy(node=NODE + "2", state=inv.DATASET_COPY_STATE_FAILED, message="the disk is full")
        return inv.Dataset(name=request.name, copies=[holds, full], manifest_digest="ab" * 32, file_count=3)

    async def CreateDataset(self, request, context):
        self.declared.append((request.dataset_id, request.dataset.uri, request.dataset.size_bytes))
        return inv.Dataset(name=f"datasets/{request.dataset_id}")

    async def ListJoinTokens(self, request, context):
        return inv.ListJoinTokensResponse(join_tokens=[inv.JoinToken(name="joinTokens/t1", site="sites/onprem")])

    async def CreateJoinToken(self, request, context):
        return inv.JoinToken(name="joinTokens/t2", site=request.site, secret="t2.secret")

    async def DrainNode(self, request, context):
        self.drained.append((request.name, request.reason))
        return node()

    async def WatchNodes(self, request, context):
        yield inv.WatchNodesResponse(added=node())
        yield inv.WatchNodesResponse(bookmark=types_pb2.Bookmark())
        await asyncio.sleep(60)


class Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(self):
        self.created, self.ends = [], True
        self.held, self.priorities, self.queue_changes = [], [], []
        self.log_answers, self.logs_asked = [], []  # for each call of StreamLogs: what it gives, and what it was asked

    async def ListJobs(self, request, context):
        return sched.ListJobsResponse(jobs=[job()])

    async def ListJobHistory(self, request, context):
        kept = [record for record in ACCOUNTS if request.job in ("", record.job)]
        shown = [record for record in kept if request.show_attempts or not record.attempt]
        if not request.page_token:  # pages, the last of which is empty
            return sched.ListJobHistoryResponse(records=shown[:1], next_page_token="1")
        return sched.ListJobHistoryResponse(records=shown[1:] if request.page_token == "1" else [])

    async def ListQueues(self, request, context):
        return sched.ListQueuesResponse(queues=[sched.Queue(name="queues/default", weight=1)])

    async def UpdateQueue(self, request, context):
        self.queue_changes.append((request.queue.name, request.queue.max_gpus, list(request.update_mask.paths)))
        return request.queue

    async def ListReservations(self, request, context):
        kept = sched.Reservation(name="reservations/kernel", maintenance=True, nodes=[NODE])
        return sched.ListReservationsResponse(reservations=[kept])

    async def ListAllocations(self, request, context):
        return sched.ListAllocationsResponse(allocations=[sched.Allocation(job=JOB, task=job().attempt.tasks[0])])

    async def GetJob(self, request, context):
        if request.name != JOB:
            raise NotFound("job", request.name)
        return job()

    async def ExplainJob(self, request, context):
        return sched.ExplainJobResponse(job=job(), decision=self.decision())

    def decision(self):
        made = sched.Decision(placed=True, summary="4 x H200 on 1 node, site onprem", usd_per_hour=10, reasons=["one NVLink island"])  # fmt: skip
        made.alternatives.add(summary="cloud-a", relative_communication=2.1, usd_per_hour=20)
        return made

    async def CreateJob(self, request, context):
        if request.job_id == "taken":
            raise AlreadyExists("job", f"{request.parent}/jobs/taken")
        self.created.append(request)
        return sched.Job(name=JOB, state=sched.JOB_STATE_QUEUED, decision=self.decision())

    async def CancelJob(self, request, context):
        raise FailedPrecondition(f"{request.name} has ended")

    async def HoldJob(self, request, context):
        if request.name != JOB:
            raise NotFound("job", request.name)
        self.held.append((request.name, request.reason))
        return job(sched.JOB_STATE_QUEUED)

    async def SetJobPriority(self, request, context):
        self.priorities.append((request.name, request.priority))
        return job()

    async def RequeueJob(self, request, context):
        assert request.hold
        return job(sched.JOB_STATE_SUSPENDING)

    async def StreamLogs(self, request, context):
        self.logs_asked.append([(known.rank, known.epoch, known.offset) for known in request.after])
        for answer in self.log_answers.pop(0) if self.log_answers else [logged(b"step 1\nstep 2\n")]:
            if isinstance(answer, StatusError):
                raise answer
            yield answer

    async def WatchJobs(self, request, context):
        yield sched.WatchJobsResponse(added=job())
        yield sched.WatchJobsResponse(bookmark=types_pb2.Bookmark())
        if self.ends:
            yield sched.WatchJobsResponse(modified=job(sched.JOB_STATE_SUCCEEDED))
        await asyncio.sleep(60)


class Health(health_pb2_grpc.HealthServiceServicer):
    def healthy(self):
        return at(health.NodeHealth(name=NODE, phase=health.NODE_PHASE_READY), "transition_time", 3000)

    async def ListNodeHealth(self, request, context):
        return health.ListNodeHealthResponse(node_health=[self.healthy()])

    async def GetNodeHealth(self, request, context):
        return self.healthy()

    async def ListIncidents(self, request, context):
        found = health.Incident(name="incidents/i1", kind=1, nodes=[NODE], jobs=[JOB], message="silent for 5 s")
        return health.ListIncidentsResponse(incidents=[at(at(found, "start_time", 300), "fence_time", 290)])

    async def WatchNodeHealth(self, request, context):
        yield health.WatchNodeHealthResponse(added=self.healthy())
        yield health.WatchNodeHealthResponse(bookmark=types_pb2.Bookmark())
        await asyncio.sleep(60)


class Checkpoint(checkpoint_pb2_grpc.CheckpointServiceServicer):
    async def ListCheckpoints(self, request, context):
        found = ckpt.Checkpoint(name=f"{JOB}/checkpoints/s100", state=ckpt.CHECKPOINT_STATE_COMMITTED, step=100)
        return ckpt.ListCheckpointsResponse(checkpoints=[at(found, "create_time", 200)])


class Router(router_pb2_grpc.RouterServiceServicer):
    def __init__(self):
        self.models = {}

    async def ListModels(self, request, context):
        listed = rout.Model(name="models/m", ready_replicas=1, replicas=rout.ReplicaCount(min=2))
        return rout.ListModelsResponse(models=[listed])

    async def GetModel(self, request, context):
        if request.name not in self.models:
            raise NotFound("model", request.name)
        return self.models[request.name]

    async def CreateModel(self, request, context):
        made = rout.Model()
        made.CopyFrom(request.model)
        made.name, made.etag = f"models/{request.model_id}", '"1"'
        if not request.validate_only:
            self.models[made.name] = made
        return made

    async def UpdateModel(self, request, context):
        assert request.model.etag == self.models[request.model.name].etag
        self.models[request.model.name] = request.model
        return request.model

    async def EstimateDeployment(self, request, context):
        return rout.EstimateDeploymentResponse(sites=[rout.SiteEstimate(replicas=1, why="it was never pulled")])

    async def ListReplicas(self, request, context):
        one = rout.Replica(name="models/m/replicas/m-0", state=rout.REPLICA_STATE_READY, address="h:1", in_flight=3)
        return rout.ListReplicasResponse(replicas=[one])

    async def Route(self, request, context):
        answer = rout.RouteResponse()
        answer.ranking.add(replica="models/m/replicas/m-0", address="h:1", score=1.5, reasons=["3 in flight"])
        answer.excluded.add(replica="models/m/replicas/m-1", reason="it is STARTING")
        return answer

    async def ListApiKeys(self, request, context):
        return rout.ListApiKeysResponse(api_keys=[rout.ApiKey(name="apiKeys/k1", display_name="ci")])

    async def CreateApiKey(self, request, context):
        return rout.ApiKey(name="apiKeys/k2", secret="wf-secret")


class Fleet:
    """All services on one port, in a thread of their own; the context file names it."""

    def __init__(self, folder):
        self.inventory, self.scheduler, self.router = Inventory(), Scheduler(), Router()
        self.context = folder / "context.json"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self._do(self._start())
        files = TlsFiles.under(folder, "admin")
        files.save(CA.issue("admin", "ann", datetime.now(UTC)))
        content = {"server": f"127.0.0.1:{self.server.port}", "ca": files.roots, "cert": files.chain, "key": files.key, "api_key": "wf-x"}  # fmt: skip
        self.context.write_text(json.dumps({key: str(value) for key, value in content.items()}))

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self):
        server = Server(CA.issue("frontdoor", "t", datetime.now(UTC)), Authority())
        for add, servicer, name in (
            (inventory_pb2_grpc.add_InventoryServiceServicer_to_server, self.inventory, "InventoryService"),
            (scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, self.scheduler, "SchedulerService"),
            (health_pb2_grpc.add_HealthServiceServicer_to_server, Health(), "HealthService"),
            (checkpoint_pb2_grpc.add_CheckpointServiceServicer_to_server, Checkpoint(), "CheckpointService"),
            (router_pb2_grpc.add_RouterServiceServicer_to_server, self.router, "RouterService"),
            (events_pb2_grpc.add_EventServiceServicer_to_server, EventHistory(await kept_events()), "EventService"),
        ):
            server.add(add, Unowned(servicer), f"whaleflux.v1.{name}")
        server.bind("127.0.0.1:0")
        await server.start()
        return server

    def stop(self):
        self._do(self.server.drain(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.stop()


@pytest.fixture
def cli(shared, monkeypatch, capsys):
    """Runs one command in this process; gives exit code, stdout and stderr."""
    monkeypatch.setenv("WHALEFLUX_CONTEXT", str(shared.context))

    def run(*args, stdin="", tty=False):
        source = io.StringIO(stdin)
        source.isatty = lambda: tty
        monkeypatch.setattr(sys, "argv", ["whaleflux", *args])
        monkeypatch.setattr(sys, "stdin", source)
        try:
            program.main()
        except SystemExit as ended:
            code = ended.code or 0
        else:
            code = 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


READS = [
    (("nodes",), NODE, "2.50"),
    (("gpus",), "H200", "141 GB"),
    (("sites",), "sites/onprem", ""),
    (("incidents",), "incidents/i1", "silent for 5 s"),
    (("datasets",), "datasets/c4", "1 TB"),
    (("jobs",), JOB, "1.5000"),
    (("queue", "ls"), "queues/default", "4"),
    (("checkpoints",), f"{JOB}/checkpoints/s100", "COMMITTED"),
    (("models",), "models/m", "1/2"),
    (("replicas",), "models/m/replicas/m-0", "READY"),
    (("keys", "list"), "apiKeys/k1", "ci"),
    (("token", "list"), "joinTokens/t1", "sites/onprem"),
]


class TestReads:
    @pytest.mark.parametrize(("command", "name", "shown"), READS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")  # fmt: skip
    def test_every_table_has_its_json_twin(self, cli, command, name, shown):
        code, table, notes = cli(*command)
        assert (code, notes) == (0, "")
        header, *rows = table.splitlines()
        assert header == header.upper()
        assert name in rows[0]
        assert shown in rows[0]
        code, text, _ = cli(*command, "-o", "json")
        (one,) = json.loads(text)
        assert code == 0
        assert one.get("name", one.get("model")) == name
        assert not [key for key in one if key != key.lower()], "the contract's own field names"
        assert cli(*command, "-o", "name")[1] == f"{name}\n"
        assert [r.split() for r in cli(*command, "--no-headers")[1].splitlines()] == [r.split() for r in rows]
        assert name in cli(*command, "-o", "wide")[1]

    def test_status_counts(self, cli):
        code, text, _ = cli("status")
        assert code == 0
        assert "1 READY" in text
        assert "4 of 8 held" in text
        counts = json.loads(cli("status", "-o", "json")[1])["gpus"]
        assert (counts["total"], counts["held"], counts["free"]) == (8, 4, 4)

    def test_gpus_say_what_is_free_and_that_they_are_simulated(self, cli):
        (row,) = json.loads(cli("gpus", "-o", "json")[1])
        assert (row["total"], row["free"], row["held"], row["simulated"]) == (8, 4, 4, True)

    def test_one_job_explained_routed_and_its_logs(self, cli):
        assert "RUNNING" in cli("job", "j1")[1]
        assert json.loads(cli("job", "j1", "-o", "json")[1])["name"] == JOB
        explained = cli("explain", "default/j1")[1]
        assert "because    one NVLink island" in explained
        assert "2.1x the communication" in explained
        assert json.loads(cli("explain", JOB, "-o", "json")[1])["decision"]["placed"]
        _code, ranked, left_out = cli("route", "m")
        assert "3 in flight" in ranked
        assert "it is STARTING" in left_out
        assert cli("config")[1].count("***") == 1
        assert "wf-x" not in cli("config", "-o", "json")[1]
        assert json.loads(cli("version", "-o", "json")[1])["fleet"] == "reachable"

    @pytest.mark.parametrize(
        "command",
        [("jobs",), ("jobs", "-o", "wide"), ("job", "j1"), ("explain", "j1"), ("jobs", "-o", "name")],
        ids=" ".join,
    )
    def test_what_a_job_says_does_not_command_the_terminal(self, cli, monkeypatch, command):
        hostile, calm = "\x1b]0;owned\x07\x1b[2J\r\x9b1A\u202e", job

        def hostile_job(*state):
            made = calm(*state)
            made.state_message = made.cause.message = made.submitter = (
                f"{hostile}\nqueues/default/jobs/forged  SUCCEEDED"
            )
            made.name += hostile
            return made

        monkeypatch.setattr(sys.modules[__name__], "job", hostile_job)
        code, shown, notes = cli(*command)
        assert code == 0
        assert "owned" in shown, "it is shown, as text"
        assert not [c for c in shown + notes if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"]
        assert not [line for line in shown.splitlines() if line.startswith("queues/default/jobs/forged")]

    def test_logs_go_on_where_they_stopped_when_the_leader_changes(self, cli, shared):
        away = Unavailable("this scheduler does not lead", reason="NOT_LEADER", retry_after_s=0.01)
        shared.scheduler.logs_asked.clear()
        shared.scheduler.log_answers += [
            [away],
            [logged(b"step 1\n", behind=109), away],
            [away],
            [logged(b"step 2\n", behind=120), logged(b"step 3\n", epoch=2)],
        ]
        code, shown, notes = cli("logs", "-f", "j1")
        assert (code, shown, notes) == (0, "step 1\nstep 2\nstep 3\n", "")
        assert shared.scheduler.logs_asked == [[], [], [(0, 1, 109)], [(0, 1, 109)]]

    def test_a_fleet_that_answers_is_not_told_to_be_started(self, cli, shared, monkeypatch):
        monkeypatch.setattr("whaleflux.sdk.resume.AGENTS_S", 0.0)
        gone = Unavailable("no agent that ran j1 is connected", reason="NODES_UNREACHABLE")
        shared.scheduler.log_answers += [[gone]]
        code, _, notes = cli("logs", "j1")
        assert code == 3
        assert "whaleflux up" not in notes
        assert "repeat the command" in notes

    def test_lines_of_several_ranks_bear_their_rank(self, cli, shared):
        shared.scheduler.log_answers += [
            [logged(b"loss 1\nloss 2\n", rank=0), logged(b"loss 3\n", rank=1), logged(b"\x1b[2J\n", rank=0)]
        ]
        assert cli("logs", "--rank", "-1", "j1")[1] == "[0] loss 1\n[0] loss 2\n[1] loss 3\n[0] \x1b[2J\n"

    def test_secrets_alone_are_on_stdout(self, cli):
        assert cli("keys", "create", "ci")[1] == "wf-secret\n"
        _code, secret, how = cli("token", "create", "--site", "onprem")
        assert secret == "t2.secret\n"
        assert "whaleflux agent" in how


class TestEvents:
    def test_what_is_kept_in_the_order_in_which_it_happened_with_who(self, cli):
        code, text, notes = cli("events", "-o", "json")
        told = json.loads(text)
        assert (code, notes) == (0, "")
        assert [(t["resource"], t["what"], t["cause"]["actor"]) for t in told] == [
            (r, w, by) for r, w, _, by, _ in HAPPENED
        ]

    def test_for_since_until_what_and_kind_narrow_it(self, cli):
        whats = lambda *more: [row.split(",")[1] for row in cli("events", "-o", "csv", *more)[1].splitlines()[1:]]  # noqa: E731
        assert whats("--for", "job/j1") == ["QUEUED", "RUNNING", "RECOVERING"]
        assert whats("--for", "job/gone") == ["DELETED"]
        assert whats("--for", "node/n1") == ["CREATED", "READY"]
        assert whats("--for", "incident/i1", "--what", "fenced") == ["FENCED"]
        assert whats("--for", "jobs/j1") == ["QUEUED", "RUNNING", "RECOVERING", "COMMITTED"], "a part of a name"
        assert whats("--since", "2500s", "--until", "800s") == ["RECOVERING", "OPENED", "FENCED"]
        assert whats("--kind", "node,checkpoint") == ["CREATED", "READY", "COMMITTED"]
        assert whats("-n", "2") == ["CREATED", "READY"], "the newest by their place, which were told last"
        assert cli("events", "--for", "node/onprem/n1", "-o", "name")[1] == f"{NODE}\n{NODE}\n"

    def test_what_is_wrong_or_unknown_is_said(self, cli):
        code, _, why = cli("events", "--since", "soon")
        assert (code, "5m" in why) == (2, True)
        code, _, why = cli("events", "--kind", "pod")
        assert (code, "jointoken" in why) == (2, True)
        code, _, why = cli("events", "--for", "nope/x")
        assert (code, "TYPE is one of job, node, model, replica, " in why) == (2, True)
        code, _, why = cli("events", "--for", "model/never")
        assert (code, "whaleflux models" in why) == (1, True)

    def test_what_an_event_says_does_not_command_the_terminal(self, cli):
        code, shown, _ = cli("events", "--for", "job/j1")
        assert (code, "owned" in shown) == (0, True)
        assert not [c for c in shown if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"]
        assert len(shown.splitlines()) == 3


class TestHistory:
    def test_jobs_with_totals_and_attempts_where_they_are_asked_for(self, cli):
        code, text, _ = cli("history")
        *table, total = text.splitlines()
        header, gone, failed = (line.split() for line in table)
        assert code == 0
        assert (header[0], gone[0], failed[0]) == ("JOB", GONE, JOB)
        assert (gone[-1], failed[-1]) == ("$40.00", "$2.50")
        assert total == "total: 2 jobs, 4 attempts, 17.00 GPU-hours, $42.50"
        rows = [row.split(",") for row in cli("history", "gone", "-o", "csv")[1].splitlines()]
        assert [row[1] for row in rows] == ["attempt", "0", "1", "2"], "each job before its attempts, in order"
        assert [row[2] for row in rows[1:]] == ["SUCCEEDED", "exit", "done"]
        assert [row[7] for row in rows[1:]] == ["0", "-9", "0"]
        assert "SIGKILL" in cli("history", "gone")[1]
        assert [one["attempt"] for one in json.loads(cli("history", "-a", "-o", "json")[1]) if "attempt" in one] == [
            1,
            2,
        ]
        assert cli("history", "--sort", "cost", "-o", "name")[1].split() == [JOB, GONE]
        for order, first in (("cost", JOB), ("-cost", GONE)):  # of all, not of the newest one
            assert cli("history", "--sort", order, "-n", "1", "-o", "name")[1].split() == [first]

    def test_wrong_filters_and_unknown_jobs(self, cli):
        for wrong in (("--state", "gone"), ("--sort", "colour"), ("--since", "soon"), ("-n", "0")):
            assert cli("history", *wrong)[0] == 2
        code, _, why = cli("history", "never")
        assert (code, "whaleflux jobs" in why) == (1, True)

    def test_one_thing_with_its_story(self, cli):
        code, text, _ = cli("describe", "job", "j1")
        assert code == 0
        assert re.search(r"RECOVERING .*\n(.*\n)*next +whaleflux logs", text)
        assert "user/ann" in text
        gone = cli("describe", "job/gone")[1]
        assert "its record is deleted" in gone
        assert re.search(r"1 +exit +4 x H200.*SIGKILL.*\$10.00", gone)
        node_ = cli("describe", "node", "n1")[1]
        assert "8 x H200 (simulated)" in node_
        assert re.search(rf"held by +{JOB} \(4 GPUs\)", node_)
        assert "agent/onprem/n1" in node_
        told = json.loads(cli("describe", "job", "gone", "-o", "json")[1])
        assert (told["record"], [e["what"] for e in told["events"]]) == (None, ["DELETED"])

    def test_what_is_wrong_or_nowhere_is_said(self, cli):
        assert cli("describe", "pod", "x")[0] == 2
        assert cli("describe", "job")[0] == 2
        for never in (("job", "never"), ("node", "onprem/never"), ("model", "never")):
            code, _, why = cli("describe", *never)
            assert (code, "never" in why) == (1, True)


class TestSubmit:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "job.yaml").write_text("name: new\nrun: python train.py\ngpus: 4\n")
        return str(tmp_path / "job.yaml")

    def test_plan_then_submit_then_follow_to_the_end(self, cli, shared, file):
        shared.scheduler.created.clear()
        code, text, notes = cli("submit", file, "-y")
        assert code == 0
        assert notes.startswith("PLAN  4 x H200 on 1 node")
        assert "why here   one NVLink island" in notes
        assert "preempts   nothing" in notes
        assert re.search(r"-- RUNNING.*\n(.*\n)*-- SUCCEEDED", notes)
        assert text == "step 1\nstep 2\n", "its output and nothing else, for `submit -y >out`"
        assert f"submitted {JOB}" in notes
        dry, real = shared.scheduler.created
        assert (dry.validate_only, real.validate_only) == (True, False)
        assert real.request_id

    def test_a_dry_run_submits_nothing(self, cli, shared, file):
        shared.scheduler.created.clear()
        assert cli("submit", file, "--dry-run")[0] == 0
        assert [request.validate_only for request in shared.scheduler.created] == [True]

    def test_json_goes_to_stdout_and_the_plan_beside_it(self, cli, file):
        _code, text, notes = cli("submit", file, "-y", "-o", "json")
        assert json.loads(text)["name"] == JOB
        assert "PLAN" in notes

    def test_asked_and_declined(self, cli, shared, file):
        shared.scheduler.created.clear()
        code, _text, notes = cli("submit", file, stdin="n\n", tty=True)
        assert code == 1
        assert "nothing was changed" in notes
        assert len(shared.scheduler.created) == 1, "only the plan"

    def test_nobody_to_ask_is_refused_with_the_flag_to_add(self, cli, file):
        for args, stdin in ((("submit", file), ""), (("submit", "-"), "run: x\ngpus: 1\n")):
            code, _, why = cli(*args, stdin=stdin)
            assert code == 2
            assert "-y" in why

    def test_stdin_with_yes(self, cli):
        assert cli("submit", "-", "-y", "-d", stdin="name: new\nrun: x\ngpus: 1\n")[0] == 0

    def test_every_mistake_is_a_line_of_its_own(self, cli):
        code, text, why = cli("submit", "-", "-y", stdin="run: x\ngpus: many\nnam: y\n")
        assert (code, text) == (2, "")
        lines = why.splitlines()
        assert len(lines) == 2
        assert "gpus: must be a whole number" in why
        assert "did you mean 'name'" in why
        assert lines[-1].endswith("whaleflux explain-field")

    def test_validate_needs_no_fleet(self, cli, monkeypatch, file):
        monkeypatch.setenv("WHALEFLUX_CONTEXT", "/nowhere")
        code, _, notes = cli("validate", file)
        assert code == 0
        assert "whaleflux submit" in notes
        assert cli("validate", "-", stdin="a: " + "[" * 5000)[0] == 2


class TestModels:
    def test_deploy_declares_and_then_changes(self, cli, shared, tmp_path):
        file = tmp_path / "model.yaml"
        file.write_text("model: tiny\nengine: {run: 'serve {port}'}\nreplicas: {min: 1}\n")
        code, text, notes = cli("deploy", str(file), "-y")
        assert code == 0
        assert "PLAN  serve tiny with 1 replica(s)" in text and "it was never pulled" in text
        assert "whaleflux replicas tiny" in notes
        file.write_text("model: tiny\nengine: {run: 'serve {port}'}\nreplicas: {min: 3}\n")
        assert "now        1 replica(s)" in cli("deploy", str(file), "-y")[1]
        assert shared.router.models["models/tiny"].replicas.min == 3


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "code", "next_command"),
        [
            (("job", "nope"), 1, "whaleflux jobs"),
            (("cancel", "j1", "-y"), 1, "whaleflux status"),
            (("drain", "nope", "-y"), 2, "whaleflux nodes"),
            (("drain", "n1"), 2, "-y"),
            (("jobs", "-w", "-o", "json"), 2, "WatchJobs"),
        ],
    )
    def test_one_line_that_ends_with_what_to_do(self, cli, args, code, next_command):
        got, text, why = cli(*args)
        assert (got, text) == (code, "")
        assert len(why.splitlines()) == 1
        assert next_command in why
        assert "Traceback" not in why

    def test_taken_names_say_how_to_see_them(self, cli):
        code, _, why = cli("submit", "-", "-y", stdin="name: taken\nrun: x\ngpus: 1\n")
        assert code == 1
        assert why.strip().endswith("whaleflux jobs -a")

    def test_a_fleet_that_is_away_is_exit_code_3_and_completion_stays_silent(self, cli, shared, tmp_path, monkeypatch):
        gone = json.loads(shared.context.read_text()) | {"server": "127.0.0.1:1"}
        (tmp_path / "context.json").write_text(json.dumps(gone))
        monkeypatch.setenv("WHALEFLUX_CONTEXT", str(tmp_path / "context.json"))
        code, _, why = cli("jobs")
        assert code == 3
        assert "whaleflux up" in why
        assert cli("events")[0] == 3
        GLOBAL.context = ""
        began = time.monotonic()
        assert complete(complete_jobs)("") == []
        assert time.monotonic() - began < 5
        monkeypatch.setenv("WHALEFLUX_CONTEXT", str(tmp_path / "none.json"))
        assert complete(complete_jobs)("") == []
        assert cli("jobs")[0] == 2

    def test_verbs_take_several_jobs_and_one_refusal_does_not_stop_the_others(self, cli, shared):
        code, _, notes = cli("hold", "j1", "nope", "-m", "wait")
        assert (code, shared.scheduler.held) == (1, [(JOB, "wait")])
        assert f"whaleflux release {JOB}" in notes
        assert "queues/default/jobs/nope" in notes
        code, _, notes = cli("set-priority", "j1", "q/j2", "500")
        assert (code, shared.scheduler.priorities) == (0, [(JOB, 500), ("queues/q/jobs/j2", 500)])
        assert cli("requeue", "j1", "--hold")[0] == 2  # nobody to ask
        assert f"{JOB} is SUSPENDING" in cli("requeue", "j1", "--hold", "-y")[2]

    def test_a_dataset_is_declared(self, cli, shared, tmp_path):
        code, _, notes = cli("datasets", "add", "c4", "--source", "/mnt/c4", "--size", "3 GB")
        assert (code, shared.inventory.declared) == (0, [("c4", "/mnt/c4", 3 * 10**9)])
        assert "data: dataset:c4" in notes
        assert cli("datasets", "add", "c4", "--source", "/mnt/c4", "--size", "many")[0] == 2
        (tmp_path / "part-0").write_bytes(bytes(2000))
        code, _, notes = cli("datasets", "add", "d4", "--source", str(tmp_path), "--scan")
        assert (code, "1 file, 2 kB" in notes) == (0, True), notes
        assert [size for *_, size in shared.inventory.declared] == [3 * 10**9, 2000]
        assert cli("datasets", "add", "d4", "--source", str(tmp_path / "absent"), "--scan")[0] == 2
        assert cli("datasets", "add", "d4", "--source", str(tmp_path), "--scan", "--size", "1 GB")[0] == 2
        assert "datasets/c4" in cli("datasets", "ls")[1]
        assert "ab" * 32 in cli("datasets", "show", "c4")[1]

    def test_it_is_told_where_a_dataset_is_and_why_not(self, cli, shared):
        table = cli("datasets", "where", "c4")[1]
        assert [line.split()[1] for line in table.splitlines()] == ["STATE", "READY", "FAILED"]
        assert "the disk is full" in table
        assert json.loads(cli("datasets", "where", "c4", "-o", "json")[1])[0]["node"] == NODE

    def test_a_queue_is_changed_in_what_was_given_only(self, cli, shared):
        code, _, notes = cli("queue", "set", "research", "--max-gpus", "8")
        assert (code, shared.scheduler.queue_changes) == (0, [("queues/research", 8, ["max_gpus"])])
        assert "at most 8 GPUs" in notes
        assert cli("queue", "set", "research")[0] == 2

    def test_completion_of_live_names(self, cli):
        GLOBAL.context = ""
        assert complete(complete_jobs)("j") == ["j1"]
        assert complete(complete_jobs)("x") == []

    def test_drain_asks_and_passes_the_reason_on(self, cli, shared):
        code, _, notes = cli("drain", "n1", "-m", "fan", "-y")
        assert code == 0
        assert shared.inventory.drained == [(NODE, "fan")]
        assert "undo with: whaleflux uncordon" in notes


def whaleflux(*args, **environment):
    command = [sys.executable, "-m", "whaleflux.cli", *args]
    return subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=90, env=os.environ | environment
    )


class TestProgram:
    def test_help_is_quick_and_examples_come_first(self):
        took_s = []
        for _ in range(3):
            began = time.monotonic()
            shown = whaleflux("--help")
            took_s.append(time.monotonic() - began)
        assert min(took_s) < 2.0, "0.2 s on a quiet machine"
        assert shown.stdout.index("whaleflux up") < shown.stdout.index("Options:")
        assert "Exit codes" in shown.stdout

    def test_help_imports_nothing_heavy(self):
        heavy = "import sys; import whaleflux.cli.__main__; print([m for m in ('grpc','google.protobuf','yaml','pydantic') if m in sys.modules])"
        shown = subprocess.run([sys.executable, "-c", heavy], capture_output=True, check=True, text=True, timeout=90)
        assert shown.stdout.strip() == "[]"

    @pytest.mark.parametrize("command", ["submit", "jobs", "explain", "logs", "drain", "events", "deploy"])
    def test_examples_stand_before_options(self, cli, command):
        _, shown, _ = cli(command, "-h")
        assert shown.index(f"    whaleflux {command}") < shown.index("Options:")

    def test_no_colour_off_a_terminal_and_none_with_no_color(self, shared):
        plain = whaleflux("job", "nope", WHALEFLUX_CONTEXT=str(shared.context))
        assert (plain.returncode, "\033[" in plain.stderr) == (1, False)
        assert "\033[31m" in on_a_terminal(shared, {})
        assert "\033[" not in on_a_terminal(shared, {"NO_COLOR": "1"})

    def test_ctrl_c_while_following(self, shared, tmp_path):
        (tmp_path / "job.yaml").write_text("name: new\nrun: x\ngpus: 1\n")
        shared.scheduler.ends = False
        process = subprocess.Popen(
            [sys.executable, "-m", "whaleflux.cli", "submit", str(tmp_path / "job.yaml"), "-y"],
            env=os.environ | {"WHALEFLUX_CONTEXT": str(shared.context)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            while "RUNNING" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, notes = process.communicate(timeout=60)
        finally:
            process.kill()
            shared.scheduler.ends = True
        assert process.returncode == 130
        assert "the job goes on" in notes
        assert f"whaleflux logs -f {JOB}" in notes
        assert f"whaleflux cancel {JOB}" in notes
        assert "Traceback" not in notes


def on_a_terminal(shared, environment):
    """What an error looks like there."""
    ours, theirs = os.openpty()
    variables = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environment
    command = [sys.executable, "-m", "whaleflux.cli", "job", "nope"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=variables | {"WHALEFLUX_CONTEXT": str(shared.context)})  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
        process.wait(60)
    return shown.decode()
