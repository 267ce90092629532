"""The weights of a decoder: names, shapes, tensors in the checkpoint, and slices under tensor parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import torch

from ...kernels.quantize import BLOCK, MXFP4_BLOCK
from ..errors import LoadError
from .config import ModelConfig
from .experts import ExpertsConfig
from .hf.config import TransformersConfig

Config = TypeVar("Config", bound=ModelConfig | TransformersConfig)

# Where tensor parallelism cuts a weight: along its outputs (dimension 0), along its inputs (dimension 1), or nowhere.
# rank0: the bias of a weight that is cut along its inputs. Only rank 0 has it, so that the sum over ranks adds it once.
Shard = Literal["column", "row", "replicated", "rank0"]
_PLAIN = ("embedding", ".router", ".shared_gate")  # matrices that are never quantized
_BLOCKS = (128, 16)  # cuts are at multiples of the first that fits: quantized products need aligned sizes


# weight: in the model's dtype. norm: a norm or another small vector, in float32, with the family's offset added.
# fp8: in float8_e4m3fn. scale: the scales of such a weight, in float32. bytes: MXFP4 as it is stored, in uint8.
Kind = Literal["weight", "norm", "fp8", "scale", "bytes"]


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one tensor of the checkpoint: the whole tensor, or one part of a fused tensor (Phi 3's ``qkv_proj``)."""

    name: str  # as Hugging Face names it, without a layout's prefix
    shape: tuple[int, ...]  # of these rows
    units: int = 0  # parts of the sharded dimension that stay whole, such as heads; 0: every index is its own
    start: int = 0  # row of the tensor that is the first of these
    tensor_rows: int = 0  # rows of the whole tensor, if that is more than ``shape`` says
    interleaved: int = 0  # of each unit, leading rows of which even and odd ones are to be moved apart
    # For scales: how many rows and columns of the weight, whose shape ``shape`` is, share one of these values.
    block: tuple[int, int] = (1, 1)
    expert: tuple[int, int] | None = None  # (i, E): of a tensor with a first dimension of E experts, the i-th
    step: int = 1  # every ``step``-th row of the tensor, from ``start`` on
    transposed: bool = False  # the tensor is ``[inputs, outputs]``
    packed: int = 0  # the tensor's columns are two dimensions, the last one of so many


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight: its sources concatenated along dimension 0 (fused query-key-value, fused gate-up)."""

    name: str
    sources: tuple[Source, ...]
    shard: Shard
    kind: Kind = "weight"

    @property
    def shape(self) -> tuple[int, ...]:
        return shard_shape(self, 0, 1)


def rank_config(config: Config, world: int) -> Config:
    """The config of one of ``world`` ranks: as many heads as each computes. Where there are fewer KV heads than ranks,
    each is replicated. Raises `LoadError` if the heads cannot be divided."""
    if isinstance(config, TransformersConfig):
        heads, kv_heads = config.rank_heads
        return replace(config, num_heads=heads, num_kv_heads=kv_heads)
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
    indices = tuple(_source_shard(spec, source, rank, world) for source in spec.sources)
    return (
        tuple(_in_blocks(*pair) for pair in zip(spec.sources, indices, strict=True))
        if spec.kind == "scale"
        else indices
    )


def _in_blocks(source: Source, index: tuple[slice, ...]) -> tuple[slice, ...]:
    """The scales of a slice of a weight. Raises `LoadError` if the slice is cut inside a block."""
    blocks = []
    for part, size, block in zip(index, source.shape, source.block, strict=False):
        if part.start % block or (part.stop % block and part.stop != size):
            raise LoadError(f"{source.name}: a rank's part [{part.start}, {part.stop}) is not whole blocks of {block}")
        blocks.append(slice(part.start // block, -(-part.stop // block)))
    return tuple(blocks)


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


def stored_dtype(spec: WeightSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a weight of a model in ``dtype`` is stored in."""
    return {"weight": dtype, "fp8": torch.float8_e4m3fn, "bytes": torch.uint8}.get(spec.kind, torch.float32)


def is_linear(spec: WeightSpec) -> bool:
    """Whether it is the matrix of a linear layer or of experts, which may be quantized and packed."""
    return spec.kind in ("weight", "fp8") and len(spec.shape) == 2 and not spec.name.endswith(_PLAIN)


def weight_specs(config: ModelConfig) -> Iterator[WeightSpec]:
    """All weights, in the order the forward pass uses them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield WeightSpec("embedding", (Source("model.embed_tokens.weight", (vocab, hidden)),), "column")
    for i in range(config.num_layers):
        yield from _layer_specs(config, i)
    yield from _norm_specs(config, "norm", "model.norm")
    if not config.tied_embeddings:
        yield from lm_head_specs(config)
    if config.lm_head_bias:
        yield WeightSpec("lm_head_bias", (Source("lm_head.bias", (config.vocab_size,)),), "column")


def lm_head_specs(config: ModelConfig) -> Iterator[WeightSpec]:
    """The output projection, where it is a weight of its own."""
    sources = (Source("lm_head.weight", (config.vocab_size, config.hidden_size)),)
    yield from _linear_specs(config, "lm_head", sources, "column")


def _linear_specs(config: ModelConfig, name: str, sources: tuple[Source, ...], cut: Shard) -> Iterator[WeightSpec]:
    """The weight of a linear layer, and its scales if it is quantized in the checkpoint.

    Scalar scales of a fused weight's tensors become scales of their channels, which loses nothing. A fused weight's
    input has one static scale, the largest of its tensors': that is one row of several here.
    """
    quantization = config.quantization
    covered = {quantization is not None and quantization.covers(s.name.removesuffix(".weight")) for s in sources}
    if len(covered) > 1:
        names = ", ".join(source.name for source in sources)
        raise LoadError(f"{names} are one product here, and only some of them are quantized: this is not supported")
    if quantization is None or covered == {False}:
        yield WeightSpec(name, sources, cut)
        return
    if quantization.weights == "mxfp4":
        yield WeightSpec(name, tuple(_mxfp4(s, "_blocks", MXFP4_BLOCK // 2) for s in sources), cut, "bytes")
        yield WeightSpec(f"{name}_scale", tuple(_mxfp4(s, "_scales", 1) for s in sources), cut, "bytes")
        return
    yield WeightSpec(name, sources, cut, "fp8")
    if quantization.scale is None:
        return
    if quantization.weights == "block":
        _check_blocks(sources)

    def scale(source: Source) -> Source:
        block = (BLOCK, BLOCK) if quantization.weights == "block" else (1, source.shape[1])
        return replace(source, name=f"{source.name.removesuffix('weight')}{quantization.scale}", block=block)

    by_rows = quantization.weights != "block" and cut == "row"  # all ranks have all rows of the weight
    yield WeightSpec(f"{name}_scale", tuple(map(scale, sources)), "replicated" if by_rows else cut, "scale")
    if quantization.activations == "static":
        inputs = dict.fromkeys(source.name.removesuffix("weight") + "input_scale" for source in sources)
        yield WeightSpec(f"{name}_input_scale", tuple(Source(tensor, (1,)) for tensor in inputs), "replicated", "scale")


def _mxfp4(source: Source, suffix: str, columns: int) -> Source:
    """The values or the scales of a weight in MXFP4: ``columns`` bytes for each block of inputs."""
    outputs, inputs = source.shape
    if inputs % MXFP4_BLOCK:
        raise LoadError(f"{source.name}: MXFP4 has blocks of {MXFP4_BLOCK} inputs, and there are {inputs}")
    packed = columns if columns > 1 else 0
    shape = (outputs, inputs // MXFP4_BLOCK * columns)
    return replace(source, name=source.name + suffix, shape=shape, transposed=False, packed=packed)


def _check_blocks(sources: tuple[Source, ...]) -> None:
    """Raises `LoadError` if the blocks of a fused weight's tensors do not make up blocks of the weight."""
    for source in sources:
        last = source is sources[-1]
        if source.interleaved or source.start % BLOCK or (source.shape[0] % BLOCK and not last):
            raise LoadError(f"{source.name}: scales of {BLOCK} × {BLOCK} blocks do not fit its {source.shape[0]} rows")


def _layer_specs(config: ModelConfig, i: int) -> Iterator[WeightSpec]:
    hidden = config.hidden_size
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

        yield from _linear_specs(config, f"layers.{i}.{name}", tuple(sources("weight", inputs)), cut)
        if bias:
            yield WeightSpec(f"layers.{i}.{name}_bias", tuple(sources("bias")), "rank0" if cut == "row" else cut)

    def vector(name: str, tensor: str, size: int, heads: int = 0) -> WeightSpec:
        """``heads``: the vector has a part for each, and is cut with them."""
        source = Source(prefix + tensor, (size,), heads)
        return WeightSpec(f"layers.{i}.{name}", (source,), "column" if heads else "replicated", kind="norm")

    sizes = ((q, heads, pairs), (kv, kv_heads, pairs), (kv, kv_heads, 0))
    qkv = [_Output(f"self_attn.{name}", *size) for name, size in zip(config.qkv, sizes, strict=True)]
    for name, module in config.norms.items():
        yield from _norm_specs(config, f"layers.{i}.{name}", prefix + module)
    yield from linear("qkv", qkv, hidden, "column", config.qkv_bias)
    for which, module, count in zip(("q_norm", "k_norm"), config.qk_norm_modules, (heads, kv_heads), strict=True):
        tensor = f"self_attn.{module}.weight"
        if config.qk_norm == "all":
            yield vector(which, tensor, count * config.head_dim, count)
        elif config.qk_norm == "head_layer" and "{}" not in tensor:
            source = Source(prefix + tensor, (count, config.head_dim))
            yield WeightSpec(f"layers.{i}.{which}", (source,), "replicated", kind="norm")
        elif config.qk_norm == "head_layer":
            norms = tuple(Source(prefix + tensor.format(head), (config.head_dim,)) for head in range(count))
            yield WeightSpec(f"layers.{i}.{which}", norms, "replicated", kind="norm")
        elif config.qk_norm != "none":
            yield vector(which, tensor, config.head_dim)
    if config.sinks:
        yield vector("sinks", "self_attn.sinks", heads, heads)
    yield from linear("o", [_Output("self_attn.o_proj", hidden, heads)], q, "row", config.o_bias)
    prefixes, modules, inner = "", _mlp_modules(config.mlp), config.intermediate_size
    if config.layers[i].sparse:
        assert config.experts is not None
        yield from _expert_specs(config, config.experts, i)
        prefixes, modules, inner = "shared.", config.experts.family.shared, config.experts.shared_size
        if not inner:
            return
    *up, down = modules
    fused = "gate_up" if config.gated_mlp else "up"
    yield from linear(prefixes + fused, [_Output(module, inner) for module in up], hidden, "column", config.mlp_bias)
    if config.activation == "xielu":
        yield vector("alpha_p", "mlp.act_fn.alpha_p", 1)
        yield vector("alpha_n", "mlp.act_fn.alpha_n", 1)
    yield from linear(prefixes + "down", [_Output(down, hidden)], inner, "row", config.mlp_bias)


def _mlp_modules(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(module if "." in module else f"mlp.{module}" for module in modules)


def _expert_specs(config: ModelConfig, experts: ExpertsConfig, i: int) -> Iterator[WeightSpec]:
    """Router and routed experts. ``experts.gate_up``: gate and up of expert 0, of expert 1, …, one below the other."""
    hidden, inner, family = config.hidden_size, experts.size, experts.family
    name, prefix = f"layers.{i}", f"model.layers.{i}."
    yield WeightSpec(f"{name}.router", (Source(prefix + family.router, (experts.count, hidden)),), "replicated")
    if family.router_bias:
        yield WeightSpec(
            f"{name}.router_logit_bias", (Source(prefix + family.router_bias, (experts.count,)),), "replicated"
        )
    if family.bias:
        source = Source(prefix + family.bias, (*family.bias_shape, experts.count))
        yield WeightSpec(f"{name}.router_bias", (source,), "replicated", kind="norm")
    if family.shared_gate and experts.shared_size:
        source = Source(f"{prefix}{family.shared_gate}.weight", (1, hidden))
        yield WeightSpec(f"{name}.shared_gate", (source,), "replicated")
    # Each rank has whole blocks of MXFP4.
    units = inner // MXFP4_BLOCK if config.quantization is not None and config.quantization.weights == "mxfp4" else 0

    def sources(tensors: tuple[str, ...], shape: tuple[int, ...]) -> tuple[Source, ...]:
        """``shape``: of one expert's rows in one of ``tensors``."""
        count = len(tensors)
        fused, step = count > len(set(tensors)), count if family.alternating else 1
        return tuple(
            Source(
                (prefix + tensor).format(expert),
                shape,
                units=units,
                start=(k if family.alternating else k * shape[0]) if fused else 0,
                tensor_rows=count * shape[0] if fused else 0,
                expert=None if "{}" in tensor else (expert, experts.count),
                step=step,
                transposed=family.transposed and len(shape) == 2,
            )
            for expert in range(experts.count)
            for k, tensor in enumerate(tensors)
        )

    gate, up, down = family.experts
    gate_up_bias, down_bias = family.biases or ("", "")
    parts: tuple[tuple[str, tuple[str, ...], tuple[int, int], str, Shard], ...] = (
        ("gate_up", (gate, up), (inner, hidden), gate_up_bias, "column"),
        ("down", (down,), (hidden, inner), down_bias, "row"),
    )
    for part, tensors, shape, bias, cut in parts:
        yield from _linear_specs(config, f"{name}.experts.{part}", sources(tensors, shape), cut)
        if bias:
            of_rows = sources((bias,) * len(tensors), shape[:1])
            yield WeightSpec(f"{name}.experts.{part}_bias", of_rows, "rank0" if cut == "row" else cut)


def _norm_specs(config: ModelConfig, name: str, module: str) -> Iterator[WeightSpec]:
    """A norm of the residual stream."""
    if not config.norm_weight:
        return
    for suffix, kind in (("", "weight"), ("_bias", "bias"))[: 1 + config.norm_bias]:
        source = Source(f"{module}.{kind}", (config.hidden_size,))
        yield WeightSpec(name + suffix, (source,), "replicated", kind="norm")


class _Output(NamedTuple):
    """Outputs of a linear layer. Several of one module are rows of one tensor."""

    module: str
    size: int
    units: int = 0
    interleaved: int = 0
