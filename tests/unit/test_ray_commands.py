"""`whaleflux ray up | ls | show | explain NAME | down`: what is sent, what is said, what is refused."""

import contextlib
import json
from types import SimpleNamespace as Message

import pytest
from typer.testing import CliRunner

from whaleflux.cli import ray_cluster_commands, ray_commands
from whaleflux.cli.__main__ import app
from whaleflux.errors import FieldViolation, InvalidArgument, NotFound, Unavailable
from whaleflux.manifests.ray_file import ray_from_yaml
from whaleflux.v1 import scheduler_pb2 as pb

RUN = CliRunner()
FILE = "name: rl\npython: /opt/ray/bin/python\nmax_gpus: 4\nidle: 2 min\n"


class Scheduler:
    """One cluster, which is read after a few looks, and gone after a few more once it is to go."""

    def __init__(self):
        self.cluster, self.looks, self.updates = None, 0, []

    def GetRayCluster(self, request, timeout):
        if self.cluster is None or request.name != self.cluster.name:
            raise NotFound("ray_cluster", request.name)
        self.looks += 1
        status = self.cluster.status
        status.stale = self.looks < 3
        status.message = "its head is STARTING" if status.stale else "nothing waits"
        found = pb.RayCluster()
        found.CopyFrom(self.cluster)
        if self.cluster.state == pb.RAY_CLUSTER_STATE_ENDING and self.looks > 5:
            self.cluster = None
        return found

    def CreateRayCluster(self, request, timeout):
        made = pb.RayCluster()
        made.CopyFrom(request.ray_cluster)
        made.name, made.etag, made.state = f"rayClusters/{request.ray_cluster_id}", '"1"', pb.RAY_CLUSTER_STATE_UP
        if made.max_gpus > 100:
            raise InvalidArgument(FieldViolation("ray_cluster.head_memory_bytes", "is 5; give more"))
        if not request.validate_only:
            self.cluster = made
            made.status.address, made.status.dashboard = "10.0.0.1:20001", "10.0.0.1:35000"
        return made

    def UpdateRayCluster(self, request, timeout):
        if "atlantis" in request.ray_cluster.sites:
            raise InvalidArgument(FieldViolation("ray_cluster.sites", "'atlantis' is no site of the fleet"))
        if request.validate_only:
            return request.ray_cluster
        self.updates.append(list(request.update_mask.paths))
        self.cluster.max_gpus = request.ray_cluster.max_gpus
        return self.cluster

    def ListRayClusters(self, request, timeout):
        return pb.ListRayClustersResponse(ray_clusters=[self.cluster] if self.cluster else [])

    def DeleteRayCluster(self, request, timeout):
        if self.cluster is None:
            raise NotFound("ray_cluster", request.name)
        self.cluster.state = pb.RAY_CLUSTER_STATE_ENDING
        self.cluster.status.parts.add(job="queues/default/jobs/rl-head1-x")
        return self.cluster

    def PlanRay(self, request, timeout):
        return pb.RayPlan()


@pytest.fixture
def scheduler(monkeypatch):
    found = Scheduler()
    for module in (ray_cluster_commands, ray_commands):
        monkeypatch.setattr(module, "fleet", lambda: contextlib.nullcontext(Message(scheduler=found)))
    monkeypatch.setattr(ray_cluster_commands.time, "sleep", lambda _: None)
    return found


def ray(*words):
    return RUN.invoke(app, ["ray", *words])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ray.yaml"
    path.write_text(FILE)
    return path


def test_up_waits_and_shows_where_it_is(scheduler, file):
    done = ray("up", str(file))
    assert done.exit_code == 0, done.output
    assert "-- its head is STARTING" in done.stderr
    assert "10.0.0.1:20001" in done.stdout
    assert "http://10.0.0.1:35000" in done.stdout
    assert scheduler.cluster.idle.ToSeconds() == 120


def test_up_again_changes_what_differs_and_refuses_the_rest(scheduler, file):
    ray("up", str(file), "--no-wait")
    assert "is as the file says" in ray("up", str(file), "--no-wait").stderr
    file.write_text(FILE.replace("max_gpus: 4", "max_gpus: 8"))
    assert "would change: max_gpus" in ray("up", str(file), "--dry-run").stderr
    assert not scheduler.updates
    assert "is changed: max_gpus" in ray("up", str(file), "--no-wait").stderr
    assert scheduler.updates == [["max_gpus"]]
    file.write_text(FILE.replace("/opt/ray", "/opt/other"))
    refused = ray("up", str(file))
    assert isinstance(refused.exception, InvalidArgument)
    assert [one.field for one in refused.exception.violations] == ["python"]


def test_dry_run_makes_nothing(scheduler, file):
    assert "could be made" in ray("up", str(file), "--dry-run").stderr
    assert scheduler.cluster is None


def test_of_a_cluster_that_nobody_has_read_nothing_is_claimed(scheduler, file):
    said = ray("up", str(file), "--dry-run").stdout
    assert "not known (read never)" in said
    assert "UP" not in said
    scheduler.cluster = pb.RayCluster(name="rayClusters/rl", state=pb.RAY_CLUSTER_STATE_UP, max_gpus=4)
    row = ray("ls", "--no-headers").stdout.split()
    assert row[:6] == ["rl", "?", "-", "?", "?/4", "?"]


def test_waits_go_on_while_the_scheduler_is_away(scheduler, file, monkeypatch):
    answer, away = scheduler.GetRayCluster, iter([False, True, True, False, True])

    def now_and_then(request, timeout):
        if next(away, False):
            raise Unavailable("away")
        return answer(request, timeout)

    monkeypatch.setattr(scheduler, "GetRayCluster", now_and_then)
    assert ray("up", str(file)).exit_code == 0


def test_ls_show_explain_and_down(scheduler, file):
    assert "make one with: whaleflux ray up" in ray("ls").stderr
    ray("up", str(file))
    assert "10.0.0.1:20001" in ray("ls").stdout
    assert json.loads(ray("show", "rl", "-o", "json").stdout)["name"] == "rayClusters/rl"
    unknown = ray("explain", "rl")
    assert isinstance(unknown.exception, Unavailable), "what waits was never told"
    scheduler.cluster.status.demand.bundles.add(resources={"GPU": 1}, count=2)
    assert "{GPU: 1}" in ray("explain", "rl").stdout
    gone = ray("down", "rl", "--yes")
    assert "rayClusters/rl is gone" in gone.stderr
    assert "1 jobs are left: rl-head1-x" in gone.stderr
    assert isinstance(ray("down", "rl", "--yes").exception, NotFound)


def test_what_the_scheduler_refuses_is_named_as_in_the_file(scheduler, file):
    file.write_text(FILE.replace("max_gpus: 4", "max_gpus: 400"))
    refused = ray("up", str(file)).exception
    assert [one.field for one in refused.violations] == ["head.memory"]


def test_a_change_is_checked_by_the_fleet_when_it_is_only_checked(scheduler, file):
    ray("up", str(file))
    file.write_text(FILE + "sites: [atlantis]\n")
    refused = ray("up", str(file), "--dry-run").exception
    assert [one.field for one in refused.violations] == ["sites"]
    file.write_text(FILE.replace("max_gpus: 4", "max_gpus: 5"))
    assert "would change: max_gpus" in ray("up", str(file), "--dry-run").stderr
    assert not scheduler.updates and scheduler.cluster.max_gpus == 4


def test_what_never_changes_is_said_in_the_units_of_the_file(scheduler, file):
    ray("up", str(file))
    scheduler.cluster.head_cpu_millicores, scheduler.cluster.head_memory_bytes = 2500, 8 << 30
    file.write_text(FILE + "queue: other\nhead: {cpus: 4, memory: 4 GiB}\n")
    refused = str(ray("up", str(file)).exception)
    assert "head.cpus: never changes, and is 2.5 there" in refused
    assert "head.memory: never changes, and is 8 GiB there" in refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cpus: 0.5", "head.cpus: is 0.5; give a number from 1 to 1000"),
        ("cpus: 1001", "head.cpus: is 1001; give a number from 1 to 1000"),
        ("memory: 1 GiB", "head.memory: is 1 GiB; give 2 GiB to 1 PiB"),
    ],
)
def test_limits_are_said_in_the_units_of_the_file(line, words):
    with pytest.raises(InvalidArgument) as refused:
        ray_from_yaml(f"name: rl\nhead: {{{line}}}")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("max_gpus: 4", ["name"]),
        ("name: No\nmax_gpus: -1", ["name", "max_gpus"]),
        ("name: rl\nidle: soon\ngpus: 5", ["idle", "gpus"]),
        ("name: rl\naddress: h:1\nhead: {cpus: 2}", ["head"]),
        ("name: rl\nhead: {memory: much, disk: 3}", ["head.memory", "head.disk"]),
        ("[1]", ["file", "name"]),
        (f"name: {'a' * 37}", ["name"]),
        ("name: rl\nmax_gpus: 1000000\npriority: 1.5", ["priority", "max_gpus"]),
        ("name: rl\nidle: 99999999999999 d", ["idle"]),
        ("name: rl\nidle: 0.5 s", ["idle"]),
        ("name: rl\nhead: {memory: 99999999999 TB}", ["head.memory"]),
        ("name: rl\nhead: {memory: 1 GiB, cpus: -1}", ["head.cpus", "head.memory"]),
        (f"name: rl\nsites: [{', '.join(['s'] * 65)}]", ["sites"]),
        ("name: rl\ngpu_types: [{H200: 1}]", ["gpu_types"]),
        (f"name: rl\npython: {'x' * 501}", ["python"]),
        ("name: &a rl\nsites: [*a]", ["file"]),
    ],
)
def test_every_mistake_of_a_file_is_named(text, fields):
    with pytest.raises(InvalidArgument) as wrong:
        ray_from_yaml(text)
    assert [one.field for one in wrong.value.violations] == fields
