"""Models that are known by name: the shapes that their authors published. One line of `_TABLE` each."""

from __future__ import annotations

import difflib
import re

from whaleflux.errors import FieldViolation, InvalidArgument
from whaleflux.planning.model_shape import Latent, ModelShape


def _gpt(name: str, layers: int, hidden: int, heads: int, vocabulary: int = 50257, sequence: int = 2048) -> ModelShape:
    """GPT-2's kind: four times as wide inside, output layer tied to the embedding, learned positions."""
    return ModelShape(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocabulary, sequence, gated=False, tied=True, positions=sequence
    )  # fmt: skip


def _mpt(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    """MosaicML's: as GPT, positions by ALiBi or learned."""
    return ModelShape(name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50368, gated=False, tied=True)


def _llama(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, sequence: int,
    *, head_dim: int = 128, tied: bool = False,
) -> ModelShape:  # fmt: skip
    return ModelShape(name, layers, hidden, heads, kv_heads, head_dim, ffn, vocabulary, sequence, tied=tied)


def _experts(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, expert_ffn: int, experts: int, top_k: int, vocabulary: int, sequence: int,
    *, head_dim: int = 128,
) -> ModelShape:  # fmt: skip
    """Experts in every layer."""
    return ModelShape(
        name,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        expert_ffn,
        vocabulary,
        sequence,
        experts=experts,
        top_k=top_k,
        expert_ffn=expert_ffn,
    )


def _deepseek(
    name: str, layers: int, hidden: int, heads: int, ffn: int, vocabulary: int, experts: int, top_k: int, expert_ffn: int,
    dense_layers: int, *, query_rank: int = 1536, shared: int = 1, nodes: int = 0, sequence: int = 163_840,
) -> ModelShape:  # fmt: skip
    """Latent attention, a few dense layers first."""
    return ModelShape(
        name, layers, hidden, heads, heads, 192, ffn, vocabulary, sequence, experts=experts, top_k=top_k, expert_ffn=expert_ffn,
        shared_experts=shared, dense_layers=dense_layers, route_nodes=nodes, latent=Latent(query_rank, 512, 64, 128),
    )  # fmt: skip


_TABLE = (
    _gpt("gpt2", 12, 768, 12, sequence=1024),
    _gpt("gpt2-xl", 48, 1600, 25, sequence=1024),
    _gpt("gpt-3-5b", 24, 4096, 32, 51200),
    _gpt("gpt-3-20b", 44, 6144, 48, 51200),
    _gpt("gpt-3-175b", 96, 12288, 96, 51200),
    ModelShape("gpt-neox-20b", 44, 6144, 64, 64, 96, 24576, 50432, 2048, gated=False),
    _mpt("mpt-125m", 12, 768, 12),
    _mpt("mpt-350m", 24, 1024, 16),
    _mpt("mpt-760m", 24, 1536, 12),
    _mpt("mpt-1b", 24, 2048, 16),
    _mpt("mpt-3b", 32, 2560, 20),
    _mpt("mpt-7b", 32, 4096, 32),
    _mpt("mpt-13b", 40, 5120, 40),
    _mpt("mpt-30b", 48, 7168, 56),
    _mpt("mpt-70b", 80, 8192, 64),
    _llama("llama-2-7b", 32, 4096, 32, 32, 11008, 32000, 4096),
    _llama("llama-2-13b", 40, 5120, 40, 40, 13824, 32000, 4096),
    _llama("llama-2-70b", 80, 8192, 64, 8, 28672, 32000, 4096),
    _llama("llama-3-8b", 32, 4096, 32, 8, 14336, 128_256, 8192),
    _llama("llama-3-70b", 80, 8192, 64, 8, 28672, 128_256, 8192),
    _llama("llama-3.1-8b", 32, 4096, 32, 8, 14336, 128_256, 131_072),
    _llama("llama-3.1-70b", 80, 8192, 64, 8, 28672, 128_256, 131_072),
    _llama("llama-3.1-405b", 126, 16384, 128, 8, 53248, 128_256, 131_072),
    _llama("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128_256, 131_072, head_dim=64, tied=True),
    _llama("llama-3.2-3b", 28, 3072, 24, 8, 8192, 128_256, 131_072, tied=True),
    _llama("llama-3.3-70b", 80, 8192, 64, 8, 28672, 128_256, 131_072),
    _llama("mistral-7b", 32, 4096, 32, 8, 14336, 32000, 32_768),
    _llama("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152_064, 131_072),
    _llama("qwen2.5-14b", 48, 5120, 40, 8, 13824, 152_064, 131_072),
    _llama("qwen2.5-32b", 64, 5120, 40, 8, 27648, 152_064, 131_072),
    _llama("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152_064, 131_072),
    _llama("qwen3-8b", 36, 4096, 32, 8, 12288, 151_936, 40_960),
    _llama("qwen3-14b", 40, 5120, 40, 8, 17408, 151_936, 40_960),
    _llama("qwen3-32b", 64, 5120, 64, 8, 25600, 151_936, 40_960),
    ModelShape("nemotron-8b", 32, 4096, 32, 32, 128, 16384, 256_000, 4096, gated=False),
    ModelShape("nemotron-22b", 40, 6144, 48, 48, 128, 24576, 256_000, 4096, gated=False),
    ModelShape("nemotron-4-340b", 96, 18432, 96, 8, 192, 73728, 256_000, 4096, gated=False),
    _experts("mixtral-8x7b", 32, 4096, 32, 8, 14336, 8, 2, 32000, 32_768),
    _experts("mixtral-8x22b", 56, 6144, 48, 8, 16384, 8, 2, 32768, 65_536),
    _experts("qwen3-30b-a3b", 48, 2048, 32, 4, 768, 128, 8, 151_936, 40_960),
    _experts("qwen3-235b-a22b", 94, 4096, 64, 4, 1536, 128, 8, 151_936, 40_960),
    _experts("gpt-oss-20b", 24, 2880, 64, 8, 2880, 32, 4, 201_088, 131_072, head_dim=64),
    _experts("gpt-oss-120b", 36, 2880, 64, 8, 2880, 128, 4, 201_088, 131_072, head_dim=64),
    _deepseek("deepseek-v2-lite", 27, 2048, 16, 10944, 102_400, 64, 6, 1408, 1, query_rank=0, shared=2),
    _deepseek("deepseek-v3", 61, 7168, 128, 18432, 129_280, 256, 8, 2048, 3, nodes=4),
    _deepseek("kimi-k2", 61, 7168, 64, 18432, 163_840, 384, 8, 2048, 1, sequence=131_072),
    # A size that nobody published: 12 x hidden^2 a layer, to talk about what 700B takes.
    ModelShape("dense-700b", 136, 20480, 160, 160, 128, 83968, 128_256, 8192, gated=False),
)  # fmt: skip
MODELS = {one.name: one for one in _TABLE}
_BETWEEN = re.compile(r"(?<=[0-9])(?!\.[0-9])[^a-z0-9]+(?=[0-9])")
_NOISE = re.compile(r"(?<![0-9])[^a-z0-9]+|[^a-z0-9]+(?![0-9])")


def _key(name: str) -> str:
    """`meta-llama/Llama-3.1-70B-Instruct`, `LLAMA3.1_70B` and `llama-3.1-70b` are one; `llama-3-170b` is another.

    What stands between two numbers tells them apart: a point is part of a number, all else is not.
    """
    bare = re.sub(r"(-instruct|-chat|-base|-hf|-it)$", "", name.lower().rpartition("/")[2])
    return _NOISE.sub("", _BETWEEN.sub("-", bare))


_BY_KEY = {_key(one.name): one for one in _TABLE}


def model_named(name: str) -> ModelShape:
    """Raises InvalidArgument, with the nearest names, where it is not known."""
    if (found := _BY_KEY.get(_key(name))) is not None:
        return found
    near = difflib.get_close_matches(_key(name), _BY_KEY, 3, 0.5)
    meant = f"; did you mean {', '.join(_BY_KEY[one].name for one in near)}?" if near else "."
    raise InvalidArgument(
        FieldViolation(
            "model",
            f"{name[:80]!r} is not known by name{meant} Give its config.json or a YAML file, or one of: whaleflux fits --list",
        )
    )


def model_said(text: str) -> ModelShape:
    """A known name, or the fields of a model as JSON. Raises InvalidArgument."""
    from whaleflux.planning.model_files import model_from_text

    return model_from_text(text) if text.lstrip().startswith("{") else model_named(text)
