"""Trainings planned on the fleet: the rpc, and jobs that name a model instead of GPUs."""

import contextlib
import json
import math
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.protobuf.duration_pb2 import Duration
from typer.testing import CliRunner

from tests.support.scheduler_world import World, node
from whaleflux.cli import plan_command, training_plans
from whaleflux.cli.__main__ import app
from whaleflux.errors import InvalidArgument
from whaleflux.fleet.gpu_types import CATALOGUE
from whaleflux.fleet.links import Fabric as Network
from whaleflux.manifests.job_fields import Spec
from whaleflux.manifests.yaml_files import job_from_yaml
from whaleflux.planning import replan
from whaleflux.planning.calibration import MAX_BYTES, Calibrated
from whaleflux.planning.constants import FITTED
from whaleflux.planning.known_models import model_named
from whaleflux.planning.machine import Machine
from whaleflux.planning.offers import Offer
from whaleflux.planning.search import search
from whaleflux.planning.space import Asked
from whaleflux.planning.wish import Wish, wish_in
from whaleflux.v1 import scheduler_pb2 as pb
from whaleflux_scheduler.core import rank_maps, training_offers
from whaleflux_scheduler.core.lifecycle import GpuAssignment
from whaleflux_scheduler.core.ray_nodes import FreeNode
from whaleflux_scheduler.training_plans import calibrations

RUN = CliRunner()
SMALL = json.dumps({"name": "small", "layers": 8, "hidden": 1024, "heads": 8, "vocabulary": 32000, "sequence": 2048})


def asked(model=SMALL, **more):
    training = {"model": model, "batch": 64, "sequence": 2048}
    training |= {name: more.pop(name) for name in list(more) if name in ("batch", "batch_tokens", "sequence")}
    return pb.PlanTrainingRequest(training=pb.Training(**training), **more)


@pytest.mark.parametrize(
    ("model", "gpus", "island"),
    [("H100-80GB", 4, 4), ("H100-80GB", 8, 8), ("H200", 2, 2), ("RTX4090", 4, 4), ("GB200", 4, 72)],
)
def test_nvlink_ends_at_the_node_but_for_racks_of_trays(model, gpus, island):
    nodes = [FreeNode(node(f"s/{number}", gpus, model=model), gpus, 1000, 1 << 30) for number in range(4)]
    measured = {model: Calibrated(Machine.of(CATALOGUE.types[model]), FITTED, {})}
    has = training_offers.had(nodes)
    [usual], [known] = (training_offers.offers(has, 8, (), Network(), found) for found in (None, measured))
    assert (usual.fabric.island, known.measured.machine.fabric.island) == (island, island)
    assert usual.fabric.tiers[0].gpus == max(island, gpus)


async def planned(world, *arguments, **more):
    return await world.scheduler.PlanTraining(asked(*arguments, **more), None)


class TestFleet:
    @pytest.mark.parametrize(("types", "notes"), [((), 1), (("A100-80GB",), 0)])
    async def test_what_is_not_compared_is_said(self, types, notes):
        async with World() as world:
            await world.add(*(node(f"s{number}/a", 1) for number in range(8)), node("t/a", 1, model="A100-80GB"))
            found = await planned(world, gpu_types=types)
        said = "only the 8 types at sites with the most GPUs are compared, and 1 more are not; to compare others, name their types or sites"
        assert list(found.notes) == [said] * notes

    async def test_of_what_is_free_and_of_all(self):
        async with World() as world:
            await world.add(node("s/a"), node("s/b"))
            [plan] = (await planned(world)).plans
            assert (plan.gpus, plan.free_gpus) == (8, 8)
            assert sum(plan.step_seconds.values()) == pytest.approx(plan.step_s)
            assert sum(plan.memory_bytes.values()) <= plan.usable_bytes
            name = await world.submit(4)
            await world.reaches(name, "RUNNING")
            sizes = {(one.gpus, one.free_gpus) for one in (await planned(world)).plans}
            assert sizes == {(4, 4), (8, 4)}

    async def test_more_gpus_than_a_type_has_are_planned_on_those_that_there_are(self):
        async with World() as world:
            await world.add(node("s/a"), node("s/b", 2, model="H200"))
            plans = (await planned(world, gpus=64)).plans
            assert {(one.gpu_type, one.gpus, one.offered_gpus, one.node_gpus) for one in plans} == {
                ("H100-80GB", 4, 4, 4),
                ("H200", 2, 2, 2),
            }

    async def test_an_elastic_job_s_sizes_bound_its_plan(self):
        async with World() as world:
            await world.add(node("s/a", 8))
            free = (await planned(world, batch=12, gpus=7)).plans[0]
            bounded = (await planned(world, batch=12, gpus=7, min_gpus=4, gpus_step=4)).plans[0]
            assert (free.gpus, bounded.gpus) == (6, 4)
            refused = (await planned(world, gpus=64, min_gpus=16)).refused
            assert refused == ["H100-80GB: s has 8, and at least 16 are asked for"]
            assert (
                "no split uses 4 to 8 GPUs and a multiple of 4"
                in (
                    await planned(
                        world, batch=1, sequence=512, min_gpus=4, gpus_step=4, parallelism=pb.Parallelism(tensor=1)
                    )
                ).refused[0]
            )

    async def test_a_model_that_fits_nowhere_says_what_is_too_much(self):
        async with World() as world:
            await world.add(node("s/a"))
            found = await planned(world, "llama-3.1-405b")
            assert not found.plans
            assert found.refused

    async def test_a_goal_is_met_or_its_miss_is_named(self):
        async with World() as world:
            await world.add(node("s/a"))
            found = await planned(world, tokens=1e12, deadline=Duration(seconds=60))
            assert found.words
            assert "deadline" in found.plans[0].misses[0]
            assert found.plans[0].finish.ToTimedelta() > timedelta(days=1)

    @pytest.mark.parametrize(
        ("more", "field"),
        [
            ({"model": ""}, "training.model"), ({"model": "no-such-model"}, "training.model"), ({"model": '{"layers": 0}'}, "training.model.layers"),
            ({"model": "{" * 20_000}, "training.model"), ({"batch": -1}, "training.batch"), ({"batch": 1 << 40}, "training.batch"),
            ({"batch": 8, "batch_tokens": 8}, "training.batch_tokens"), ({"sequence": -5}, "training.sequence"), ({"gpus": -1}, "gpus"),
            ({"gpu_types": ["K900"]}, "gpu_types"), ({"tokens": float("nan")}, "tokens"), ({"budget_usd": 5.0}, "tokens"),
            ({"tokens": 1.0, "deadline": Duration(seconds=-1)}, "deadline"), ({"tokens": 1.0, "deadline": Duration(seconds=2**62)}, "deadline"),
            ({"parallelism": pb.Parallelism(tensor=-8)}, "parallelism.tensor"), ({"parallelism": pb.Parallelism(expert=1 << 30)}, "parallelism.expert"),
            ({"gpus": 4, "min_gpus": 8}, "min_gpus"), ({"gpus_step": -1}, "gpus_step"), ({"sites": ["sites/s"] * 101}, "sites"), ({"sites": ["s/t/u"]}, "sites"),
            ({"gpu_types": ["H200"] * 65}, "gpu_types"), ({"batch_tokens": -1, "batch": 0}, "training.batch_tokens"), ({"tokens": 1e17}, "tokens"),
        ],
    )  # fmt: skip
    async def test_what_is_wrong_is_named(self, more, field):
        async with World() as world:
            await world.add(node("s/a"))
            with pytest.raises(InvalidArgument) as refused:
                await planned(world, more.pop("model", SMALL), **more)
            assert field in {one.field for one in refused.value.violations}


class TestSites:
    async def test_a_training_stays_in_one_site_where_one_is_large_enough(self):
        async with World() as world:
            await world.add(node("s/a"), node("s/b", usd=2.0), node("t/c", usd=5.0))
            found = (await planned(world)).plans
            assert {(one.site, one.gpus, one.usd_per_hour) for one in found} == {
                ("sites/s", 8, 16.0),
                ("sites/t", 4, 20.0),
            }
            (four, also) = (await planned(world, gpus=4)).plans
            assert {four.site, also.site} == {"sites/s", "sites/t"}

    async def test_only_sites_and_nodes_that_will_do_are_planned_on(self):
        async with World() as world:
            labelled = replace(node("t/d", 2), labels=(("pool", "research"),))
            await world.add(node("s/a"), node("t/c"), labelled)
            assert {one.site for one in (await planned(world, sites=["sites/t"])).plans} == {"sites/t"}
            assert [
                one.gpus for one in (await planned(world, nodes=pb.NodeCount(labels={"pool": "research"}))).plans
            ] == [2]
            nowhere = await planned(world, sites=["sites/s"], nodes=pb.NodeCount(labels={"pool": "research"}))
            assert "at s on nodes with label pool=research" in nowhere.refused[0]

    async def test_over_several_sites_their_links_count(self):
        async with World() as world:
            await world.add(node("s/a"), node("s/b"), node("t/c"))
            (over,) = (await planned(world, gpus=12)).plans
            assert over.site == ""
            (within,) = [one for one in (await planned(world)).plans if one.site == "sites/s"]
            assert over.step_seconds["dp_s"] > 10 * within.step_seconds["dp_s"] or over.gpus < 12

    async def test_what_is_settled_of_the_split_stays(self):
        async with World() as world:
            await world.add(node("s/a"), node("s/b"))
            plan = (await planned(world, parallelism=pb.Parallelism(tensor=2))).plans[0]
            assert (plan.parallelism.tensor, plan.parallelism.pipeline, plan.parallelism.context) == (2, 1, 1)


class TestJobs:
    def submission(self, text, tmp_path):
        manifest = job_from_yaml(text, tmp_path)
        return SimpleNamespace(request=pb.CreateJobRequest(job=pb.Job(spec=manifest.spec)))

    def client(self, world, loop_result):
        return SimpleNamespace(scheduler=SimpleNamespace(PlanTraining=lambda request, timeout: loop_result))

    async def test_a_model_becomes_gpus_and_a_split_that_the_scheduler_takes(self, tmp_path):
        async with World() as world:
            await world.add(node("s/a"), node("s/b"))
            one = self.submission(
                f"name: t\nrun: python train.py\nbatch: 64\nsequence: 2048\nmodel: {SMALL}\n", tmp_path
            )
            answer = await world.scheduler.PlanTraining(training_plans.request_of(one.request.job.spec), None)
            lines = training_plans.plan_all(self.client(world, answer), [one])
            spec = one.request.job.spec
            assert spec.gpus == answer.plans[0].gpus
            assert list(spec.gpu.any_of) == [answer.plans[0].gpu_type]
            assert spec.parallelism.tensor == answer.plans[0].parallelism.tensor
            assert spec.environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True", "as memory is counted"
            assert any(line.startswith("TRAINING") for line in lines)
            one.request.parent = "queues/default"
            job = await world.scheduler.CreateJob(one.request, None)
            assert job.spec.training.batch == 64

    async def test_what_starts_now_goes_before_what_would_wait(self, tmp_path):
        plans = [
            pb.TrainingPlan(gpus=64, free_gpus=8, gpu_type="H200"),
            pb.TrainingPlan(gpus=8, free_gpus=8, gpu_type="H200"),
        ]
        assert training_plans.chosen(pb.PlanTrainingResponse(plans=plans)).gpus == 8

    def test_what_there_is_instead_is_neither_the_chosen_plan_nor_one_twice(self):
        small, large = (
            pb.TrainingPlan(gpus=n, free_gpus=8, gpu_type="H200", tokens_per_s=n, words=f"dp {n}") for n in (4, 8)
        )
        lines = training_plans.shown(pb.PlanTrainingResponse(plans=[large, large, small, small]))
        assert [line.split()[1] for line in lines if line.startswith("  instead ")] == ["4"]

    async def test_offers_that_come_to_one_plan_are_one_plan(self):
        """A batch of one sample of 512 tokens: neither of what is free nor of all are more than some of use."""
        async with World() as world:
            await world.add(node("s/a", 32))
            await world.reaches(await world.submit(1), "RUNNING")
            plans = (await planned(world, batch=1, sequence=512)).plans
            assert [one.gpus for one in plans] == [plans[0].gpus]

    async def test_without_a_plan_nothing_is_submitted(self, tmp_path):
        one = self.submission("name: t\nrun: x\nmodel: llama-3.1-405b\n", tmp_path)
        with pytest.raises(InvalidArgument, match="cannot be trained on this fleet"):
            training_plans.plan_all(self.client(None, pb.PlanTrainingResponse(refused=["8 x A: no"])), [one])

    async def test_a_job_that_nobody_planned_is_refused_by_the_scheduler(self):
        async with World() as world:
            await world.add(node("s/a"))
            spec = pb.JobSpec(command=["x"], training=pb.Training(model="llama-3.1-8b"))
            with pytest.raises(InvalidArgument, match="not planned yet"):
                await world.scheduler.CreateJob(
                    pb.CreateJobRequest(parent="queues/default", job_id="t", job=pb.Job(spec=spec)), None
                )

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("gpus: 1\nbatch: 8", "model"),
            ("model: nope-1b", "model"),
            ("model: {layers: -1}", "layers"),
            ("model: missing.json", "cannot be read"),
            ("model: {layers: 2024-01-01}", "model: holds something besides names, numbers"),
            ("model: {layers: {[1, 2]: 3}}", "model"),
            ("model: 3\nbatch: 0", "batch"),
        ],
    )
    def test_wrong_files_are_told_by_field(self, line, said, tmp_path):
        with pytest.raises(InvalidArgument) as refused:
            job_from_yaml(f"name: t\nrun: x\n{line}\n", tmp_path)
        assert said in str(refused.value)

    def test_no_gpus_and_a_model_are_refused(self, tmp_path):
        with pytest.raises(InvalidArgument, match="leave gpus out to have it planned"):
            job_from_yaml("name: t\nrun: x\ngpus: 0\nmodel: llama-3.1-8b\n", tmp_path)

    async def test_gpus_that_no_split_has_use_for_are_left_out_and_said(self, tmp_path):
        one = self.submission("name: t\nrun: x\ngpus: 3\nmodel: llama-3.1-8b\n", tmp_path)
        answer = pb.PlanTrainingResponse(
            plans=[pb.TrainingPlan(gpus=2, free_gpus=2, gpu_type="H200", site="sites/s", tokens_per_s=1.0)]
        )
        lines = training_plans.plan_all(self.client(None, answer), [one])
        assert one.request.job.spec.gpus == 2
        assert any("leaves out 1 of the 3 GPUs" in line for line in lines)

    @pytest.mark.parametrize(
        "lines",
        [
            "parallel: {tensor: 8}",
            "parallel: {expert: 2}",
            "gpus: 12\nparallel: {tensor: 8}",
            "elastic: {min: 8}\ncheckpoint: {every: 9}",
            "elastic: {min: 8}\ncheckpoint: {every: 9}\nparallel: {tensor: 8}",
            "nodes: {min: 2}\nplace: {tensor: {level: node, size: 8}}",
        ],
    )
    def test_what_the_plan_settles_is_not_asked_of_the_file(self, lines, tmp_path):
        spec = job_from_yaml(f"name: t\nrun: x\nmodel: llama-3.1-8b\nbatch: 16\n{lines}\n", tmp_path).spec
        assert spec.training.model == "llama-3.1-8b"

    @pytest.mark.parametrize(
        ("lines", "field"),
        [
            ("gpus: 4\nparallel: {tensor: 8}", "parallelism"),
            ("gpus: 4\nelastic: {min: 8}\ncheckpoint: {every: 9}", "elastic.min"),
            (
                "elastic: {min: 8}\ncheckpoint: {every: 9}\nparallel: {tensor: 8}\nenvironment: {MESH: mine}",
                "elastic.step",
            ),
        ],
    )
    def test_what_no_plan_can_mend_is_refused(self, lines, field, tmp_path):
        with pytest.raises(InvalidArgument) as refused:
            job_from_yaml(f"name: t\nrun: x\nmodel: llama-3.1-8b\n{lines}\n", tmp_path)
        assert {one.field for one in refused.value.violations} == {field}

    async def test_an_elastic_job_is_planned_within_its_sizes_and_shown_as_it_starts(self, tmp_path):
        async with World() as world:
            await world.add(node("s/a", 8))
            text = (
                f"name: t\nrun: x\ngpus: 4\nelastic: {{min: 2}}\ncheckpoint: {{every: 9}}\nbatch: 64\nmodel: {SMALL}\n"
            )
            one = self.submission(text, tmp_path)
            asked = training_plans.request_of(one.request.job.spec)
            assert (asked.min_gpus, asked.gpus) == (2, 4)
            answer = await world.scheduler.PlanTraining(asked, None)
            lines = training_plans.plan_all(self.client(world, answer), [one])
            assert one.request.job.spec.gpus == 4
            assert [line for line in lines if "planned for 4 GPUs; it starts with fewer, at least 2" in line]
            one.request.parent, one.request.validate_only = "queues/default", True
            decision = (await world.scheduler.CreateJob(one.request, None)).decision
            assert decision.usd_per_hour == pytest.approx(8.0)

    async def test_where_fewer_are_free_the_preview_is_of_the_least_size_that_has_a_plan(self, tmp_path):
        async with World() as world:
            await world.add(node("s/a", 8))
            await world.reaches(await world.submit(2), "RUNNING")
            text = f"name: t\nrun: x\ngpus: 8\nelastic: {{min: 3}}\ncheckpoint: {{every: 9}}\nbatch: 64\nmodel: {SMALL}\nparallel: {{tensor: 2}}\n"
            one = self.submission(text, tmp_path)
            answer = await world.scheduler.PlanTraining(training_plans.request_of(one.request.job.spec), None)
            training_plans.plan_all(self.client(world, answer), [one])
            one.request.parent, one.request.validate_only = "queues/default", True
            decision = (await world.scheduler.CreateJob(one.request, None)).decision
            assert (one.request.job.spec.gpus, decision.usd_per_hour) == (8, pytest.approx(2.0 * 4))
            assert any(reason.startswith("it can go on with 4, 6, 8 GPUs") for reason in decision.reasons)

    def test_sites_nodes_types_and_groups_are_asked_for(self, tmp_path):
        text = "name: t\nrun: x\nmodel: llama-3.1-8b\nsites: [s]\nnodes: {labels: {pool: a}}\ngpu: {memory: '>= 100 GB'}\nplace: {tensor: {level: node, size: 4}}\n"
        asked = training_plans.request_of(self.submission(text, tmp_path).request.job.spec)
        assert (list(asked.sites), dict(asked.nodes.labels), asked.gpus_step) == (["sites/s"], {"pool": "a"}, 4)
        assert {CATALOGUE.types[name].memory_bytes >= 100e9 for name in asked.gpu_types} == {True}

    def test_a_place_that_the_plan_cannot_keep_is_refused(self, tmp_path):
        one = self.submission("name: t\nrun: x\nmodel: llama-3.1-8b\nplace: {all: node}\n", tmp_path)
        answer = pb.PlanTrainingResponse(
            plans=[pb.TrainingPlan(gpus=16, free_gpus=16, node_gpus=8, gpu_type="H200", tokens_per_s=1.0, step_s=1.0)]
        )
        with pytest.raises(InvalidArgument, match=r"holds 16 ranks in one node, .* nodes have 8; write gpus: 8"):
            training_plans.plan_all(self.client(None, answer), [one])

    def test_gpus_that_are_not_there_are_said(self, tmp_path):
        one = self.submission("name: t\nrun: x\ngpus: 24\nmodel: llama-3.1-8b\n", tmp_path)
        plan = pb.TrainingPlan(gpus=16, free_gpus=16, offered_gpus=16, gpu_type="H200", tokens_per_s=1.0, step_s=1.0)
        lines = training_plans.plan_all(self.client(None, pb.PlanTrainingResponse(plans=[plan])), [one])
        assert any("leaves out 8 of the 24 GPUs that are asked for: 16 x H200 are there" in line for line in lines)

    def test_a_config_file_is_a_model(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("layers: 4\nhidden: 256\nheads: 4\nvocabulary: 1000\n")
        spec = job_from_yaml("name: t\nrun: x\nmodel: mine.yaml\n", tmp_path).spec
        assert json.loads(spec.training.model)["layers"] == 4


class TestLive:
    @pytest.fixture
    def asked(self, monkeypatch):
        found = []
        plan = pb.TrainingPlan(
            gpus=8,
            free_gpus=4,
            gpu_type="H200",
            tokens_per_s=1e5,
            step_s=2.0,
            step_seconds={"compute_s": 2.0},
            usd_per_hour=28.0,
            price_source="inventory",
            words="dp 8",
        )
        answer = pb.PlanTrainingResponse(plans=[plan])
        scheduler = SimpleNamespace(PlanTraining=lambda request, timeout: found.append(request) or answer)
        monkeypatch.setattr(plan_command, "fleet", lambda: contextlib.nullcontext(SimpleNamespace(scheduler=scheduler)))
        return found

    def test_the_question_is_the_scheduler_s(self, asked):
        done = RUN.invoke(
            app,
            ["plan", "llama-3.1-8b", "--live", "--gpu", "H200", "--tokens", "1B", "--deadline", "2d", "--batch", "64"],
        )
        assert done.exit_code == 0, done.output
        (request,) = asked
        assert (request.training.model, request.training.batch, request.gpus) == ("llama-3.1-8b", 64, 0)
        assert (request.tokens, request.deadline.seconds, list(request.gpu_types)) == (1e9, 172_800, ["H200"])
        assert "waits for  4 more GPUs; 4 are free" in done.output
        assert "$28.00/h (inventory)" in done.output

    def test_more_gpus_than_the_plan_uses_are_said(self, asked):
        done = RUN.invoke(app, ["plan", "llama-3.1-8b", "--live", "--gpus", "9"])
        assert "leaves out 1 of the 9 GPUs that are asked for" in done.output

    def test_as_json(self, asked):
        done = RUN.invoke(app, ["plan", "llama-3.1-8b", "--live", "-o", "json"])
        assert json.loads(done.output)["plans"][0]["gpus"] == 8

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--tp", "2"), "--live"),
            (("--gpus", "8-64"), "--gpus"),
            (("--price", "2"), "--live"),
            (("--software", "eager"), "--live"),
        ],
    )
    def test_what_the_scheduler_settles_cannot_be_said(self, asked, more, said):
        done = RUN.invoke(app, ["plan", "llama-3.1-8b", "--live", *more])
        assert done.exit_code != 0
        assert said in str(done.exception) + done.output
        assert not asked

    @pytest.mark.parametrize(
        ("more", "cheapest"),
        [((), False), (("--deadline", "9d"), True), (("--deadline", "9d", "--objective", "time"), False)],
    )
    def test_by_a_deadline_the_cheapest_is_asked_for_as_without_a_fleet(self, asked, more, cheapest):
        RUN.invoke(app, ["plan", "llama-3.1-8b", "--live", "--tokens", "1B", *more])
        assert asked[0].cheapest is cheapest


class TestAnew:
    @pytest.mark.parametrize(("settled", "whole"), [({}, True), ({"tensor": 2}, False)])
    async def test_a_plan_brings_its_mesh_and_what_it_takes_to_plan_it_anew(self, settled, whole):
        async with World() as world:
            await world.add(node("s/a"), node("s/b"))
            plan = (await planned(world, parallelism=pb.Parallelism(**settled))).plans[0]
        said = json.loads(plan.mesh)
        assert math.prod(said["mesh"].values()) == 8
        wish = wish_in([("MESH", plan.mesh)])
        assert (wish.whole, wish.tp, wish.batch) == (whole, said["mesh"]["tp"], plan.batch)
        fewer = json.loads(replan.replanned(wish, 4, Offer(CATALOGUE.types[wish.gpu], 4)).mesh)
        assert math.prod(fewer["mesh"].values()) == 4
        ranks = fewer["mesh"]["dp_replicate"] * fewer["mesh"]["dp_shard"]
        assert ranks * fewer["micro_batch"] * fewer["micro_batches"] == 64, "the batch is the same"

    def test_stages_keep_the_layers_that_were_saved(self):
        shape, gpu = model_named("llama-3.1-8b"), CATALOGUE.types["H200"]
        split = search(shape, Machine.of(gpu), Asked(8, 4096, tp=1, cp=1, ep=1, pp=4, batch=64, vp=1)).best.split
        assert split.last_layers
        wish = Wish(
            "llama-3.1-8b", "H200", 64, 4096, 1, 4, 1, first_layers=split.first_layers, last_layers=split.last_layers
        )
        anew = json.loads(replan.replanned(wish, 4, Offer(gpu, 4), wish.kept).mesh)
        assert tuple(anew["stage_layers"]) == split.stage_layers(shape)
        assert math.prod(anew["mesh"].values()) == 4


RECORDED = Path(__file__).parents[2] / "benchmarks/plan_lab/h200_reality.json"


class TestMoneyAndPrecision:
    def test_a_calibration_counts_for_each_precision_that_its_type_has(self, tmp_path):
        (tmp_path / "h200.json").write_text(json.dumps(json.loads(RECORDED.read_text())["ladder"]))
        found = calibrations(str(tmp_path))
        assert found["fp8"]["H200"].machine.flops > 1.5 * found["bf16"]["H200"].machine.flops

    def test_a_calibration_that_is_another_file_is_not_read_whole(self, tmp_path):
        (tmp_path / "h200.json").write_text(" " * (MAX_BYTES + 1))
        with pytest.raises(InvalidArgument, match=f"h200.json: .*longer than {MAX_BYTES} bytes"):
            calibrations(str(tmp_path))

    @pytest.mark.parametrize(("compiled", "notes"), [(True, 0), (False, 1)])
    async def test_a_calibration_without_compiled_layers_is_said(self, tmp_path, compiled, notes):
        ladder = json.loads(RECORDED.read_text())["ladder"]
        kept = [row for row in ladder["layer"] if compiled or "compiled" not in row[0]]
        (tmp_path / "h200.json").write_text(json.dumps(ladder | {"layer": kept}))
        async with World(measured=calibrations(str(tmp_path))) as world:
            await world.add(node("s/a", model="H200"))
            found = await world.scheduler.PlanTraining(asked(), None)
        assert len(found.notes) == notes
        shown = [line for line in training_plans.shown(found) if line.startswith("  note ")]
        assert ["compiled layers count with fitted constants" in line for line in shown] == [True] * notes

    async def test_8_bit_is_refused_where_gpus_have_none(self):
        async with World() as world:
            await world.add(node("s/a", model="A100-80GB"), node("s/b", model="H100-80GB"))
            request = asked()
            request.training.fp8 = True
            found = await world.scheduler.PlanTraining(request, None)
            assert {one.gpu_type for one in found.plans} == {"H100-80GB"}
            assert "A100-80GB has none; take bf16, or a type that has it" in found.refused[0]
            request.gpu_types.append("A100-80GB")
            found = await world.scheduler.PlanTraining(request, None)
            assert not found.plans
            assert "A100-80GB has none" in found.refused[0]

    async def test_a_budget_is_judged_on_the_dollars_that_are_shown(self):
        """GPUs that the plan does not use are left to others, and not paid for."""
        async with World() as world:
            await world.add(node("s/a", 7))
            [plan] = (await planned(world, tokens=1e9)).plans
            assert plan.gpus < 7
            assert plan.price_source == "inventory"
            assert plan.usd == pytest.approx(plan.gpus * 2.0 * plan.finish.ToTimedelta().total_seconds() / 3600)
            [same] = (await planned(world, tokens=1e9, budget_usd=plan.usd * 1.01)).plans
            assert not same.misses
            less = await planned(world, tokens=1e9, budget_usd=plan.usd * 0.99)
            assert less.plans[0].misses
            assert f"{plan.gpus} x H100-80GB" in less.words


def test_a_record_whose_model_no_rule_takes_any_more_is_placed_all_the_same():
    held = node("s/a")
    given = GpuAssignment(((held.name, tuple(gpu.uuid for gpu in held.gpus)),), gpus_by_model=(("H100-80GB", 4),))
    spec = Spec(gpus=4, tensor_parallel=2, train_model='{"layers": -1}')
    laid = rank_maps.laid(given, spec, {held.name: held}, Network())
    assert sorted(rank for there in laid.ranks for rank in there) == [0, 1, 2, 3]
