"""A transformer as the few numbers that decide what training it costs."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, V3): ranks of the compressed queries, keys and values; `rope` dimensions are not compressed."""

    query_rank: int  # 0: queries are not compressed
    kv_rank: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder. `head_dim` is of queries and keys, `ffn` of dense layers, `expert_ffn` of one expert; `sequence` is the longest it is made for.

    The first `dense_layers` layers have no experts, where there are any. A token's experts lie on at
    most `route_nodes` groups of ranks (0: anywhere). `positions` are learned position embeddings (0: rotary or none).
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    sequence: int = 2048
    gated: bool = True
    tied: bool = False
    positions: int = 0
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_experts: int = 0
    dense_layers: int = 0
    route_nodes: int = 0
    latent: Latent | None = None

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def common_ffn(self) -> int:
        """What tensor parallelism must divide: all that divides the inner width of dense layers and of experts, where there are any."""
        return gcd(self.ffn if self.moe_layers < self.layers else 0, self.expert_ffn if self.moe_layers else 0)

    @property
    def value_dim(self) -> int:
        """Of one head."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of keys and values of one token and layer, as attention reads them."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def cached_width(self) -> int:
        """Elements of one token and layer that a KV cache holds."""
        return self.latent.kv_rank + self.latent.rope if self.latent else self.kv_width

    @property
    def attention_weights(self) -> int:
        """Of one layer's projections."""
        out = self.heads * self.value_dim * self.hidden
        if self.latent is None:
            return self.hidden * (self.heads * self.head_dim + self.kv_width) + out
        one = self.latent
        rank = one.query_rank
        queries = (
            rank * (self.hidden + self.heads * self.head_dim) if rank else self.hidden * self.heads * self.head_dim
        )
        compressed = self.hidden * (one.kv_rank + one.rope)
        return queries + compressed + one.kv_rank * self.heads * (self.head_dim - one.rope + one.value) + out

    def mlp_weights(self, ffn: int) -> int:
        return (3 if self.gated else 2) * self.hidden * ffn

    @property
    def expert_weights(self) -> int:
        """Of all routed experts of one layer."""
        return self.experts * self.mlp_weights(self.expert_ffn)

    @property
    def routed_beside_weights(self) -> int:
        """Of one layer with experts, what every token passes besides them: shared experts and the router."""
        return self.shared_experts * self.mlp_weights(self.expert_ffn) + self.hidden * self.experts

    @property
    def layer_weights(self) -> float:
        """Of the average layer, without its routed experts."""
        dense = self.layers - self.moe_layers
        mlp = dense * self.mlp_weights(self.ffn) + self.moe_layers * self.routed_beside_weights
        return self.attention_weights + 2 * self.hidden + mlp / self.layers

    def mlp_ends(self, ffn: int) -> int:
        """Inputs and outputs of its linear layers, summed: an adapter has its rank of weights for each."""
        return (3 if self.gated else 2) * (self.hidden + ffn)

    @property
    def attention_ends(self) -> int:
        """Of one layer's projections."""
        out = self.heads * self.value_dim + self.hidden
        queries, one = self.heads * self.head_dim, self.latent
        if one is None:
            return self.hidden + queries + 2 * self.hidden + self.kv_width + out
        rank = one.query_rank
        compressed = self.hidden + one.kv_rank + one.rope + one.kv_rank
        return self.hidden + queries + 2 * rank + compressed + self.heads * (self.head_dim - one.rope + one.value) + out

    @property
    def layer_ends(self) -> float:
        """Of the average layer, without its routed experts."""
        dense = self.layers - self.moe_layers
        mlp = dense * self.mlp_ends(self.ffn) + self.moe_layers * self.shared_experts * self.mlp_ends(self.expert_ffn)
        return self.attention_ends + mlp / self.layers

    @property
    def embedding_weights(self) -> int:
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def head_weights(self) -> int:
        """Of the output layer, wherever it is kept."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        ends = self.embedding_weights + (0 if self.tied else self.head_weights) + self.hidden
        return round(self.layers * self.layer_weights) + self.moe_layers * self.expert_weights + ends

    @property
    def active_parameters(self) -> int:
        """Those that one token passes."""
        idle = self.moe_layers * (self.experts - self.top_k) * self.mlp_weights(self.expert_ffn)
        return self.parameters - idle

    def training_flops(self, sequence: int, *, frozen: bool = False) -> float:
        """Operations that one token needs, forward and backward, without what is computed again; of attention those that are not masked.

        6 (parameters - input embedding) + 6 layers x hidden x sequence (NeMo's and torchtitan's count since 2025); frozen weights have no gradients.
        """
        multiplied = self.active_parameters - self.embedding_weights + (self.head_weights if self.tied else 0)
        attention = 3 * self.layers * self.heads * (self.head_dim + self.value_dim) * sequence
        return (4 if frozen else 6) * multiplied + attention
