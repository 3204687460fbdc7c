"""Models that people describe: a Hugging Face `config.json`, or a YAML file of our own few fields. Text in, a shape or named mistakes out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.model_shape import Latent, ModelShape
from whaleflux.planning.wish import MOST_SEQUENCE

MAX_BYTES = 1 << 20  # a config.json has a few kilobytes
_MAX_YAML = 16 << 10  # which is slow to read, and has a dozen lines
_MEANT = 20  # mistakes for which it is looked what was meant, which takes long
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a number may be. `meaning` is what the field is for."""

    least: int
    most: int
    meaning: str


_NUMBERS = {
    "layers": _Kind(1, 10_000, "transformer layers"),
    "hidden": _Kind(8, 1 << 18, "width of the hidden state"),
    "heads": _Kind(1, 4096, "attention heads"),
    "kv_heads": _Kind(1, 4096, "heads of keys and values"),
    "head_dim": _Kind(1, 4096, "width of a head"),
    "ffn": _Kind(1, 1 << 22, "inner width of the feed-forward part"),
    "vocabulary": _Kind(1, 10_000_000, "tokens that there are"),
    "sequence": _Kind(1, MOST_SEQUENCE, "longest sequence"),
    "positions": _Kind(0, MOST_SEQUENCE, "learned position embeddings"),
    "experts": _Kind(0, 65_536, "routed experts of a layer"),
    "top_k": _Kind(0, 65_536, "experts that a token visits"),
    "expert_ffn": _Kind(0, 1 << 22, "inner width of one expert"),
    "shared_experts": _Kind(0, 1024, "experts that every token visits"),
    "dense_layers": _Kind(0, 10_000, "layers without experts"),
    "route_nodes": _Kind(0, 4096, "groups of ranks that a token's experts lie on"),
    "query_rank": _Kind(0, 1 << 18, "rank of compressed queries"),
    "kv_rank": _Kind(1, 1 << 18, "rank of compressed keys and values"),
    "rope": _Kind(0, 4096, "rotated dimensions of a head"),
    "value": _Kind(1, 4096, "width of a head's values"),
}
_NEEDED = ("layers", "hidden", "heads", "vocabulary")
_LATENT = ("query_rank", "kv_rank", "rope", "value")
_OF_EXPERTS = ("top_k", "expert_ffn", "shared_experts", "dense_layers", "route_nodes")
_SWITCHES = ("gated", "tied")


def model_from_text(text: str, name: str = "model") -> ModelShape:
    """A `config.json` where it begins as JSON does, else YAML. Raises InvalidArgument naming every mistake with its limit and its fix."""
    if len(text) > MAX_BYTES:
        raise _wrong(
            "file",
            f"is longer than {MAX_BYTES} characters; a model's config.json has a few thousand: is it another file?",
        )
    if text.lstrip("\ufeff \t\r\n")[:1] == "{" and (written := _json(text)) is not None:
        return _from_config(written, name) if "layers" not in written else _from_fields(written, name)
    if len(text) > _MAX_YAML:
        raise _wrong(
            "file",
            f"is longer than the {_MAX_YAML} characters of a YAML file of a model's few fields: is it another file?",
        )
    content = _yaml(text)
    if not isinstance(content, dict):
        raise _wrong("file", "must have fields such as `layers: 32`, or be a Hugging Face config.json")
    return _from_fields(content, name)


def _wrong(field: str, what: str) -> InvalidArgument:
    return InvalidArgument(FieldViolation(field, what))


def _yaml(text: str) -> Any:
    from whaleflux.manifests.yaml_text import load

    return load(text)


def _flow(text: str) -> dict[str, Any] | None:
    """YAML in braces (`{layers: 32}`); None for what is none. Raises InvalidArgument for mistakes of YAML where the first name is not quoted."""
    if len(text) > _MAX_YAML:
        return None
    try:
        content = _yaml(text)
    except InvalidArgument:
        if text.lstrip("\ufeff \t\r\n{")[:1].isalpha():
            raise
        return None
    return content if isinstance(content, dict) else None


def _json(text: str) -> dict[str, Any] | None:
    """Or YAML in flow style. Raises InvalidArgument for what is neither."""

    def refuse(constant: str) -> Any:
        raise _wrong("file", f"has {constant}, which is no number; write the number")

    try:
        found = json.loads(text.lstrip("\ufeff"), parse_constant=refuse)
    except json.JSONDecodeError as error:
        if (flow := _flow(text)) is not None:
            return flow
        raise _wrong(
            "file", f"is not JSON at line {error.lineno}, column {error.colno}; download the config.json again"
        ) from None
    except (RecursionError, ValueError):
        raise _wrong(
            "file", "is nested too deep, or has a number that is too long, for a config.json; download it again"
        ) from None
    return found if isinstance(found, dict) else None


def _number(content: Mapping[str, Any], label: str, kind: _Kind, wrong: list[FieldViolation]) -> int | None:
    """The value under `label`; None where there is none, or it is wrong, which is then written down."""
    value = content.get(label)
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole = whole or (isinstance(value, float) and value.is_integer())  # neither NaN nor infinite
    if whole and kind.least <= value <= kind.most:
        return int(value)
    shown = repr(value)[:_SHOWN] if not isinstance(value, (dict, list)) else "a list or fields"
    wrong.append(FieldViolation(label, f"is {shown}; {kind.meaning}: a whole number from {kind.least} to {kind.most}"))
    return None


def _from_fields(content: Mapping[str, Any], name: str) -> ModelShape:
    """Our own fields."""
    wrong: list[FieldViolation] = []
    known = (*(one for one in _NUMBERS if one not in _LATENT), *_SWITCHES, "name", "latent")
    for label in content:
        if label not in known:
            near = get_close_matches(str(label)[:_SHOWN], known, 1) if len(wrong) < _MEANT else []
            meant = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
            wrong.append(FieldViolation(str(label)[:_SHOWN], f"is not known; {meant}"))
    numbers = {label: _number(content, label, kind, wrong) for label, kind in _NUMBERS.items() if label not in _LATENT}
    switches = {label: _switch(content, label, default, wrong) for label, default in (("gated", True), ("tied", False))}
    latent = content.get("latent")
    if latent is not None and not isinstance(latent, dict):
        wrong.append(FieldViolation("latent", f"must be fields: {', '.join(_LATENT)}"))
        latent = None
    for label in latent or ():
        if label not in _LATENT:
            wrong.append(
                FieldViolation(f"latent.{str(label)[:_SHOWN]}", f"is not known; known are: {', '.join(_LATENT)}")
            )
    within: list[FieldViolation] = []
    ranks = (
        {label: _number(latent, label, _NUMBERS[label], within) for label in _LATENT} if latent is not None else None
    )
    wrong += [FieldViolation(f"latent.{one.field}", one.description) for one in within]
    called = content.get("name")
    return _shape(str(called)[:100] if isinstance(called, str) else name, numbers, switches, ranks, {}, wrong)


def _switch(content: Mapping[str, Any], label: str, default: bool, wrong: list[FieldViolation]) -> bool:
    value = content.get(label, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        wrong.append(FieldViolation(label, f"is {repr(value)[:_SHOWN]}; it must be true or false"))
        return default
    return value


@dataclass(frozen=True, slots=True)
class _Family:
    """How one `model_type` of Hugging Face names things: our field -> its names, the first that is there."""

    gated: bool = True
    tied: bool = False  # where the file does not say
    learned_positions: bool = False
    own: Mapping[str, tuple[str, ...]] | None = None


_COMMON: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner"),
    "vocabulary": ("vocab_size",),
    "sequence": ("max_position_embeddings", "n_positions", "n_ctx"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token"),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_experts": ("n_shared_experts",),
    "dense_layers": ("first_k_dense_replace",),
    "route_nodes": ("topk_group",),
}
_FAMILIES = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek", "deepseek_v2", "deepseek_v3", "kimi_k2", "phi3",
            "olmo2", "granite", "gpt_oss",
        ),
        _Family(),
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _Family(tied=True)),
    "gpt2": _Family(gated=False, tied=True, learned_positions=True),
    "gpt_neox": _Family(gated=False),
    "nemotron": _Family(gated=False),
}  # fmt: skip
_FLAGS = {"tied": "tie_word_embeddings"}
_RANKS = {"query_rank": "q_lora_rank", "kv_rank": "kv_lora_rank", "rope": "qk_rope_head_dim", "value": "v_head_dim"}


def _from_config(content: Mapping[str, Any], name: str) -> ModelShape:
    """A Hugging Face config.json; of a model with several parts, the text's."""
    inner = content.get("text_config")
    if isinstance(inner, dict):
        content = {"model_type": str(inner.get("model_type") or content.get("model_type")), **inner}
    kind = content.get("model_type")
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise _wrong(
            "model_type",
            f"is {repr(kind)[:_SHOWN]}, whose fields are not known; known are: {', '.join(_FAMILIES)}. Describe the model in YAML instead: "
            "layers, hidden, heads, kv_heads, ffn, vocabulary",
        )
    wrong: list[FieldViolation] = []
    labels = {
        ours: next((one for one in theirs if content.get(one) is not None), theirs[0])
        for ours, theirs in _COMMON.items()
    }
    numbers = {ours: _number(content, label, _NUMBERS[ours], wrong) for ours, label in labels.items()}
    if content.get("shared_expert_intermediate_size") and numbers.get("expert_ffn"):  # Qwen2-MoE
        shared = _number(content, "shared_expert_intermediate_size", _NUMBERS["expert_ffn"], wrong)
        numbers["shared_experts"] = (shared or 0) // (numbers["expert_ffn"] or 1)
    if numbers["experts"] and not numbers["expert_ffn"]:
        numbers["expert_ffn"] = numbers["ffn"]
    if content.get("n_group") is None or content["n_group"] == 1:
        numbers["route_nodes"] = None  # one group is everywhere
    if family.learned_positions:
        numbers["positions"] = numbers["sequence"]
    tied = _switch(content, _FLAGS["tied"], family.tied, wrong)
    labels |= {f"latent.{ours}": theirs for ours, theirs in _RANKS.items()}
    return _shape(
        name, numbers, {"gated": family.gated, "tied": tied}, _config_latent(content, numbers, wrong), labels, wrong
    )


def _config_latent(
    content: Mapping[str, Any], numbers: dict[str, int | None], wrong: list[FieldViolation]
) -> dict[str, int | None] | None:
    """DeepSeek's: where keys and values are compressed, a head is its rotated dimensions and the others."""
    if content.get("kv_lora_rank") is None:
        return None
    read: Callable[[str, str], int | None] = lambda label, ours: _number(content, label, _NUMBERS[ours], wrong)  # noqa: E731
    rope, other = read("qk_rope_head_dim", "rope"), read("qk_nope_head_dim", "head_dim")
    if other is None and "qk_nope_head_dim" not in {one.field for one in wrong}:
        wrong.append(FieldViolation("qk_nope_head_dim", "is missing: dimensions of a head that are not rotated"))
    numbers["head_dim"] = (rope or 0) + (other or 0) or None
    numbers["kv_heads"] = numbers["heads"]
    read_ranks = {ours: read(theirs, ours) for ours, theirs in _RANKS.items() if ours != "rope"}
    return read_ranks | {"query_rank": read_ranks["query_rank"] or 0, "rope": rope}


def _shape(
    name: str,
    numbers: Mapping[str, int | None],
    switches: Mapping[str, bool],
    ranks: Mapping[str, int | None] | None,
    labels: Mapping[str, str],
    wrong: list[FieldViolation],
) -> ModelShape:
    """Fills in what follows from the rest and checks what fields say of one another. `labels` is how the file calls our fields."""
    said = {one.field for one in wrong}
    for need in _NEEDED:
        label = labels.get(need, need)
        if numbers.get(need) is None and label not in said:
            wrong.append(FieldViolation(label, f"is missing: {_NUMBERS[need].meaning}"))
    if ranks is not None:
        wrong += [
            FieldViolation(label, f"is missing: {_NUMBERS[one].meaning}")
            for one in _LATENT
            if ranks.get(one) is None and (label := labels.get(f"latent.{one}", f"latent.{one}")) not in said
        ]
    if wrong:
        raise InvalidArgument(wrong[:20])
    given = {label: value for label, value in numbers.items() if value is not None}
    hidden, heads = given["hidden"], given["heads"]
    given.setdefault("kv_heads", heads)
    wrong += _between(given, labels, ranks or {})
    if wrong:
        raise InvalidArgument(wrong)
    given.setdefault("head_dim", hidden // heads)
    given.setdefault("ffn", 4 * hidden)
    latent = Latent(**{one: ranks[one] or 0 for one in _LATENT}) if ranks else None
    return ModelShape(name=name, latent=latent, gated=switches["gated"], tied=switches["tied"], **given)


def _between(
    given: Mapping[str, int], labels: Mapping[str, str], ranks: Mapping[str, int | None]
) -> list[FieldViolation]:
    """What is wrong between fields that are each right."""

    def called(field: str) -> str:
        return labels.get(field, field)

    hidden, heads, kv_heads = given["hidden"], given["heads"], given["kv_heads"]
    experts, top_k = given.get("experts", 0), given.get("top_k", 0)
    head_dim, rope = given.get("head_dim", hidden // heads), ranks.get("rope") or 0
    # A config.json of a family says widths of experts that one of its models does not have.
    idle = [one for one in (_OF_EXPERTS if not labels else _OF_EXPERTS[:1]) if given.get(one) and not experts]
    rules = (
        ("heads", "head_dim" not in given and hidden % heads != 0,
         f"is {heads}, which does not divide {called('hidden')} {hidden}: take a divisor, or say {called('head_dim')}"),
        ("kv_heads", heads % kv_heads != 0, f"is {kv_heads}, which does not divide {called('heads')} {heads}: take a divisor of it"),
        ("top_k", experts > 0 and not 1 <= top_k <= experts,
         f"is {top_k}: from 1 to the {experts} of {called('experts')}; a model without experts says neither"),
        ("expert_ffn", experts > 0 and not given.get("expert_ffn"), "is missing: inner width of one expert"),
        ("dense_layers", given.get("dense_layers", 0) > given["layers"],
         f"is {given.get('dense_layers', 0)}: at most the {given['layers']} of {called('layers')}"),
        ("latent.rope", rope > head_dim,
         f"is {rope}: at most the {head_dim} of {called('head_dim')}, of which they are a part; take fewer, or a larger head_dim"),
    )  # fmt: skip
    found = [FieldViolation(called(field), what) for field, broken, what in rules if broken]
    return found + [
        FieldViolation(
            called(one), f"is {given[one]}, and there are no {called('experts')}: say how many, or leave it out"
        )
        for one in idle
    ]
