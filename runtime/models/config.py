"""A model's configuration, read from a Hugging Face folder's ``config.json`` as transformers 4 or 5 writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LoadError
from ..tokenizer.special_tokens import eos_token_id
from .architecture import Architecture, Norms, QKNorm, Switch
from .checkpoint import checkpoint_dtype
from .eos import EosSource, eos_ids
from .experts import ExpertsConfig, parse_experts, sparse_layers
from .fields import Fields
from .folder import read_json
from .quantization import Quantization, parse_quantization, parse_quantization_files
from .registry import ALIASES, ARCHITECTURES, MODEL_TYPES
from .rope import RopeConfig, parse_rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
    "xielu": "xielu",
}
_GATED, _UNGATED = ("silu", "gelu", "gelu_tanh"), ("relu2", "xielu", "gelu", "gelu_tanh")


class UnsupportedArchitecture(LoadError):
    """A model that our decoder does not have; transformers may."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Settings that may differ between the layers of one model."""

    window: int | None  # a token sees the last ``window`` tokens, itself included; None: all of them
    rope: RopeConfig
    sparse: bool = False  # its MLP is a mixture of experts


@dataclass(frozen=True, slots=True)
class QueryScaling:
    """Queries grow with the logarithm of their position (Llama 4, Ministral 3)."""

    beta: float
    length: int  # positions below it are not scaled

    def __call__(self, positions: Tensor) -> Tensor:
        """float32 ``[T]`` of int64 ``[T]``."""
        return 1 + self.beta * torch.log1p((positions // self.length).float())


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder of any family. Sizes are numbers of elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    max_position_embeddings: int
    norm_kind: Literal["rms", "layer"]
    norm_bias: bool
    norm_weight: bool
    norm_eps: float
    norm_offset: float  # added to every norm weight: 1 for Gemma
    activation: str  # silu | gelu | gelu_tanh | relu2 | xielu
    mlp: tuple[str, ...]  # modules: gate, up, down; or up, down
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    embed_scale: float
    residual_scale: float  # multiplies what attention and MLP add to the residual stream
    logits_scale: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    norms: Norms  # of each layer
    qk_norm: QKNorm
    qk_norm_modules: tuple[str, str]
    qkv: tuple[str, str, str]  # modules; of one name: rows of one tensor
    parallel: bool  # attention and MLP get the same input and are added together
    interleaved_rope: bool  # in the checkpoint; the loader reorders the channels
    tied_embeddings: bool
    dtype: str  # the checkpoint's: float32 | bfloat16 | float16; from `parse_config` also auto, the tensors' own
    eos_ids: tuple[int, ...]  # tokens that end an output
    bos_id: int | None
    quantization: Quantization | None = None  # of the linear layers' weights
    experts: ExpertsConfig | None = None  # of the sparse layers
    lm_head_bias: bool = False
    sinks: bool = False  # see `LayerSpec.sinks`
    clip_qkv: float | None = None  # the largest magnitude of queries, keys and values before their rotation
    query_scaling: QueryScaling | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def gated_mlp(self) -> bool:
        return len(self.mlp) == 3

    @property
    def sandwich_norms(self) -> bool:
        """Whether attention and MLP have a norm before and one after."""
        return len(self.norms) == 4

    @property
    def max_model_len(self) -> int:
        """Tokens of context that the model supports: with YaRN's factor, and with LongRoPE's factors (`for_length`)."""
        short = [rope.original_length for rope in self.ropes if rope.kind == "longrope" and not rope.long]
        if short:
            return min(self.max_position_embeddings, *short)
        stretched = [int(rope.original_length * rope.factor) for rope in self.ropes if rope.kind == "yarn"]
        return max([self.max_position_embeddings, *stretched])

    @property
    def long_rope(self) -> bool:
        """Whether LongRoPE's long factors are used."""
        return any(rope.long for rope in self.ropes)

    def for_length(self, length: int | None) -> ModelConfig:
        """The model for contexts of up to ``length`` tokens; None: of its default length.

        LongRoPE has long factors for contexts beyond its original length. Where longer contexts are served, all have
        them, also short ones, as in vLLM: a prefix's keys then do not depend on the length of what follows it.
        transformers changes factors, and with them all keys, as a context grows.
        """
        if length is None or length <= self.max_model_len or all(rope.kind != "longrope" for rope in self.ropes):
            return self
        layers = [replace(layer, rope=replace(layer.rope, long=layer.rope.kind == "longrope")) for layer in self.layers]
        return replace(self, layers=tuple(layers))

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The distinct rotary embeddings of its layers, in order of first use."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))


def load_config(folder: Path) -> ModelConfig:
    """Reads ``config.json`` and its companions: ``generation_config.json``, the tokenizer's end token, and the
    checkpoint's dtype where config.json names none. Raises `LoadError` in one line."""
    if not folder.is_dir():
        raise LoadError(f"{folder} is not a folder: give a model folder or a hub id such as Qwen/Qwen3-0.6B")
    path = folder / "config.json"
    if not path.is_file():
        raise LoadError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    raw = read_json(path)
    generation = folder / "generation_config.json"
    quantization = parse_quantization_files(folder)
    config = parse_config(
        raw,
        read_json(generation) if generation.is_file() else {},
        str(path),
        tokenizer_eos=eos_token_id(folder),
    )
    dtype = config.dtype if config.dtype != "auto" else checkpoint_dtype(folder) or "float32"
    return replace(config, dtype=dtype, quantization=config.quantization or quantization)


def parse_config(
    raw: Mapping[str, Any],
    generation: Mapping[str, Any],
    where: str = "config.json",
    *,
    tokenizer_eos: int | None = None,
) -> ModelConfig:
    """The parsed ``raw`` config.json and generation_config.json. Raises `LoadError` that names the file and the key."""
    name = _architecture(raw, where)
    known = ARCHITECTURES[name]
    text = raw.get("text_config") if known.text_config else None
    if text is not None and not isinstance(text, dict):
        raise LoadError(f"{where}: text_config must be an object, got {type(text).__name__}")
    quantization = parse_quantization(raw, where)
    # The nested settings win; what they leave out may stand outside (torch_dtype, tie_word_embeddings).
    fields = Fields({**known.defaults, **_drop_none(raw), **_drop_none(text or {})}, where)

    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    kv_heads = fields.count("num_key_value_heads", heads)
    head_dim = fields.count("head_dim", hidden // heads)
    if heads % kv_heads:
        raise LoadError(f"{where}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
    if head_dim % 2:
        raise LoadError(f"{where}: head_dim must be even, got {head_dim}")
    activation = fields.get("hidden_activation") if known.gemma else fields.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise LoadError(f"{where}: activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    if _ACTIVATIONS[activation] not in (_GATED if len(known.mlp) == 3 else _UNGATED):
        raise LoadError(f"{where}: activation {activation!r} is not supported for {name}")
    if fields.get("is_causal", True) is False or fields.get("use_bidirectional_attention") is True:
        raise LoadError(f"{where}: its attention is not causal: an embedding model cannot generate text")
    vocab_size = fields.count("vocab_size")
    if known.experts is None and fields.get("num_local_experts"):
        raise UnsupportedArchitecture(f"{where}: {name} with a mixture of experts is not supported natively")
    experts = None if known.experts is None else parse_experts(fields, known.experts)
    if quantization is not None and quantization.weights == "mxfp4" and experts is None:
        raise LoadError(f"{where}: MXFP4 is supported for experts alone, and {name} has none")
    parallel = _switch(known.parallel, fields)
    scale = fields.number("query_pre_attn_scalar", head_dim) ** -0.5 if known.gemma else head_dim**-0.5

    return ModelConfig(
        architecture=name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=fields.count(known.mlp_size),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=_layers(fields, known, head_dim, sparse=experts is not None),
        max_position_embeddings=_longest(fields, known),
        norm_kind=known.norm_kind,
        norm_bias=known.norm_bias,
        norm_weight=known.norm_weight,
        norm_eps=fields.number(known.norm_eps, 1e-6),
        norm_offset=1.0 if known.gemma else 0.0,
        activation=_ACTIVATIONS[activation],
        mlp=known.mlp,
        attention_scale=fields.number("attention_multiplier", scale),
        attention_softcap=fields.optional_number("attn_logit_softcapping") if known.gemma else None,
        final_softcap=fields.optional_number("final_logit_softcapping") if known.gemma else None,
        embed_scale=fields.number("embedding_multiplier", hidden**0.5 if known.gemma else 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logits_scale=fields.number("logit_scale", 1.0) / fields.number("logits_scaling", 1.0),
        qkv_bias=_switch(known.qkv_bias, fields),
        o_bias=_switch(known.o_bias, fields),
        mlp_bias=_switch(known.mlp_bias, fields),
        norms={name: module for name, module in known.norms.items() if name != "mlp_norm" or not parallel},
        qk_norm=known.qk_norm if _switch(known.qk_norm_if, fields) else "none",
        qk_norm_modules=known.qk_norm_modules,
        qkv=known.qkv,
        parallel=parallel,
        interleaved_rope=known.interleaved_rope,
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        dtype=_dtype(fields),
        eos_ids=_eos_ids(raw, text or {}, generation, known, where, tokenizer_eos, vocab_size),
        bos_id=_bos(fields),
        quantization=quantization,
        experts=experts,
        query_scaling=_query_scaling(fields),
        lm_head_bias=_switch(known.lm_head_bias, fields),
        sinks=known.sinks,
        clip_qkv=fields.optional_number("clip_qkv"),
    )


def _longest(fields: Fields, known: Architecture) -> int:
    """Tokens of context. Qwen2.5-1M's dual chunk attention equals plain attention within its first chunk alone."""
    length = fields.count(known.length, fields.count("max_position_embeddings"))
    dual = fields.get("dual_chunk_attention_config")
    if not isinstance(dual, dict):
        return length
    nested = Fields(dual, f"{fields.where}: dual_chunk_attention_config")
    return min(length, nested.count("chunk_size") - nested.count("local_size"))


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    """The first of ``architectures``, or the family's causal model where that is absent or names its base model."""
    names = raw.get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    name = ALIASES.get(name or "", name)
    if name in ARCHITECTURES:
        return name
    model_type = raw.get("model_type")
    if (name is None or name.endswith("Model")) and isinstance(model_type, str) and model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    if name is None:
        raise LoadError(f"{where}: no architectures: it is not a causal language model's config")
    raise UnsupportedArchitecture(f"{where}: {name} is not supported natively (branchwise models lists what is)")


def _layers(fields: Fields, known: Architecture, head_dim: int, *, sparse: bool) -> tuple[LayerConfig, ...]:
    count = fields.count("num_hidden_layers")
    types = fields.get("layer_types")
    if types is None:
        types = _default_types(fields, known, count)
    if isinstance(types, list):
        types = ["full_attention" if kind == "attention" else kind for kind in types]  # Granite 4
        others = sorted({str(kind) for kind in types} & {"mamba", "linear_attention"})
        if others:
            raise UnsupportedArchitecture(f"{fields.where}: layers of {', '.join(others)} are not supported natively")
    if not isinstance(types, list) or len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
        raise LoadError(f"{fields.where}: layer_types must name sliding_attention or full_attention for {count} layers")
    slides = known.windows != "none" and fields.get("sliding_window") is not None
    slides = slides and bool(fields.get("use_sliding_window", not known.windows.startswith("qwen")))
    window = fields.count("sliding_window") if slides else None
    if known.windows == "all":  # Mistral: every layer slides whatever layer_types may say
        types = ["sliding_attention"] * count
    values = fields.values
    if known.scaled_rope == "full" and values.get("rope_local_base_freq") is None:
        values = {**values, "rope_local_base_freq": values.get("rope_theta")}
    ropes = {kind: parse_rope(values, kind, head_dim, fields.where) for kind in dict.fromkeys(types)}
    plain = RopeConfig(theta=1.0, dim=head_dim, kind="none")
    rotated = _rotated(fields, known, types, window)
    experts = sparse_layers(fields, count) if sparse else [False] * count
    return tuple(
        LayerConfig(window if kind == "sliding_attention" else None, ropes[kind] if rotates else plain, has_experts)
        for kind, rotates, has_experts in zip(types, rotated, experts, strict=True)
    )


def _rotated(fields: Fields, known: Architecture, types: list[str], window: int | None) -> list[bool]:
    """Which layers have a rotary embedding."""
    if known.unrotated == "full" and window is not None:
        return [kind == "sliding_attention" for kind in types]
    if known.unrotated == "unless_rope":
        return [fields.get("position_embedding_type") == "rope"] * len(types)
    if known.unrotated != "listed":
        return [True] * len(types)
    listed = fields.get("no_rope_layers")  # 1 for layers with a rotary embedding
    if listed is None:
        interval = fields.count("no_rope_layer_interval")
        return [bool((i + 1) % interval) for i in range(len(types))]
    if not isinstance(listed, list) or len(listed) != len(types) or set(listed) - {0, 1}:
        raise LoadError(f"{fields.where}: no_rope_layers must hold 0 or 1 for each of {len(types)} layers")
    return [bool(rotates) for rotates in listed]


def _default_types(fields: Fields, known: Architecture, count: int) -> list[str]:
    if known.windows == "alternate":
        pattern = fields.count("sliding_window_pattern")
        sliding = [bool((i + 1) % pattern) for i in range(count)]
    elif known.windows == "qwen_even":
        sliding = [i % 2 == 0 and i < fields.count("max_window_layers") for i in range(count)]
    elif known.windows == "qwen":
        sliding = [i >= fields.count("max_window_layers") for i in range(count)]
    else:
        sliding = [known.windows == "all"] * count
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _query_scaling(fields: Fields) -> QueryScaling | None:
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict) or not rope.get("llama_4_scaling_beta"):
        return None
    nested = Fields(rope, f"{fields.where}: rope_parameters")
    return QueryScaling(nested.number("llama_4_scaling_beta"), nested.count("original_max_position_embeddings"))


def _switch(rule: Switch, fields: Fields) -> bool:
    return rule == "always" or (rule != "never" and bool(fields.get(rule, False)))


def _dtype(fields: Fields) -> str:
    name = str(fields.get("dtype", fields.get("torch_dtype", "auto"))).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16", "auto"):
        raise LoadError(f"{fields.where}: dtype {name} is not supported; supported: float32, bfloat16, float16")
    return name


def _eos_ids(
    raw: Mapping[str, Any],
    text: Mapping[str, Any],
    generation: Mapping[str, Any],
    known: Architecture,
    where: str,
    tokenizer_eos: int | None,
    vocab_size: int,
) -> tuple[int, ...]:
    sources = [
        EosSource(str(Path(where).with_name("generation_config.json")), generation.get("eos_token_id")),
        EosSource(where, raw.get("eos_token_id")),
        EosSource(where, text.get("eos_token_id")),
        EosSource("the tokenizer", tokenizer_eos),
    ]
    if all(source.value is None for source in sources):
        sources.append(EosSource("the family's default", known.defaults.get("eos_token_id")))
    return eos_ids(sources, vocab_size)


def _bos(fields: Fields) -> int | None:
    value = fields.get("bos_token_id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise LoadError(f"{fields.where}: bos_token_id must be an integer, got {value!r}")
    return value


def _drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Null means the family's default, except where null has a meaning of its own."""
    meaningful = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
    return {key: value for key, value in values.items() if value is not None or key in meaningful}
