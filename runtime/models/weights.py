"""Every weight of a decoder: its name here, where it comes from in a checkpoint, its shape, how it would shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .config import ModelConfig

# How tensor parallelism would cut a weight: by output features, by input features, by vocabulary rows, or not at all.
Shard = Literal["column", "row", "vocab", "replicated"]


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of the checkpoint. ``name`` follows Hugging Face, without a family's prefix."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight: its sources joined along dimension 0 (fused query-key-value, fused gate-up)."""

    name: str
    sources: tuple[Source, ...]
    shard: Shard
    norm: bool = False  # kept in float32, with the family's offset added

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])


def weight_specs(config: ModelConfig) -> Iterator[WeightSpec]:
    """All weights, in the order the forward pass uses them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield WeightSpec("embedding", (Source("model.embed_tokens.weight", (vocab, hidden)),), "vocab")
    for i in range(config.num_layers):
        yield from _layer_specs(config, i)
    yield WeightSpec("norm", (Source("model.norm.weight", (hidden,)),), "replicated", norm=True)
    if not config.tied_embeddings:
        yield WeightSpec("lm_head", (Source("lm_head.weight", (vocab, hidden)),), "vocab")


def _layer_specs(config: ModelConfig, i: int) -> Iterator[WeightSpec]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    theirs = f"model.layers.{i}."

    def linear(
        name: str, module: str, outputs: dict[str, int], inputs: int, shard: Shard, bias: bool
    ) -> Iterator[WeightSpec]:
        sources = tuple(Source(f"{theirs}{module}.{out}.weight", (size, inputs)) for out, size in outputs.items())
        yield WeightSpec(f"layers.{i}.{name}", sources, shard)
        if bias:
            sources = tuple(Source(f"{theirs}{module}.{out}.bias", (size,)) for out, size in outputs.items())
            yield WeightSpec(f"layers.{i}.{name}_bias", sources, "replicated" if shard == "row" else shard)

    def norm(name: str, source: str, size: int) -> WeightSpec:
        return WeightSpec(f"layers.{i}.{name}", (Source(f"{theirs}{source}.weight", (size,)),), "replicated", norm=True)

    yield norm("attention_norm", "input_layernorm", hidden)
    yield from linear("qkv", "self_attn", {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden, "column", config.qkv_bias)
    if config.qk_norm:
        yield norm("q_norm", "self_attn.q_norm", config.head_dim)
        yield norm("k_norm", "self_attn.k_norm", config.head_dim)
    yield from linear("o", "self_attn", {"o_proj": hidden}, q, "row", config.o_bias)
    if config.sandwich_norms:
        yield norm("attention_post_norm", "post_attention_layernorm", hidden)
        yield norm("mlp_norm", "pre_feedforward_layernorm", hidden)
        yield norm("mlp_post_norm", "post_feedforward_layernorm", hidden)
    else:
        yield norm("mlp_norm", "post_attention_layernorm", hidden)
    yield from linear("gate_up", "mlp", {"gate_proj": inner, "up_proj": inner}, hidden, "column", config.mlp_bias)
    yield from linear("down", "mlp", {"down_proj": hidden}, inner, "row", config.mlp_bias)
