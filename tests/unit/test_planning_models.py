"""Models as a few numbers: known by name, from a config.json, from YAML; whatever is wrong names its field, its limit and its fix."""

import json
import time

import pytest

from whaleflux.errors import InvalidArgument
from whaleflux.planning.known_models import MODELS, model_named
from whaleflux.planning.model_files import MAX_BYTES, model_from_text

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "rope_scaling": None,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "vocab_size": 129280, "max_position_embeddings": 163840,
}  # fmt: skip
# What their authors say, in billions.
PUBLISHED = {
    "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "llama-3.1-405b": 405.9, "llama-2-13b": 13.02, "gpt-3-175b": 175, "gpt-neox-20b": 20.55,
    "mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235, "deepseek-v3": 671, "deepseek-v2-lite": 15.7, "kimi-k2": 1026,
    "gpt-oss-120b": 116.8, "nemotron-4-340b": 341, "llama-3.2-1b": 1.24, "dense-700b": 700, "gpt2": 0.124,
}  # fmt: skip


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_known_models_have_as_many_parameters_as_their_authors_say(name, billions):
    assert model_named(name).parameters / 1e9 == pytest.approx(billions, rel=0.006)


@pytest.mark.parametrize(("name", "billions"), [("deepseek-v3", 37), ("qwen3-30b-a3b", 3.3), ("mixtral-8x7b", 12.9)])
def test_a_token_passes_as_many_as_they_say(name, billions):
    assert model_named(name).active_parameters / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("said", ["meta-llama/Llama-3.1-70B-Instruct", "LLAMA3.1_70B", "llama-3.1-70b"])
def test_one_model_has_the_names_that_people_write(said):
    assert model_named(said) is MODELS["llama-3.1-70b"]


@pytest.mark.parametrize(
    "said", ["Qwen/Qwen2-57B", "llama-3-18b", "llama-3-1.8b", "llama-31-8b", "gpt-3.5b", "qwen-2.57b"]
)
def test_a_name_is_never_taken_for_another_models(said):
    with pytest.raises(InvalidArgument, match="is not known by name; did you mean"):
        model_named(said)


def test_experts_in_one_group_may_lie_anywhere():
    assert model_from_text(json.dumps(DEEPSEEK | {"n_group": 1, "topk_group": 1})).route_nodes == 0
    assert model_from_text(json.dumps(DEEPSEEK | {"topk_group": 1})).route_nodes == 0
    assert model_from_text(json.dumps(DEEPSEEK | {"n_group": 8, "topk_group": 4})).route_nodes == 4


def test_a_name_that_is_not_known_is_answered_with_near_ones():
    with pytest.raises(InvalidArgument, match=r"did you mean .*llama-3-70b.*\? Give"):
        model_named("lama-3-70b")
    with pytest.raises(InvalidArgument, match=r"'/dev/zero' is not known by name\. Give"):
        model_named("/dev/zero")


def test_config_json_gives_the_shape_that_the_table_has():
    read = model_from_text(json.dumps(LLAMA), "x")
    assert read.parameters == model_named("llama-3-8b").parameters
    assert (read.kv_heads, read.head_dim, read.gated, read.tied, read.sequence) == (8, 128, True, False, 8192)
    deep = model_from_text(json.dumps(DEEPSEEK), "x")
    assert deep.parameters == model_named("deepseek-v3").parameters
    assert deep.cached_width == 576


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}, 0.124),
        ({"model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64, "intermediate_size": 24576,
          "vocab_size": 50432, "max_position_embeddings": 2048}, 20.55),
        ({"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
          "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}, 46.7),
        ({"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
          "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}, 30.5),
        ({"model_type": "mistral", **{k: v for k, v in LLAMA.items() if k != "model_type"}, "vocab_size": 32000}, 7.24),
        ({"model_type": "llava", "text_config": LLAMA}, 8.03),
    ],
)  # fmt: skip
def test_families_of_hugging_face_are_read(config, billions):
    assert model_from_text(json.dumps(config)).parameters / 1e9 == pytest.approx(billions, rel=0.006)


def test_yaml_of_our_own_fields():
    read = model_from_text(
        "name: mine\nlayers: 32\nhidden: 4096\nheads: 32\nkv_heads: 8\nffn: 14336\nvocabulary: 128256\ntied: false\n"
    )
    assert (read.name, read.parameters) == ("mine", model_named("llama-3-8b").parameters)
    small = model_from_text("layers: 2\nhidden: 64\nheads: 4\nvocabulary: 100\ngated: false")
    assert small.ffn == 256


def changed(**more):
    return json.dumps({**LLAMA, **more})


def yaml(**more):
    fields = {"layers": 32, "hidden": 4096, "heads": 32, "vocabulary": 32000} | more
    return "\n".join(f"{name}: {value}" for name, value in fields.items())


HOSTILE = {
    "zero heads": (changed(num_attention_heads=0), "num_attention_heads"),
    "heads not dividing": (changed(num_attention_heads=33, num_key_value_heads=11), "num_attention_heads"),
    "kv heads not dividing": (changed(num_key_value_heads=7), "num_key_value_heads"),
    "more kv heads than heads": (changed(num_key_value_heads=64), "num_key_value_heads"),
    "vocabulary of 10^9": (changed(vocab_size=10**9), "vocab_size"),
    "negative layers": (changed(num_hidden_layers=-1), "num_hidden_layers"),
    "a million layers": (changed(num_hidden_layers=10**6), "num_hidden_layers"),
    "NaN": (changed(hidden_size=float("nan")), "file"),
    "infinity": (changed(hidden_size=float("inf")), "file"),
    "a fraction": (changed(hidden_size=4096.5), "hidden_size"),
    "a word": (changed(hidden_size="large"), "hidden_size"),
    "true": (changed(num_hidden_layers=True), "num_hidden_layers"),
    "a list": (changed(intermediate_size=[1, 2]), "intermediate_size"),
    "a number of 5000 digits": (json.dumps(LLAMA).replace("4096", "9" * 5000, 1), "file"),
    "a number of 400 digits": (changed(hidden_size=10**400), "hidden_size"),
    "as YAML too": (yaml(hidden="1" + "0" * 400), "hidden"),
    "thousands of fields unknown": ("\n".join(f"x{'y' * 30}{n}: 1" for n in range(400)), f"x{'y' * 30}7"),
    "1e400": (json.dumps(LLAMA).replace("4096", "1e400", 1), "hidden_size"),
    "no fields": ("{}", "model_type"),
    "a type that is not known": (changed(model_type="mamba"), "model_type"),
    "a type that is no word": (changed(model_type=["llama"]), "model_type"),
    "hidden missing": (json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}), "hidden_size"),
    "more experts visited than there are": (changed(model_type="mixtral", num_local_experts=8, num_experts_per_tok=9), "num_experts_per_tok"),
    "experts that nobody visits": (changed(model_type="mixtral", num_local_experts=8), "num_experts_per_tok"),
    "more dense layers than layers": (json.dumps(DEEPSEEK | {"first_k_dense_replace": 99}), "first_k_dense_replace"),
    "half of latent attention": (json.dumps({k: v for k, v in DEEPSEEK.items() if k != "v_head_dim"}), "v_head_dim"),
    "torn JSON": (json.dumps(LLAMA)[:-20], "file"),
    "nested 100,000 deep": ('{"a":' * 100_000, "file"),
    "a list of JSON": (json.dumps([LLAMA]), "file"),
    "too long": (" " * (MAX_BYTES + 1), "file"),
    "a megabyte of YAML": ("a: [1, 2]\n" * 100_000, "file"),
    "a megabyte of JSON": (json.dumps({**LLAMA, "id2label": {str(n): "x" for n in range(60_000)}, "hidden_size": -1}), "hidden_size"),
    "empty": ("", "file"),
    "an alias bomb": ("a: &a [x,x]\nb: &b [*a,*a]\nlayers: *b\n", "file"),
    "YAML field unknown": (yaml(hiden=3), "hiden"),
    "YAML zero heads": (yaml(heads=0), "heads"),
    "YAML NaN": (yaml(hidden=".nan"), "hidden"),
    "YAML experts without width": (yaml(experts=8, top_k=2), "expert_ffn"),
    "YAML heads of a word": (yaml(heads="many"), "heads"),
    "YAML tied of a number": (yaml(tied=3), "tied"),
    "YAML latent of a word": (yaml(latent="yes"), "latent"),
    "YAML latent of nothing": (yaml(latent="{}"), "latent.kv_rank"),
    "YAML latent's field unknown": (yaml(latent="{query_rank: 0, kv_rank: 64, rope: 32, value: 64, ropee: 3}"), "latent.ropee"),
    "YAML more rotated than a head has": (yaml(latent="{query_rank: 0, kv_rank: 64, rope: 4096, value: 1}"), "latent.rope"),
    "a head of rotated dimensions alone": (json.dumps({k: v for k, v in DEEPSEEK.items() if k != "qk_nope_head_dim"}), "qk_nope_head_dim"),
    "YAML visits without experts": (yaml(top_k=2), "top_k"),
    "YAML width without experts": (yaml(expert_ffn=512), "expert_ffn"),
    "visits without experts": (changed(num_experts_per_tok=2), "num_experts_per_tok"),
    "binary": ("\x00\x01\x02\x7f", "file"),
    "a date": (yaml(layers="2026-13-45"), "file"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "field"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_wrong_names_its_field_its_limit_and_its_fix_at_once(text, field):
    began = time.process_time()
    with pytest.raises(InvalidArgument) as refused:
        model_from_text(text, "m")
    assert time.process_time() - began < 1
    named = {one.field: one.description for one in refused.value.violations}
    assert field in named, named
    assert 10 < len(named[field]) < 700
    assert not any(word in refused.value.message for word in ("Traceback", "Error:", "Exception", "object at"))


def test_every_mistake_is_named_at_once():
    with pytest.raises(InvalidArgument) as refused:
        model_from_text(changed(num_attention_heads=0, vocab_size=-5, num_hidden_layers="x"))
    assert {one.field for one in refused.value.violations} == {"num_attention_heads", "vocab_size", "num_hidden_layers"}


@pytest.mark.parametrize(
    "text",
    [
        "{layers: 32, hidden: 4096, heads: 32, vocabulary: 32000}",
        '{"layers": 32, "hidden": 4096, "heads": 32, "vocabulary": 32000,}',
    ],
)
def test_yaml_in_flow_style_is_read(text):
    assert model_from_text(text).layers == 32


@pytest.mark.parametrize(("text", "said"), [('{"layers": 32', "is not JSON at line 1"), ("{layers: 32", "line 1")])
def test_open_braces_are_a_mistake_in_what_they_began_as(text, said):
    with pytest.raises(InvalidArgument, match=said) as caught:
        model_from_text(text)
    assert ("JSON" in str(caught.value)) is ('"' in text)
