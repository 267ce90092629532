"""The weights of a decoder: names, shapes, tensors in the checkpoint, and slices under tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..errors import LoadError
from .config import ModelConfig

# Where tensor parallelism cuts a weight: along its outputs (dimension 0), along its inputs (dimension 1), or nowhere.
# rank0: the bias of a weight that is cut along its inputs. Only rank 0 has it, so that the sum over ranks adds it once.
Shard = Literal["column", "row", "replicated", "rank0"]
_BLOCKS = (128, 16)  # cuts are at multiples of the first that fits: quantized products need aligned sizes


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one tensor of the checkpoint: the whole tensor, or one part of a fused tensor (Phi 3's ``qkv_proj``)."""

    name: str  # as Hugging Face names it, without a layout's prefix
    shape: tuple[int, ...]  # of these rows
    units: int = 0  # parts of the sharded dimension that stay whole, such as heads; 0: every index is its own
    start: int = 0  # row of the tensor that is the first of these
    tensor_rows: int = 0  # rows of the whole tensor, if that is more than ``shape`` says
    interleaved: int = 0  # of each unit, leading rows of which even and odd ones are to be moved apart


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight: its sources concatenated along dimension 0 (fused query-key-value, fused gate-up)."""

    name: str
    sources: tuple[Source, ...]
    shard: Shard
    norm: bool = False  # a norm or another small vector: kept in float32, with the family's offset added

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])


def rank_config(config: ModelConfig, world: int) -> ModelConfig:
    """The config of one of ``world`` ranks: as many heads as each computes. Where there are fewer KV heads than ranks,
    each is replicated. Raises `LoadError` if the heads cannot be divided."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % world or (kv_heads % world and world % kv_heads):
        raise LoadError(
            f"--tensor-parallel-size {world}: {heads} attention heads and {kv_heads} KV heads cannot be divided by it"
        )
    return replace(config, num_heads=heads // world, num_kv_heads=max(1, kv_heads // world))


def shard(spec: WeightSpec, rank: int, world: int) -> tuple[tuple[slice, ...], ...]:
    """The slice of each source that rank ``rank`` of ``world`` holds, as an index into the source (Megatron-LM's cuts).

    Units are dealt out in equal contiguous ranges. Where there are fewer units than ranks, as with KV heads, each unit
    is replicated on ``world / units`` neighbouring ranks. Rows that are no units, such as the vocabulary, are cut into
    equal ranges of whole blocks; the last ranges are shorter where the blocks do not divide.
    """
    return tuple(_source_shard(spec, source, rank, world) for source in spec.sources)


def _source_shard(spec: WeightSpec, source: Source, rank: int, world: int) -> tuple[slice, ...]:
    index = [slice(0, size) for size in source.shape]
    if spec.shard in ("replicated", "rank0"):
        return tuple(index)
    dim = 0 if spec.shard == "column" else 1
    size = source.shape[dim]
    if source.units:
        unit, first = size // source.units, rank * source.units // world
        index[dim] = slice(first * unit, max((rank + 1) * source.units // world, first + 1) * unit)
    else:
        index[dim] = even_range(size, rank, world)
    return tuple(index)


def shard_shape(spec: WeightSpec, rank: int, world: int) -> tuple[int, ...]:
    """The shape of the rank's part of the weight."""
    parts = shard(spec, rank, world)
    rows, *rest = ([index.stop - index.start for index in dim] for dim in zip(*parts, strict=True))
    return (sum(rows), *(sizes[0] for sizes in rest))


def even_range(size: int, rank: int, world: int) -> slice:
    """The rank's part of ``size`` indices that are no heads: ``ceil(blocks / world)`` blocks, or what is left."""
    block = next((block for block in _BLOCKS if size % block == 0 and size // block >= world), 1)
    part = -(-size // (block * world)) * block
    return slice(min(rank * part, size), min((rank + 1) * part, size))


def weight_specs(config: ModelConfig) -> Iterator[WeightSpec]:
    """All weights, in the order the forward pass uses them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield WeightSpec("embedding", (Source("model.embed_tokens.weight", (vocab, hidden)),), "column")
    for i in range(config.num_layers):
        yield from _layer_specs(config, i)
    yield from _norm_specs(config, "norm", "model.norm")
    if not config.tied_embeddings:
        yield lm_head_spec(config)


def lm_head_spec(config: ModelConfig) -> WeightSpec:
    """The output projection, where it is a weight of its own."""
    return WeightSpec("lm_head", (Source("lm_head.weight", (config.vocab_size, config.hidden_size)),), "column")


def _layer_specs(config: ModelConfig, i: int) -> Iterator[WeightSpec]:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads, config.num_kv_heads
    q, kv = heads * config.head_dim, kv_heads * config.head_dim
    pairs = config.layers[i].rope.dim if config.interleaved_rope else 0
    prefix = f"model.layers.{i}."

    def linear(name: str, outputs: list[_Output], inputs: int, cut: Shard, bias: bool) -> Iterator[WeightSpec]:
        rows = {module: sum(out.size for out in outputs if out.module == module) for module, *_ in outputs}

        def sources(kind: str, *rest: int) -> Iterator[Source]:
            start = dict.fromkeys(rows, 0)
            for module, size, units, interleaved in outputs:
                name = f"{prefix}{module}.{kind}"
                yield Source(name, (size, *rest), units, start[module], rows[module], interleaved)
                start[module] += size

        yield WeightSpec(f"layers.{i}.{name}", tuple(sources("weight", inputs)), cut)
        if bias:
            yield WeightSpec(f"layers.{i}.{name}_bias", tuple(sources("bias")), "rank0" if cut == "row" else cut)

    def vector(name: str, tensor: str, size: int, heads: int = 0) -> WeightSpec:
        """``heads``: the vector has a part for each, and is cut with them."""
        source = Source(prefix + tensor, (size,), heads)
        return WeightSpec(f"layers.{i}.{name}", (source,), "column" if heads else "replicated", norm=True)

    sizes = ((q, heads, pairs), (kv, kv_heads, pairs), (kv, kv_heads, 0))
    qkv = [_Output(f"self_attn.{name}", *size) for name, size in zip(config.qkv, sizes, strict=True)]
    for name, module in config.norms.items():
        yield from _norm_specs(config, f"layers.{i}.{name}", prefix + module)
    yield from linear("qkv", qkv, hidden, "column", config.qkv_bias)
    if config.qk_norm == "head":
        yield vector("q_norm", "self_attn.q_norm.weight", config.head_dim)
        yield vector("k_norm", "self_attn.k_norm.weight", config.head_dim)
    elif config.qk_norm == "all":
        yield vector("q_norm", "self_attn.q_norm.weight", q, heads)
        yield vector("k_norm", "self_attn.k_norm.weight", kv, kv_heads)
    yield from linear("o", [_Output("self_attn.o_proj", hidden, heads)], q, "row", config.o_bias)
    *up, down = (f"mlp.{module}" for module in config.mlp)
    fused = "gate_up" if config.gated_mlp else "up"
    yield from linear(fused, [_Output(module, inner) for module in up], hidden, "column", config.mlp_bias)
    if config.activation == "xielu":
        yield vector("alpha_p", "mlp.act_fn.alpha_p", 1)
        yield vector("alpha_n", "mlp.act_fn.alpha_n", 1)
    yield from linear("down", [_Output(down, hidden)], inner, "row", config.mlp_bias)


def _norm_specs(config: ModelConfig, name: str, module: str) -> Iterator[WeightSpec]:
    """A norm of the residual stream."""
    for suffix, kind in (("", "weight"), ("_bias", "bias"))[: 1 + config.norm_bias]:
        source = Source(f"{module}.{kind}", (config.hidden_size,))
        yield WeightSpec(name + suffix, (source,), "replicated", norm=True)


class _Output(NamedTuple):
    """Outputs of a linear layer. Several of one module are rows of one tensor."""

    module: str
    size: int
    units: int = 0
    interleaved: int = 0
