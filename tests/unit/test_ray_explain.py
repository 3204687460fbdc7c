"""What a Ray cluster should get, through the service and the command: the fleet as it is, bad input, and what is read of Ray's own state."""

import asyncio
import contextlib
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace as Message

import pytest
from google.protobuf import json_format
from typer.testing import CliRunner

from tests.support.scheduler_world import World, node
from whaleflux.cli import next_step, ray_commands
from whaleflux.cli.__main__ import app
from whaleflux.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from whaleflux.ray_cluster import reader, reading
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler import ray_plans
from whaleflux_scheduler.core import ray_nodes

RUN = CliRunner()
GIB = 1024


def bundle(count=1, **resources):
    return pb.RayBundle(resources=resources, count=count)


async def planned(world, **demand):
    return await world.scheduler.PlanRay(pb.PlanRayRequest(demand=pb.RayDemand(**demand)), None)


class TestService:
    async def test_the_fleet_as_it_is_now(self):
        async with World() as world:
            await world.add(node("s/a"), node("s/b"))
            found = await planned(world, bundles=[bundle(6, GPU=1)])
            assert [(one.count, one.gpus) for one in found.additions] == [(1, 4), (1, 2)]
            name = await world.submit(4)
            await world.reaches(name, "RUNNING")
            busy = await planned(world, bundles=[bundle(6, GPU=1)])
            assert busy.gpus == 4
            assert [(one.count, one.never) for one in busy.unmet] == [(2, False)]

    async def test_what_can_never_be_had_says_why(self):
        async with World() as world:
            await world.add(node("s/a"))
            asked = [bundle(1, gpu_memory=10_000 * GIB), bundle(1, GPU=5), bundle(1, GPU=1, licence=1)]
            found = await planned(world, bundles=asked)
            assert all(one.never for one in found.unmet)
            words = " ".join(one.why for one in found.unmet)
            for part in ("on one GPU; the largest", "5 GPUs on one node; the largest has 4", "resource licence"):
                assert part in words

    async def test_the_bundles_of_all_gangs_count_together(self):
        async with World() as world:
            gang = pb.RayGang(bundles=[bundle(1, GPU=1 + n) for n in range(400)], count=1)
            with pytest.raises(InvalidArgument, match="demand: has 1200 bundles in all") as refused:
                await planned(world, gangs=[gang] * 3)
            assert "at most 1000" in str(refused.value)

    async def test_one_plan_at_a_time_and_who_gives_up_leaves_its_turn_taken_until_its_thread_has_ended(
        self, monkeypatch
    ):
        begun, ended, running = [], threading.Event(), threading.Semaphore(0)
        really = ray_nodes.resize

        def resize(*asked):
            begun.append(len(begun))
            running.release()
            if len(begun) == 1:
                ended.wait(60)
            return really(*asked)

        monkeypatch.setattr(ray_nodes, "resize", resize)
        monkeypatch.setattr(ray_plans, "PATIENCE_S", 0.05)
        async with World() as world:
            await world.add(node("s/a"))
            first = asyncio.create_task(planned(world, bundles=[bundle(1, GPU=1)]))
            try:
                await asyncio.to_thread(running.acquire, timeout=60)
                first.cancel()
                with pytest.raises(ResourceExhausted, match="ask again later"):
                    await planned(world, bundles=[bundle(1, GPU=1)])
            finally:
                ended.set()
            assert begun == [0]
            monkeypatch.setattr(ray_plans, "PATIENCE_S", 60)
            assert (await planned(world, bundles=[bundle(1, GPU=1)])).gpus == 1

    async def test_a_plan_has_a_bound_in_time_and_the_next_begins_with_what_it_left(self, monkeypatch):
        begins_with, really = [], ray_nodes.resize
        monkeypatch.setattr(
            ray_nodes, "resize", lambda cluster, *more: begins_with.append(cluster.first) or really(cluster, *more)
        )
        asked = {"bundles": [bundle(1, GPU=1), bundle(2, CPU=1)], "session": "of one head"}
        async with World() as world:
            await world.add(node("s/a"), node("s/b"))
            monkeypatch.setattr(ray_plans, "PLAN_S", 0.0)
            cut = await planned(world, **asked)
            assert [(one.count, one.postponed, one.never) for one in cut.unmet] == [(1, True, False), (2, True, False)]
            assert "comes first in the next" in cut.unmet[0].why
            monkeypatch.setattr(ray_plans, "PLAN_S", 60.0)
            assert not (await planned(world, **asked)).unmet
            await planned(world, **asked)
            await planned(world, **asked | {"session": "of another head"})
        assert [len(shapes) for shapes in begins_with] == [0, 2, 0, 0]

    async def test_nodes_that_are_there_or_under_way_come_first(self):
        async with World() as world:
            await world.add(node("s/a"))
            there = {"GPU": 2.0, "gpu_memory": 2.0 * 80 * GIB, "CPU": 8.0}
            for status, added in (("STARTING", 0), ("IDLE", 0), ("DRAINING", 2), ("DEAD", 2)):
                nodes = [pb.RayNode(id="one", status=status, total=there, available=there)]
                found = await planned(world, bundles=[bundle(2, GPU=1)], nodes=nodes)
                assert found.gpus == added, status

    async def test_what_it_should_hold_in_all_counts_what_is_used(self):
        async with World() as world:
            await world.add(node("s/a"))
            busy = pb.RayNode(id="one", status="RUNNING", total={"GPU": 2.0, "CPU": 8.0}, available={"CPU": 8.0})
            held = await planned(world, constraints=[bundle(2, GPU=1)], nodes=[busy])
            assert held.gpus == 0
            more = await planned(world, constraints=[bundle(4, GPU=1)], nodes=[busy])
            assert (more.gpus, more.additions[0].why.partition(":")[0]) == (
                2,
                "for what the cluster should hold in all",
            )

    @pytest.mark.parametrize(
        ("demand", "field"),
        [
            ({"bundles": [bundle(0, GPU=1)]}, "demand.bundles[0].count"),
            ({"bundles": [bundle(1, GPU=-1)]}, "demand.bundles[0].resources[GPU]"),
            ({"bundles": [bundle(1, GPU=float("nan"))]}, "demand.bundles[0].resources[GPU]"),
            ({"bundles": [bundle(1, GPU=1)] * 1001}, "demand.bundles"),
            ({"gangs": [pb.RayGang(count=1)]}, "demand.gangs[0].bundles"),
            ({"gangs": [pb.RayGang(bundles=[bundle()], count=1, strategy=9)]}, "demand.gangs[0].strategy"),
            ({"nodes": [pb.RayNode(total={"GPU": float("inf")})]}, "demand.nodes[0].total[GPU]"),
            ({"nodes": [pb.RayNode(total={"GPU": 1e9})]}, "demand.nodes[0].total[GPU]"),
        ],
    )
    async def test_bad_input_names_the_field(self, demand, field):
        async with World() as world:
            with pytest.raises(InvalidArgument) as refused:
                await planned(world, **demand)
            assert refused.value.violations[0].field == field
            with pytest.raises(InvalidArgument):
                await world.scheduler.PlanRay(pb.PlanRayRequest(), None)


def request(resources, constraints=(), selectors=()):
    return Message(resources_bundle=resources, placement_constraints=constraints, label_selectors=selectors)


def constraint(kind):
    return Message(HasField=lambda name: name == kind)


def state(**more):
    empty = {
        "pending_resource_requests": [], "pending_gang_resource_requests": [], "cluster_resource_constraints": [],
        "node_states": [], "cluster_session_name": "s", "cluster_resource_state_version": 7,
    }  # fmt: skip
    return Message(**(empty | more))


class TestReader:
    def read(self, **more):
        found = reader.demand_of(state(**more), {1: "RUNNING", 3: "IDLE"}.get)
        return json_format.ParseDict(found, pb.RayDemand())

    def test_requests_by_shape(self):
        waits = [Message(request=request({"GPU": 0.5}, selectors=[Message(label_constraints=[])]), count=4)]
        found = self.read(pending_resource_requests=waits)
        assert [(dict(one.resources), one.count, len(one.selectors)) for one in found.bundles] == [({"GPU": 0.5}, 4, 0)]
        assert (found.session, found.version) == ("s", 7)

    @pytest.mark.parametrize("said", ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])
    def test_equal_groups_are_one(self, said):
        group = Message(requests=[request({"GPU": 1.0})] * 3, details=f"4f2:{said}|PENDING", bundle_selectors=[])
        found = self.read(pending_gang_resource_requests=[group, group]).gangs
        assert [(one.count, one.bundles[0].count, pb.RayStrategy.Name(one.strategy)) for one in found] == [
            (2, 3, f"RAY_STRATEGY_{said}")
        ]

    @pytest.mark.parametrize(("kind", "said"), [("affinity", "STRICT_PACK"), ("anti_affinity", "STRICT_SPREAD")])
    def test_without_words_the_constraints_tell_how_a_group_lies(self, kind, said):
        selected = [Message(resource_requests=[request({"GPU": 1.0}, [constraint(kind)])])]
        group = Message(requests=[], details="", bundle_selectors=selected)
        found = self.read(pending_gang_resource_requests=[group]).gangs[0]
        assert pb.RayStrategy.Name(found.strategy) == f"RAY_STRATEGY_{said}"

    def test_nodes_as_they_are(self):
        one = Message(
            node_id=b"\x12", status=3, total_resources={"GPU": 2.0}, available_resources={"GPU": 1.0}, dynamic_labels={},
            labels={"a": "b"}, instance_id="lease", ray_node_type_name="h200x2", idle_duration_ms=5, node_activity=["busy"],
        )  # fmt: skip
        found = self.read(node_states=[one]).nodes[0]
        assert (found.id, found.status, found.instance, dict(found.labels)) == ("12", "IDLE", "lease", {"a": "b"})
        assert reader.without_time(reader.demand_of(state(node_states=[one]), str)) == reader.without_time(
            reader.demand_of(state(node_states=[Message(**(vars(one) | {"idle_duration_ms": 9}))]), str)
        )


class TestReading:
    """Of a program that stands for an interpreter: its ends in words."""

    def as_if(self, tmp_path, body):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        return str(program)

    def test_what_it_prints(self, tmp_path):
        assert reading.read_once("h:1", self.as_if(tmp_path, "echo '{\"version\": 3}'")) == {"version": 3}

    @pytest.mark.parametrize(
        ("code", "error"), [(2, InvalidArgument), (3, Unavailable), (4, FailedPrecondition), (9, Unavailable)]
    )
    def test_how_it_ends(self, tmp_path, code, error):
        with pytest.raises(error, match="because") as ended:
            reading.read_once("h:1", self.as_if(tmp_path, f"echo because >&2; exit {code}"))
        assert "etcd" not in next_step.after(ended.value, ["ray", "explain"]), "it is no part of the fleet"

    @pytest.mark.parametrize("address", ["nowhere", "h:0", "h:99999999", ":5", "h:"])
    def test_an_address_that_is_none(self, address):
        with pytest.raises(InvalidArgument, match="is no HOST:PORT"):
            reading.read_once(address, sys.executable)

    def test_an_interpreter_that_is_not_there(self):
        with pytest.raises(InvalidArgument, match="--python"):
            reading.read_once("h:1", "/no/such/python")

    def test_where_no_ray_is(self, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(reading, "find_spec", lambda name: None)
        with pytest.raises(FailedPrecondition, match="--python"):
            reading.interpreter()


PLAN = pb.RayPlan(
    gpus=4, usd_per_hour=8.0,
    additions=[pb.RayAddition(gpu_type="H200", gpus=4, count=1, nodes=["sites/s/nodes/a"], bundles=[bundle(4, GPU=1)], why="for it")],
    unmet=[pb.RayUnmet(bundle=bundle(1, GPU=9), count=1, why="9 GPUs on one node; the largest has 4", never=True)],
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    found = []
    service = Message(PlanRay=lambda request, timeout: found.append(request) or PLAN)
    monkeypatch.setattr(ray_commands, "fleet", lambda: contextlib.nullcontext(Message(scheduler=service)))
    return found


class TestCommand:
    def test_a_file_and_its_own_document_ask_the_same(self, asked, tmp_path):
        demand = {"bundles": [{"resources": {"gpu_memory": 61440}, "count": 3}]}
        for content in (demand, {"demand": demand, "plan": {}}):
            (tmp_path / "demand.json").write_text(json.dumps(content))
            done = RUN.invoke(app, ["ray", "explain", str(tmp_path / "demand.json")])
            assert done.exit_code == 0, done.output
            for words in (
                "{gpu_memory: 64.4 GB}",
                "nodes to add: 4 GPUs, $8.00 per hour",
                "H200",
                "never",
                "largest has 4",
            ):
                assert words in done.output
        assert asked[0] == asked[1]

    def test_as_json(self, asked, tmp_path):
        (tmp_path / "demand.json").write_text('{"bundles": [{"resources": {"GPU": 1}, "count": 3}]}')
        done = RUN.invoke(app, ["ray", "explain", str(tmp_path / "demand.json"), "-o", "json"])
        assert json.loads(done.stdout)["plan"]["gpus"] == 4

    @pytest.mark.parametrize("text", [
        "{", "[]", '{"bundles": [{"count": "many"}]}', '{"nothing": 1}', '{"demand": 5}', '{"demand": null}', '{"bundles": 7}', "[" * 100_000,
        '{"bundles": [{"resources": {"GPU": NaN}, "count": 1e99}]}',
    ])  # fmt: skip
    def test_a_file_that_is_no_demand_is_refused(self, asked, tmp_path, text):
        (tmp_path / "demand.json").write_text(text)
        done = RUN.invoke(app, ["ray", "explain", str(tmp_path / "demand.json")])
        assert isinstance(done.exception, InvalidArgument)
        assert not asked

    @pytest.mark.parametrize("words", [[], ["demand.json", "--address", "h:1"], ["demand.json", "-o", "csv"]])
    def test_one_of_both(self, asked, words):
        assert isinstance(RUN.invoke(app, ["ray", "explain", *words]).exception, InvalidArgument)


@pytest.mark.parametrize(
    ("first", "python"),
    [
        ("#!{python}", True), ("#!/usr/bin/env python3", True), ("#!/bin/sh", False), ("#!/usr/bin/env -S uv run", False), ("#!", False), ("", False),
    ],
)  # fmt: skip
def test_whose_interpreter_has_ray_is_read_from_its_program(tmp_path, monkeypatch, first, python):
    program = tmp_path / "ray"
    program.write_text(first.format(python=sys.executable) + "\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}")
    if python:
        assert Path(reading.interpreter()).name.startswith("python")
    else:
        with pytest.raises(FailedPrecondition, match="does not say which Python runs it; name the interpreter"):
            reading.interpreter()
