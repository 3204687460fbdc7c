"""Emitted configurations: what each format says of a plan, what it refuses, that scripts run; and the ten rules over what was emitted."""

import json
import os
import shlex
import subprocess
import tomllib
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from whaleflux.errors import InvalidArgument
from whaleflux.planning.emit import FORMATS, emit
from whaleflux.planning.emit.planned import Planned
from whaleflux.planning.known_models import model_named
from whaleflux.planning.plans import Plans, Recompute
from whaleflux.planning.stated import read
from whaleflux.planning.training import Training
from whaleflux.planning.validity import RULES, check

LLAMA = model_named("llama-3.1-70b")
EXPERTS = model_named("qwen3-30b-a3b")
DEEPSEEK = model_named("deepseek-v3")
UNEVEN = {"tp": 8, "pp": 4, "dp": 4, "zero": 1, "sequence_parallel": True, "first_layers": 19, "last_layers": 17}
SIZES = {"micro_batch": 1, "global_batch": 128, "sequence": 8192}


def planned(shape=LLAMA, how=None, **split):
    return Planned.of(shape, Plans.of(**(SIZES | split)), how or Training())


def flags(emitted):
    """As the program behind the script gets them."""
    inside = emitted.text.partition("arguments=(")[2].partition("\n)\n")[0]
    found = {}
    words = shlex.split(inside)
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word[2:]] = None if after.startswith("--") else after
    return found


class TestUneven:
    """Stages with layers of their own, and recomputation in the first stages alone."""

    def test_megatron_has_flags_for_both_ends(self):
        said = flags(emit("megatron", planned(**UNEVEN)))
        assert (said["decoder-first-pipeline-num-layers"], said["decoder-last-pipeline-num-layers"]) == ("19", "17")
        virtual = flags(emit("megatron", planned(**UNEVEN | {"vp": 2, "first_layers": 20, "last_layers": 16})))
        assert virtual["num-virtual-stages-per-pipeline-rank"] == "2"
        assert "num-layers-per-virtual-pipeline-stage" not in virtual

    def test_torchtitan_has_less_layers_at_the_ends(self):
        split = tomllib.loads(emit("torchtitan", planned(**UNEVEN)).text)["parallelism"]
        less = [split[f"pipeline_parallel_{end}_stage_less_layers"] for end in ("first", "last")]
        assert less == [3, 5]
        assert (80 + sum(less)) == split["pipeline_parallel_layers_per_stage"] * 4

    def test_a_mesh_says_the_layers_of_each_stage(self):
        said = json.loads(emit("fsdp2", planned(**UNEVEN)).text)
        assert said["stage_layers"] == [19, 22, 22, 17]

    def test_ranks_of_the_first_stages_alone_have_flags_of_recomputation(self, tmp_path):
        again = {"recompute": Recompute.FULL, "recomputed": 0.5, "recomputing": 2}
        path = tmp_path / "megatron.sh"
        path.write_text(emit("megatron", planned(**UNEVEN | again)).text)
        shown = {"python": '#!/bin/sh\necho rank "$@"\n', "torchrun": '#!/bin/sh\necho torchrun "$@"\n'}
        for name, text in shown.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)

        def run(**more):
            variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MASTER_ADDR": "here", **more}
            return subprocess.run(
                ["bash", str(path), "--lr", "1"], env=variables, text=True, capture_output=True, check=True
            ).stdout

        assert "--recompute-method block --recompute-num-layers 11" in run(RANK="63")  # of 32 in each stage
        assert "--recompute" not in run(RANK="64")
        started = run()
        assert started.startswith("torchrun")
        assert f"--no-python bash {path} --lr 1" in started

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"vp": 2, "first_layers": 20, "last_layers": 16}, "plan with --vp 1"),
            ({"recompute": Recompute.FULL, "recomputing": 2}, "plan with --recompute full"),
            ({"pp": 4, "first_layers": 8, "last_layers": 32}, "stage of 32 layers, more than each between them has"),
            ({"pp": 4, "first_layers": 26, "last_layers": 0}, "stage of 26 layers, more than each between them has"),
        ],
    )
    def test_what_torchtitan_cannot_say_of_stages_it_refuses(self, more, said):
        with pytest.raises(InvalidArgument, match=said):
            emit("torchtitan", planned(**UNEVEN | more))


class TestMegatron:
    def test_a_dense_model_split_in_three_ways(self):
        said = flags(
            emit("megatron", planned(tp=8, pp=4, dp=4, vp=2, zero=1, sequence_parallel=True, recompute=Recompute.FULL))
        )
        assert said["tensor-model-parallel-size"] == "8"
        assert said["pipeline-model-parallel-size"] == "4"
        assert said["num-layers-per-virtual-pipeline-stage"] == "10"
        assert said["num-query-groups"] == "8"
        assert {"sequence-parallel", "use-distributed-optimizer", "bf16", "swiglu"} <= said.keys()
        assert (said["recompute-granularity"], said["recompute-method"], said["recompute-num-layers"]) == (
            "full",
            "uniform",
            "1",
        )

    def test_experts_and_latent_attention(self):
        said = flags(emit("megatron", planned(DEEPSEEK, dp=64, ep=64, zero=1)))
        assert said["num-experts"] == "256"
        assert said["expert-model-parallel-size"] == "64"
        assert said["moe-layer-freq"] == "([0]*3+[1]*58)"
        assert (said["qk-head-dim"], said["qk-pos-emb-head-dim"], said["kv-lora-rank"]) == ("128", "64", "512")

    def test_zero_3_in_replicas_is_megatron_fsdp(self):
        said = flags(emit("megatron", planned(dp=16, zero=3, replicas=2)))
        assert said["data-parallel-sharding-strategy"] == "optim_grads_params"
        assert said["num-distributed-optimizer-instances"] == "2"
        assert said["ckpt-format"] == "fsdp_dtensor"

    def test_a_share_of_the_layers_is_counted_up_to_whole_ones(self):
        said = flags(emit("megatron", planned(pp=8, dp=1, recompute=Recompute.FULL, recomputed=0.55)))
        assert (said["recompute-method"], said["recompute-num-layers"]) == ("block", "6")

    def test_adapters_are_refused_with_what_to_use(self):
        with pytest.raises(InvalidArgument, match="adapters; use --emit fsdp2"):
            emit("megatron", planned(how=Training(frozen=True), dp=8))

    @pytest.mark.parametrize("rank", [None, "3"])
    def test_the_script_starts_the_program_with_the_flags_and_what_is_added(self, tmp_path, rank):
        """By torchrun, or in a rank that something else has started by python."""
        for launcher in ("torchrun", "python"):
            (tmp_path / launcher).write_text(f'#!/bin/sh\necho {launcher} "$@"\n')
            (tmp_path / launcher).chmod(0o755)
        script = tmp_path / "megatron.sh"
        script.write_text(emit("megatron", planned(DEEPSEEK, dp=8, ep=8)).text)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **({"RANK": rank} if rank else {})}
        done = subprocess.run(
            ["bash", script, "--lr", "1e-4"], env=environment, capture_output=True, text=True, check=True
        )
        said = done.stdout.split()
        assert said[0] == ("python" if rank else "torchrun")
        assert "pretrain_gpt.py" in said
        assert "([0]*3+[1]*58)" in said
        assert said[-2:] == ["--lr", "1e-4"]


class TestTorchtitan:
    def test_a_model_that_it_has(self):
        said = tomllib.loads(emit("torchtitan", planned(tp=8, pp=4, dp=4, zero=1, sequence_parallel=True)).text)
        assert said["model"] == {"name": "llama3", "flavor": "70B"}
        assert said["parallelism"]["pipeline_parallel_layers_per_stage"] == 20
        assert said["training"]["local_batch_size"] == 32
        assert said["activation_checkpoint"] == {"mode": "none"}

    def test_hsdp(self):
        split = tomllib.loads(emit("torchtitan", planned(dp=16, zero=3, replicas=2)).text)["parallelism"]
        assert (split["data_parallel_replicate_degree"], split["data_parallel_shard_degree"]) == (2, 8)
        assert split["fsdp_reshard_after_forward"] == "always"

    def test_a_model_that_it_has_not_says_what_to_register(self):
        done = emit("torchtitan", planned(model_named("llama-2-70b"), tp=8, dp=2, zero=3, sequence_parallel=True))
        assert any("TransformerModelArgs(dim=" in note for note in done.notes)

    def test_a_name_with_quotes_is_still_a_string(self):
        shape = replace(model_named("llama-2-70b"), name='a"b\\c\nd')
        said = tomllib.loads(emit("torchtitan", planned(shape, dp=2, zero=3)).text)
        assert said["model"]["flavor"] == 'a"b\\c d'
        for form in ("megatron", "torchrun"):
            assert "\nd" not in emit(form, planned(shape, dp=2, zero=3)).text

    @pytest.mark.parametrize(
        ("shape", "split", "words"),
        [
            (model_named("mixtral-8x7b"), {"dp": 8}, "which it does not have; use --emit megatron"),
            (LLAMA, {"dp": 2, "tp": 8}, "plan with --zero 1"),
            (LLAMA, {"dp": 2, "cp": 4, "zero": 3, "replicas": 4}, "let replicas divide dp 2"),
            (model_named("qwen3-8b"), {"pp": 4, "zero": 1}, "its qwen3 has none; plan with --pp 1"),
            (model_named("gpt-oss-20b"), {"pp": 4, "zero": 1}, "its gpt_oss has none; plan with --pp 1"),
            (model_named("gpt-oss-20b"), {"cp": 2, "zero": 1}, "its gpt_oss has none; plan with --cp 1"),
            (EXPERTS, {"dp": 8, "ep": 8}, "more with --zero 1"),
            (EXPERTS, {"dp": 8, "ep": 8, "zero": 1, "replicas": 2}, "let it divide shards x cp, 4 here"),
            (EXPERTS, {"dp": 4, "cp": 4, "ep": 2, "zero": 3}, "plan with a --cp that divides it"),
            (LLAMA, {"tp": 16, "zero": 3}, "8 heads of keys and values"),
            (LLAMA, {"tp": 4, "sequence": 8188, "dp": 1}, "plan with --sequence 8192"),
        ],
    )
    def test_what_its_fields_cannot_say(self, shape, split, words):
        with pytest.raises(InvalidArgument, match=words):
            emit("torchtitan", planned(shape, **split))


class TestDeepSpeed:
    def test_zero_and_batches(self):
        said = json.loads(emit("deepspeed", planned(dp=32, zero=2, micro_batch=2)).text)
        assert said["zero_optimization"]["stage"] == 2
        assert (
            said["train_batch_size"]
            == said["train_micro_batch_size_per_gpu"] * said["gradient_accumulation_steps"] * 32
        )

    def test_without_zero_it_would_not_start(self):
        with pytest.raises(InvalidArgument, match="plan with --zero 1"):
            emit("deepspeed", planned(dp=32))

    def test_all_that_is_code_is_refused_at_once(self):
        with pytest.raises(InvalidArgument) as refused:
            emit("deepspeed", planned(tp=2, pp=2, cp=2, dp=8, zero=1))
        assert len(refused.value.violations) == 3
        assert "use --emit megatron" in str(refused.value)


class TestMesh:
    def test_hsdp_beside_tensor_parallelism(self):
        said = json.loads(emit("fsdp2", planned(tp=4, dp=8, zero=3, replicas=2)).text)
        assert said["mesh"] == {"pp": 1, "dp_replicate": 2, "dp_shard": 4, "cp": 1, "tp": 4}
        assert said["reshard_after_forward"] is True

    def test_zero_1_gathers_and_reduces_once(self):
        said = json.loads(emit("fsdp2", planned(dp=8, zero=1)).text)
        assert (said["reshard_after_forward"], said["reduce_each_micro_batch"]) == (False, False)

    def test_adapters_are_the_scripts_own(self):
        assert "adapters are the script's own" in " ".join(
            emit("fsdp2", planned(how=Training(frozen=True), dp=8, zero=3)).notes
        )

    def test_more_tensor_parallelism_than_heads_of_keys_is_said(self):
        said = emit("fsdp2", planned(tp=16, zero=3)).notes
        assert any("8 heads of keys and values are fewer than tensor parallelism 16" in note for note in said)

    def test_experts_are_no_dimension(self):
        with pytest.raises(InvalidArgument, match="expert parallelism 8"):
            emit("fsdp2", planned(EXPERTS, dp=8, ep=8, zero=3))


class TestTorchrun:
    @pytest.mark.parametrize(
        ("split", "nodes", "each"),
        [
            ({"dp": 8}, 1, 8),
            ({"dp": 3, "tp": 4, "global_batch": 3}, 3, 4),
            ({"dp": 12, "global_batch": 12}, 2, 6),
            ({"tp": 16}, 2, 8),
            ({"dp": 7, "global_batch": 7}, 1, 7),
        ],
    )
    def test_nodes_are_even_and_keep_tensor_parallelism_inside(self, split, nodes, each):
        shape = planned(**split)
        assert (shape.nodes, shape.per_node) == (nodes, each)
        assert f"--nproc-per-node={each}" in emit("torchrun", shape).text

    @pytest.mark.parametrize("form", ["torchrun", "megatron"])
    def test_nodes_that_are_not_filled_are_said_with_what_fills_them(self, form):
        said = emit(form, planned(dp=11, global_batch=11)).notes
        assert any("11 nodes start 1 each" in note and "--gpus 8 or --gpus 16" in note for note in said)
        for whole in ({"dp": 16}, {"dp": 5, "global_batch": 5}):
            assert not any("whole nodes" in note for note in emit(form, planned(**whole)).notes)

    def test_an_unknown_format_is_named(self):
        with pytest.raises(InvalidArgument, match="take one of torchrun, megatron"):
            emit("alpa", planned(dp=8))

    def test_a_plan_that_breaks_a_rule_is_refused_with_the_rule(self):
        with pytest.raises(InvalidArgument, match="heads must be a multiple of tp"):
            planned(tp=3, dp=1)
        with pytest.raises(InvalidArgument, match="are 2 plans"):
            planned(dp=[1, 2])


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_gpus_without_bf16_get_no_file_that_says_it(form):
    plan = Planned.of(LLAMA, Plans.of(**SIZES, dp=8, zero=1), Training(), capability=(7, 0))
    if form in ("megatron", "torchtitan", "deepspeed"):
        with pytest.raises(InvalidArgument, match=r"compute capability 7\.0"):
            emit(form, plan)
    else:
        assert form == "torchrun" or "float16" in " ".join(emit(form, plan).notes)


@st.composite
def valid_plans(draw):
    """A plan of one of five models that breaks no rule of `Plans.faults`."""
    shape = draw(st.sampled_from([LLAMA, EXPERTS, DEEPSEEK, model_named("gpt3-175b"), model_named("gpt-oss-20b")]))
    power = st.sampled_from([1, 2, 4, 8, 16])
    divisors = [n for n in range(1, 17) if shape.layers % n == 0]
    pp, dp, cp, tp, micro = (
        draw(st.sampled_from(divisors)),
        draw(power),
        draw(power),
        draw(power),
        draw(st.sampled_from([1, 2])),
    )
    vp = draw(st.sampled_from([1, 2, 5]))
    split = {
        "tp": tp, "pp": pp, "dp": dp, "cp": cp, "vp": vp, "micro_batch": micro, "global_batch": micro * dp * pp * draw(st.sampled_from([1, 3])),
        "ep": draw(power), "zero": draw(st.sampled_from([0, 1, 2, 3])), "replicas": draw(st.sampled_from([1, 2])), "sequence": 8192,
        "recompute": draw(st.sampled_from(list(Recompute))), "recomputed": draw(st.sampled_from([0.2, 0.5, 1.0])),
        "sequence_parallel": draw(st.booleans()), "recomputing": draw(st.sampled_from([0, 0, pp - 1])),
    }  # fmt: skip
    if pp > 1 and draw(st.booleans()):
        less = draw(st.integers(0, pp - 1)) * vp
        between = (shape.layers + less) // pp
        split |= {"first_layers": between - less, "last_layers": shape.layers - (pp - 1) * between + less}
    assume(Plans.of(**split).valid(shape).all())
    return planned(shape, Training(fp8=draw(st.sampled_from([0, 1]))), **split)


def torchtitan_starts(text, plan):
    """What torchtitan 0.2.0 to 0.2.2 refuse when they start: ParallelDims, the models' parallelize functions, their train specs."""
    tables = tomllib.loads(text)
    split, model = tables["parallelism"], tables["model"]
    family = model["name"]
    copies, shards = split["data_parallel_replicate_degree"], split["data_parallel_shard_degree"]
    tp, cp, pp = (split[f"{name}_parallel_degree"] for name in ("tensor", "context", "pipeline"))
    assert copies * shards * tp * cp * pp == plan.split.gpus
    if (ep := split.get("expert_parallel_degree", 1)) > 1:
        assert split["expert_tensor_parallel_degree"] == tp
        assert ep % cp == 0
        assert shards * cp % ep == 0
    assert tables["training"]["seq_len"] % (tp * 2 * cp) == 0
    assert pp == 1 or family in ("llama3", "deepseek_v3")
    assert cp == 1 or family != "gpt_oss"
    assert plan.shape.kv_heads % tp == 0  # rows of wk and wv that are then seen as heads
    replicated_only = copies > 1 and shards * cp == 1 and ep == 1
    assert not (replicated_only and tp * pp > 1)  # its data-parallel wrapper knows one dimension
    recipe = tables.get("quantize", {}).get("linear", {}).get("float8", {}).get("recipe_name")
    assert not (family == "deepseek_v3" and recipe == "tensorwise" and tp > 1)
    assert tables["training"]["global_batch_size"] % (tables["training"]["local_batch_size"] * copies * shards) == 0


def deepspeed_starts(text, plan):
    """What DeepSpeed 0.19 refuses when it starts: types of parameters and of sums of gradients, by ZeRO's stage."""
    said = json.loads(text)
    stage, sums = said["zero_optimization"]["stage"], said["data_types"]["grad_accum_dtype"]
    assert stage > 0 or (sums == "bf16") == said["bf16"]["enabled"]
    assert (
        said["train_batch_size"]
        == plan.split.gpus * said["train_micro_batch_size_per_gpu"] * said["gradient_accumulation_steps"]
    )


STARTS = {"torchtitan": torchtitan_starts, "deepspeed": deepspeed_starts}


@settings(max_examples=600, deadline=None)
@given(valid_plans(), st.sampled_from(sorted(FORMATS)))
def test_what_is_emitted_of_a_valid_plan_breaks_no_rule(plan, form):
    try:
        emitted = emit(form, plan)
    except InvalidArgument as refused:
        assert all(
            "cannot express this plan" in one.description
            and ("use " in one.description or "let " in one.description or "plan with" in one.description)
            for one in refused.violations
        )
        return
    if form == "torchrun":
        assert plan.nodes * plan.per_node == plan.split.gpus
        return
    assert check(emitted.text, plan.split.gpus) == ()
    STARTS.get(form, lambda _text, _plan: None)(emitted.text, plan)
    said = read(emitted.text, plan.split.gpus)
    assert said.gpus in (plan.split.gpus, plan.split.global_batch)  # DeepSpeed says the batch
    assert (said.tp, said.pp, said.ep if form != "fsdp2" else plan.split.ep) == (
        plan.split.tp,
        plan.split.pp,
        plan.split.ep,
    )


MEGATRON = "torchrun --nnodes 2 --nproc-per-node 8 pretrain_gpt.py --num-layers 32 --num-attention-heads 32 --bf16 "
TITAN = '[model]\nname = "llama3"\nflavor = "8B"\n[parallelism]\n'
TITAN_EXPERTS = TITAN.replace("llama3", "qwen3").replace("8B", "30B-A3B")
BROKEN = [
    ("gpus", MEGATRON + "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 3"),
    ("gpus", TITAN + "tensor_parallel_degree = 3\n"),
    ("gpus", '{"train_batch_size": 100, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}'),
    ("gpus", '{"mesh": {"dp_shard": 5, "tp": 2}, "parameters": "bfloat16"}'),
    ("interleaved", MEGATRON + "--num-layers-per-virtual-pipeline-stage 4"),
    ("interleaved", TITAN + 'pipeline_parallel_schedule = "Interleaved1F1B"\n'),
    ("sequence-parallel", MEGATRON + "--sequence-parallel"),
    ("sequence-parallel", '{"mesh": {"dp_shard": 16}, "sequence_parallel": true, "parameters": "bfloat16"}'),
    ("stage-precision", MEGATRON.replace("--bf16", "") + "--pipeline-model-parallel-size 2"),
    ("stage-precision", '{"mesh": {"pp": 2, "dp_shard": 8}}'),
    ("heads", MEGATRON.replace("heads 32", "heads 30") + "--tensor-model-parallel-size 4"),
    ("heads", TITAN.replace("8B", "405B") + "tensor_parallel_degree = 16\n".replace("16", "256")),
    ("experts", MEGATRON + "--expert-model-parallel-size 2"),
    ("experts", TITAN + "expert_parallel_degree = 2\n"),
    ("precision", MEGATRON + "--fp16"),
    ("precision", '{"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": true}, "bf16": {"enabled": true}}'),
    ("expert-gpus", MEGATRON + "--num-experts 3 --expert-model-parallel-size=3"),
    ("expert-gpus", TITAN.replace("llama3", "qwen3").replace("8B", "30B-A3B") + "expert_parallel_degree = 32\n"),
    ("expert-gpus", TITAN_EXPERTS + "data_parallel_replicate_degree = 8\nexpert_parallel_degree = 8\n"),
    ("expert-gpus", TITAN_EXPERTS + "context_parallel_degree = 8\nexpert_parallel_degree = 4\n"),
    ("expert-gpus", TITAN_EXPERTS + "tensor_parallel_degree = 4\nexpert_parallel_degree = 2\n"),
    ("layers", MEGATRON + "--pipeline-model-parallel-size 5"),
    ("layers", MEGATRON + "--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 7"),
    (
        "layers",
        MEGATRON
        + "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 15 --num-virtual-stages-per-pipeline-rank 2",
    ),
    ("layers", MEGATRON + "--pipeline-model-parallel-size 4 --account-for-loss-in-pipeline-split"),
    ("layers", TITAN + "pipeline_parallel_degree = 4\npipeline_parallel_layers_per_stage = 6\n"),
    (
        "layers",
        '{"mesh": {"pp": 2, "dp_shard": 8}, "model": {"layers": 8}, "stage_layers": [4, 5], "parameters": "bfloat16"}',
    ),
    (
        "expert-gpus",
        TITAN_EXPERTS + "tensor_parallel_degree = 4\nexpert_parallel_degree = 4\nexpert_tensor_parallel_degree = 2\n",
    ),
    ("batch", MEGATRON + "--micro-batch-size 2 --global-batch-size 24"),
    ("batch", MEGATRON + "--tensor-model-parallel-size 4 --context-parallel-size 2 --global-batch-size 7"),
    ("batch", TITAN + "context_parallel_degree = 2\n[training]\nlocal_batch_size = 2\nglobal_batch_size = 24\n"),
]


@pytest.mark.parametrize(("rule", "text"), BROKEN, ids=[f"{rule}-{number}" for number, (rule, _) in enumerate(BROKEN)])
def test_each_of_the_ten_is_caught_with_its_numbers_and_a_fix(rule, text):
    found = {one.rule: one for one in check(text, 16)}
    assert rule in found
    assert found[rule].words
    assert found[rule].fix


def test_there_are_ten_and_each_has_a_broken_example():
    assert len(RULES) == 10
    assert {rule for rule, _ in BROKEN} == RULES.keys()


def test_the_batch_is_named_with_the_nearest_that_runs():
    (found,) = check(MEGATRON + "--tensor-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 100")
    assert found.words == "--global-batch-size 100 is not a multiple of --micro-batch-size 4 x 8 data-parallel ranks"
    assert found.fix.startswith("let --global-batch-size be 96 or 128, or take")
    (small,) = check(MEGATRON + "--micro-batch-size 2 --global-batch-size 8")
    assert small.fix.startswith("let --global-batch-size be 32, or take")


@pytest.mark.parametrize(
    "more",
    [
        "--micro-batch-size 2 --global-batch-size 64",
        "--micro-batch-size 2 --global-batch-size 24 --decrease-batch-size-if-needed",
        "--micro-batch-size $MICRO --global-batch-size $BATCH",
        "--micro-batch-size 3",
    ],
)
def test_batches_that_run_or_that_nobody_knows_break_none(more):
    assert check(MEGATRON + more) == ()
    assert check(TITAN + "[training]\nlocal_batch_size = 2\n", 16) == ()


def test_what_the_trainer_of_hugging_face_fills_in_is_unsaid():
    auto = (
        '{"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto", '
    )
    assert (
        check(auto + '"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3}}')
        == ()
    )
    assert check('{"train_batch_size": 64, "train_micro_batch_size_per_gpu": "auto"}', 16) == ()
    (found,) = check('{"train_batch_size": 60, "train_micro_batch_size_per_gpu": "auto"}', 16)
    assert found.rule == "gpus"


def test_right_ones_of_people_break_none():
    assert check(MEGATRON + "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel") == ()
    assert check(TITAN + "tensor_parallel_degree = 4\n", 16) == ()
    ends = "--decoder-first-pipeline-num-layers 7 --decoder-last-pipeline-num-layers 7"
    assert check(MEGATRON + f"--pipeline-model-parallel-size 4 {ends}") == ()
    assert check(MEGATRON + "--pipeline-model-parallel-size 4 --pipeline-model-parallel-layout Et*9|t*9|t*9|t*5L") == ()
    for degrees in (
        "expert_parallel_degree = 8",
        "tensor_parallel_degree = 4\nexpert_parallel_degree = 8",
        "data_parallel_replicate_degree = 2\nexpert_parallel_degree = 8",
    ):
        assert check(f"{TITAN_EXPERTS}{degrees}\n", 16) == ()
    assert check('{"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}', 16) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "says nothing of a split"),
        ("hello 'world", "a quote is open"),
        ("{", "is no JSON"),
        ("[" * 100_000, "says nothing of a split"),
        ('{"a":' * 50_000, "is no JSON"),
        ('{"hello": 1}', "JSON of neither"),
        ('{"mesh": 3}', "mesh: must be a table"),
        ('{"mesh": {"tp": 1e400}}', "mesh.tp: is 'inf'"),
        ("--tensor-model-parallel-size many", "--tensor-model-parallel-size: is 'many'"),
        ("--tensor-model-parallel-size 0", "must be a whole number from 1"),
        ("--tensor-model-parallel-size " + "9" * 5000, "must be a whole number from 1"),
        ("--tensor-model-parallel-size ٣", "must be a whole number from 1"),
        ("[parallelism]\ntensor_parallel_degree = true\n", "is 'True'"),
        ("[parallelism]\ndata_parallel_shard_degree = 0\n", "data_parallel_shard_degree: is '0'"),
        ("[parallelism]\n[training]\nglobal_batch_size = 0\n", "training.global_batch_size: is '0'"),
        ('{"train_micro_batch_size_per_gpu": "some"}', "train_micro_batch_size_per_gpu: is 'some'"),
        ("parallelism = 3\n", "parallelism: must be a table"),
        ("x" * 2_000_000, "is longer than"),
        ("x = " + "9" * 5000, "a number of thousands of digits"),
        ("[parallelism]\ntensor_parallel_degree = 0x" + "f" * 5000, "is 'a number of thousand"),
        ("[parallelism]\ntensor_parallel_degree = [0x" + "f" * 5000 + "]", "is 'a number of thousand"),
        ("a" + ".a" * 32_000 + "=1\n", "says nothing of a split"),
        ("[parallelism]\n" + "#\n" * 40_000, "is TOML of more than 65,536 bytes"),
    ],
)
def test_what_is_no_configuration_is_refused_by_its_field(text, said):
    with pytest.raises(InvalidArgument, match=said.replace("(", r"\(")):
        check(text)


def test_a_script_says_its_own_gpus_and_no_other_number_is_taken_for_them():
    assert check(MEGATRON, 16) == check(MEGATRON) == ()
    with pytest.raises(InvalidArgument, match="--gpus: is 12, and FILE starts 16"):
        check(MEGATRON, 12)


@pytest.mark.parametrize(
    "launch", ["--nproc-per-node gpu", "--nproc-per-node=auto", "--nnodes $NODES --nproc-per-node 8"]
)
def test_processes_that_the_machines_say_are_unsaid(launch):
    script = f"torchrun {launch} {MEGATRON.partition('-node 8 ')[2]} --tensor-model-parallel-size 4"
    assert check(script) == check(script, 8) == ()
    assert [one.rule for one in check(script, 6)] == ["gpus"]


@pytest.mark.parametrize("form", ["torchrun", "megatron"])
def test_scripts_set_the_allocator_that_memory_is_planned_with(form):
    """Whoever sets the variable keeps what they said."""
    assert (
        "PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" in emit(form, planned(dp=8)).text
    )
