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
from google.protobuf.empty_pb2 import Empty

from whaleflux.cli import __main__ as program
from whaleflux.cli import job_commands
from whaleflux.cli.state import GLOBAL, complete, complete_jobs
from whaleflux.errors import AlreadyExists, NotFound, WrongState
from whaleflux.rpc.auth import Authority
from whaleflux.rpc.pki import CertificateAuthority, TlsFiles
from whaleflux.rpc.server import Server
from whaleflux.v1 import checkpoint_pb2 as ckpt
from whaleflux.v1 import checkpoint_pb2_grpc, health_pb2_grpc, inventory_pb2_grpc, router_pb2_grpc, scheduler_pb2_grpc
from whaleflux.v1 import health_pb2 as health
from whaleflux.v1 import inventory_pb2 as inv
from whaleflux.v1 import router_pb2 as rout
from whaleflux.v1 import scheduler_pb2 as sched

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
        made.facts.gpus.add(index=index, model="H200", memory_bytes=141 * 10**9)
    return made


def job(state=sched.JOB_STATE_RUNNING):
    made = at(sched.Job(name=JOB, state=state, step=120, loss=1.5, cost_usd=3.25, epoch=2, etag=f'"{state}"'), "create_time", 600)  # fmt: skip
    made.spec.gpus = 4
    made.attempt.epoch = 2
    made.attempt.tasks.append(sched.Task(node=NODE, gpu_indices=[0, 1, 2, 3]))
    return at(made, "end_time", 5) if state == sched.JOB_STATE_SUCCEEDED else made


class Inventory(inventory_pb2_grpc.InventoryServiceServicer):
    def __init__(self):
        self.drained = []

    async def ListNodes(self, request, context):
        return inv.ListNodesResponse(nodes=[node()])

    async def ListSites(self, request, context):
        return inv.ListSitesResponse(sites=[inv.Site(name="sites/onprem")])

    async def ListDatasets(self, request, context):
        return inv.ListDatasetsResponse(datasets=[inv.Dataset(name="datasets/c4", size_bytes=10**12)])

    async def ListJoinTokens(self, request, context):
        return inv.ListJoinTokensResponse(join_tokens=[inv.JoinToken(name="joinTokens/t1", site="sites/onprem")])

    async def CreateJoinToken(self, request, context):
        return inv.JoinToken(name="joinTokens/t2", site=request.site, secret="t2.secret")

    async def DrainNode(self, request, context):
        self.drained.append((request.name, request.reason))
        return node()

    async def WatchNodes(self, request, context):
        yield inv.WatchNodesResponse(added=node())
        yield inv.WatchNodesResponse(bookmark=Empty())
        await asyncio.sleep(60)


class Scheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(self):
        self.created, self.ends = [], True

    async def ListJobs(self, request, context):
        return sched.ListJobsResponse(jobs=[job()])

    async def ListQueues(self, request, context):
        return sched.ListQueuesResponse(queues=[sched.Queue(name="queues/default", weight=1)])

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
        raise WrongState(f"{request.name} has ended")

    async def StreamLogs(self, request, context):
        yield sched.StreamLogsResponse(rank=0, data=b"step 1\nstep 2\n")

    async def WatchJobs(self, request, context):
        yield sched.WatchJobsResponse(added=job())
        yield sched.WatchJobsResponse(bookmark=Empty())
        if self.ends:
            yield sched.WatchJobsResponse(modified=job(sched.JOB_STATE_SUCCEEDED))
        await asyncio.sleep(60)


class Health(health_pb2_grpc.HealthServiceServicer):
    def healthy(self):
        return at(health.NodeHealth(name=NODE, phase=health.NODE_PHASE_READY), "transition_time", 3000)

    async def ListNodeHealth(self, request, context):
        return health.ListNodeHealthResponse(node_health=[self.healthy()])

    async def ListIncidents(self, request, context):
        found = health.Incident(name="incidents/i1", kind=1, nodes=[NODE], jobs=[JOB], message="silent for 5 s")
        return health.ListIncidentsResponse(incidents=[at(at(found, "start_time", 300), "fence_time", 290)])

    async def WatchNodeHealth(self, request, context):
        yield health.WatchNodeHealthResponse(added=self.healthy())
        yield health.WatchNodeHealthResponse(bookmark=Empty())
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
        ):
            server.add(add, servicer, f"whaleflux.v1.{name}")
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
    (("queues",), "queues/default", ""),
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
        assert json.loads(cli("status", "-o", "json")[1])["gpus"] == {"total": 8, "held": 4}

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

    def test_secrets_alone_are_on_stdout(self, cli):
        assert cli("keys", "create", "ci")[1] == "wf-secret\n"
        _code, secret, how = cli("token", "create", "--site", "onprem")
        assert secret == "t2.secret\n"
        assert "whaleflux agent" in how


class TestEvents:
    def test_the_past_in_order_from_all_owners(self, cli):
        code, text, notes = cli("events", "-o", "json")
        told = [json.loads(line) for line in text.splitlines()]
        assert (code, notes) == (0, "")
        assert [t["at_s"] for t in told] == sorted(t["at_s"] for t in told)
        seen = {(t["kind"], t["what"]) for t in told}
        assert {("node", "JOINED"), ("node", "READY"), ("job", "SUBMITTED"), ("job", "RUNNING"), ("incident", "FENCED"), ("checkpoint", "COMMITTED")} <= seen  # fmt: skip

    def test_since_and_for_narrow_it(self, cli):
        recent = cli("events", "--since", "5m")[1]
        assert "JOINED" not in recent
        assert "s100" in recent
        lines = cli("events", "--for", "incident/i1")[1].splitlines()
        assert len(lines) == 2
        assert all("incidents/i1" in line for line in lines)
        code, _, why = cli("events", "--since", "soon")
        assert code == 2
        assert "5m" in why


class TestSubmit:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "job.yaml").write_text("name: j1\nrun: python train.py\ngpus: 4\n")
        return str(tmp_path / "job.yaml")

    def test_plan_then_submit_then_follow_to_the_end(self, cli, shared, file):
        shared.scheduler.created.clear()
        code, text, notes = cli("submit", file, "-y")
        assert code == 0
        assert text.startswith("PLAN  4 x H200 on 1 node")
        assert "why here   one NVLink island" in text
        assert "preempts   nothing" in text
        assert re.search(r"RUNNING.*\n.*SUCCEEDED", text)
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
        assert cli("submit", "-", "-y", "-d", stdin="name: j1\nrun: x\ngpus: 1\n")[0] == 0

    def test_every_mistake_is_a_line_of_its_own(self, cli):
        code, text, why = cli("submit", "-", "-y", stdin="run: x\ngpus: many\nnam: y\n")
        assert (code, text) == (2, "")
        lines = why.splitlines()
        assert len(lines) == 2
        assert "gpus: must be a whole number" in why
        assert "did you mean 'name'" in why
        assert lines[-1].endswith("whaleflux submit --help")

    def test_validate_needs_no_fleet(self, cli, monkeypatch, file):
        monkeypatch.setenv("WHALEFLUX_CONTEXT", "/nowhere")
        code, _, notes = cli("validate", file)
        assert code == 0
        assert "whaleflux submit" in notes
        assert cli("validate", "-", stdin="a: " + "[" * 5000)[0] == 2

    def test_ctrl_c_stops_following_not_the_job(self, capsys):
        class Client:
            def follow_job(self, name):
                yield job()
                raise KeyboardInterrupt

        assert job_commands.follow(Client(), JOB) == 0
        shown = capsys.readouterr()
        assert "RUNNING" in shown.out
        assert "the job goes on" in shown.err
        assert f"whaleflux logs -f {JOB}" in shown.err


class TestModels:
    def test_serve_declares_and_then_changes(self, cli, shared, tmp_path):
        file = tmp_path / "model.yaml"
        file.write_text("model: tiny\nengine: {run: serve}\nreplicas: {min: 1}\n")
        code, text, notes = cli("serve", str(file), "-y")
        assert code == 0
        assert "PLAN  serve tiny with 1 replica(s)" in text
        assert "whaleflux replicas tiny" in notes
        file.write_text("model: tiny\nengine: {run: serve}\nreplicas: {min: 3}\n")
        assert "now        1 replica(s)" in cli("serve", str(file), "-y")[1]
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
        assert why.strip().endswith("whaleflux jobs")

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
        assert time.monotonic() - began < 1
        monkeypatch.setenv("WHALEFLUX_CONTEXT", str(tmp_path / "none.json"))
        assert complete(complete_jobs)("") == []
        assert cli("jobs")[0] == 2

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
        command, capture_output=True, check=False, text=True, timeout=30, env=os.environ | environment
    )


class TestProgram:
    def test_help_is_quick_and_examples_come_first(self):
        took_s = []
        for _ in range(3):
            began = time.monotonic()
            shown = whaleflux("--help")
            took_s.append(time.monotonic() - began)
        assert min(took_s) < 1.0, "0.2 s on a quiet machine"
        assert shown.stdout.index("whaleflux up") < shown.stdout.index("Options:")
        assert "Exit codes" in shown.stdout

    def test_help_imports_nothing_heavy(self):
        heavy = "import sys; import whaleflux.cli.__main__; print([m for m in ('grpc','google.protobuf','yaml','pydantic') if m in sys.modules])"
        shown = subprocess.run([sys.executable, "-c", heavy], capture_output=True, check=True, text=True, timeout=30)
        assert shown.stdout.strip() == "[]"

    @pytest.mark.parametrize("command", ["submit", "jobs", "explain", "logs", "drain", "events", "serve"])
    def test_examples_stand_before_options(self, cli, command):
        _, shown, _ = cli(command, "-h")
        assert shown.index(f"    whaleflux {command}") < shown.index("Options:")

    def test_no_colour_off_a_terminal_and_none_with_no_color(self, shared):
        plain = whaleflux("job", "nope", WHALEFLUX_CONTEXT=str(shared.context))
        assert (plain.returncode, "\033[" in plain.stderr) == (1, False)
        assert "\033[31m" in on_a_terminal(shared, {})
        assert "\033[" not in on_a_terminal(shared, {"NO_COLOR": "1"})

    def test_ctrl_c_while_following(self, shared, tmp_path):
        (tmp_path / "job.yaml").write_text("name: j1\nrun: x\ngpus: 1\n")
        shared.scheduler.ends = False
        process = subprocess.Popen(
            [sys.executable, "-m", "whaleflux.cli", "submit", str(tmp_path / "job.yaml"), "-y"],
            env=os.environ | {"WHALEFLUX_CONTEXT": str(shared.context)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            while "RUNNING" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, notes = process.communicate(timeout=10)
        finally:
            process.kill()
            shared.scheduler.ends = True
        assert process.returncode == 0
        assert "the job goes on" in notes
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
        process.wait(10)
    return shown.decode()
