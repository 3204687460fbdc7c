"""Workers for a Ray cluster: which jobs, each once, within what is allowed, and what they run."""

import contextlib
import json
from types import SimpleNamespace as Message

import pytest
import yaml
from google.protobuf import json_format
from typer.testing import CliRunner

from whaleflux.cli import ray_growing
from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument, Unavailable
from whaleflux.manifests.yaml_files import jobs_from_yaml
from whaleflux.ray_cluster import growth, worker
from whaleflux.ray_cluster.growth import Growth, Worker
from whaleflux.v1 import scheduler_pb2 as pb

RUN = CliRunner()
ADDRESS = "10.0.0.5:6379"
MIB = 144_384


def addition(gpus, count, *bundles):
    laid = [pb.RayBundle(resources=resources, count=n) for resources, n in bundles]
    nodes = [f"sites/onprem/nodes/n{n}" for n in range(count)]
    return pb.RayAddition(gpu_type="H200", gpus=gpus, count=count, nodes=nodes, bundles=laid, gpu_memory_mib=MIB)


def plan(*additions):
    return pb.RayPlan(additions=additions, gpus=sum(one.gpus * one.count for one in additions))


class TestWorkers:
    def test_a_node_of_whole_gpus_is_one_worker(self):
        found = list(growth.workers(plan(addition(4, 2, ({"GPU": 2, "CPU": 3}, 2))), 64))
        assert found == [Worker(4, "H200", MIB, 6, 6, "onprem")] * 2

    def test_gpus_whose_memory_is_shared_are_a_worker_each(self):
        """On a node of several Ray would lay 3 x 90 GB on 2 x 141."""
        found = list(growth.workers(plan(addition(2, 1, ({"gpu_memory": 60_000, "CPU": 1}, 4))), 64))
        assert found == [Worker(1, "H200", MIB, 4, 2, "onprem")] * 2

    def test_no_more_gpus_than_are_allowed(self):
        wanted = plan(addition(4, 3, ({"GPU": 4}, 1)))
        assert len(list(growth.workers(wanted, 11))) == 2
        assert not list(growth.workers(wanted, 0))

    def test_the_job_is_one_of_a_file(self):
        how = Growth(ADDRESS, "research", "/opt/ray/bin/python", 30.0, priority=7)
        asked = growth.job_file(Worker(2, "H200", MIB, 5, 5, "onprem"), how, "w1")
        manifest = jobs_from_yaml(yaml.safe_dump(asked), base=None)[0]
        spec = manifest.spec
        assert (manifest.queue, manifest.job_id, spec.gpus, spec.launch_once, spec.priority) == (
            "research",
            "w1",
            2,
            True,
            7,
        )
        assert (spec.retry.max_restarts, list(spec.sites), spec.nodes.max) == (0, ["onprem"], 1)
        script = " ".join(spec.command)
        for part in (
            "/opt/ray/bin/python",
            "--address=10.0.0.5:6379",
            "--gpus=2",
            "--idle-s=30.0",
            "class Worker",
            "WHALEFLUX",
        ):
            assert part in script
        assert growth.grown_for(
            [pb.Job(spec=spec), pb.Job(spec=spec, state=pb.JOB_STATE_FAILED), pb.Job()], ADDRESS
        ) == [pb.Job(spec=spec)]

    def test_those_under_way_hold_what_they_will(self):
        spec = jobs_from_yaml(
            yaml.safe_dump(growth.job_file(Worker(1, "H200", MIB, 2, 2), Growth(ADDRESS), "w")), base=None
        )[0].spec
        jobs = [pb.Job(name=f"queues/q/jobs/{name}", spec=spec) for name in ("joined", "coming")]
        read = pb.RayDemand(nodes=[pb.RayNode(id="1", status="IDLE", instance="queues/q/jobs/joined/3")])
        found = growth.with_those_under_way(read, jobs)
        assert [(node.id, node.status) for node in found.nodes] == [("1", "IDLE"), ("queues/q/jobs/coming", "STARTING")]
        assert dict(found.nodes[1].total) == {"CPU": 2, "GPU": 1, "gpu_memory": MIB, "accelerator_type:H200": 1}
        assert dict(found.nodes[1].labels) == {"whaleflux/gpu": "H200"}
        assert len(read.nodes) == 1, "what was read stays as it was"


def test_what_a_worker_starts(monkeypatch):
    words = [
        "worker.py",
        "--address=h:1",
        "--gpus=2",
        "--cpus=8",
        "--gpu-memory-mib=81920",
        "--gpu-type=H100-80GB",
        "--site=onprem",
    ]
    monkeypatch.setattr("sys.argv", words)
    found = worker.command(worker.options())
    assert json.loads(next(word for word in found if word.startswith("--resources=")).partition("=")[2]) == {
        "gpu_memory": 163_840, "accelerator_type:H100": 2,
    }  # fmt: skip
    assert {
        "--address=h:1",
        "--num-gpus=2",
        "--num-cpus=8",
        "--labels=whaleflux/gpu=H100-80GB,whaleflux/site=onprem",
        "--block",
    } <= {*found}


class Fleet:
    """Answers like SchedulerService with one plan as long as no worker is there for it."""

    def __init__(self):
        self.jobs, self.asked, self.plan = [], [], plan(addition(1, 2, ({"GPU": 1}, 1)))

    def ListJobs(self, request, timeout):
        return pb.ListJobsResponse(jobs=self.jobs)

    def PlanRay(self, request, timeout):
        self.asked.append(request.demand)
        room = sum(node.total["GPU"] for node in request.demand.nodes)
        return pb.RayPlan() if room >= self.plan.gpus else self.plan

    def CreateJob(self, request, timeout):
        job = pb.Job(name=f"{request.parent}/jobs/{request.job_id}", spec=request.job.spec, state=pb.JOB_STATE_QUEUED)
        self.jobs.append(job)
        return job


@pytest.fixture
def service(monkeypatch):
    found = Fleet()
    monkeypatch.setattr(ray_growing, "fleet", lambda: contextlib.nullcontext(Message(scheduler=found)))
    monkeypatch.setattr(
        ray_growing.reading, "read_once", lambda address, python: {"bundles": [{"resources": {"GPU": 1}, "count": 2}]}
    )
    return found


def grow(*words):
    return RUN.invoke(app, ["ray", "grow", "--address", ADDRESS, *words])


class TestCommand:
    def test_each_worker_is_asked_for_once(self, service):
        first, second = grow("--yes", "-o", "json"), grow("--yes", "-o", "json")
        assert (first.exit_code, len(json.loads(first.stdout)), json.loads(second.stdout)) == (0, 2, [])
        assert len(service.jobs) == 2
        assert [node.status for node in service.asked[1].nodes] == ["STARTING"] * 2

    def test_within_the_limit_and_says_what_is_missing(self, service):
        done = grow("--yes", "--max-gpus", "1")
        assert len(service.jobs) == 1
        assert "1 GPUs more are wanted, and --max-gpus is 1" in done.output

    def test_nothing_is_started_unless_it_is_wanted(self, service, monkeypatch):
        def refuse(question, yes):
            raise InvalidArgument(())

        monkeypatch.setattr(ray_growing, "confirm", refuse)
        assert isinstance(grow().exception, InvalidArgument)
        assert not service.jobs

    @pytest.mark.parametrize("words", [["--follow"], ["-o", "csv"], ["--idle", "soon"]])
    def test_bad_input_starts_nothing(self, service, words):
        assert isinstance(grow(*words).exception, InvalidArgument)
        assert not service.jobs

    def test_following_goes_on_when_the_cluster_does_not_answer(self, service, monkeypatch):
        looks = iter([Unavailable("nobody"), {"bundles": []}, KeyboardInterrupt()])

        def read(address, python):
            found = next(looks)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr(ray_growing.reading, "read_once", read)
        monkeypatch.setattr(ray_growing.time, "sleep", lambda _: None)
        done = grow("--follow", "--yes")
        assert "nobody" in done.output
        assert next(looks, None) is None
        assert json_format.MessageToDict(service.asked[0]) == {}
