"""The configuration of a model that transformers computes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....kernels.attention.base import LayerSpec
from ....kernels.linear import linear_bytes, packs
from ...errors import LoadError
from ...tokenizer.special_tokens import eos_token_id
from ..eos import EosSource, eos_ids
from ..folder import ADAPTER, MERGE, read_json
from ..quantization import Quantization, parse_quantization, parse_quantization_files
from .cuts import Cuts, cuts_of, rank_heads
from .library import TRACE, building, load_transformers
from .trace import refuse_layers, trace

_UNQUANTIZED = re.compile(r"(^|[._])(gate|router|lm_head)$")  # routers of experts, and the output layer


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """A parameter's place: bytes of memory follow from it."""

    module: str
    shape: tuple[int, ...]  # of a rank's part
    linear: bool  # the weight of an `nn.Linear`


@dataclass(frozen=True, slots=True)
class TransformersConfig:
    """What the engine has to know of a model that transformers computes. Sizes are numbers of elements."""

    architecture: str
    folder: Path
    trust_remote_code: bool
    layers: tuple[LayerSpec, ...]  # calls of attention, in order; without sinks
    sinks: tuple[str, ...]  # the parameter of each layer's sinks; "" for none
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the widest product of a layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    max_model_len: int
    dtype: str  # the checkpoint's: float32 | bfloat16 | float16
    eos_ids: tuple[int, ...]
    bos_id: int | None
    parameters: tuple[ParameterShape, ...]
    tied_embeddings: bool
    ranks: int  # over which the model is split
    rank_heads: tuple[int, int]  # attention and KV heads that each of them computes
    note: str | None  # what is worth knowing of how it is stored
    quantization: Quantization | None = None

    experts, long_rope = None, False  # those of `ModelConfig`
    sandwich_norms = True  # activations of an unknown model may exceed the range of float16

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def weight_bytes(
        self, dtype: torch.dtype, device: torch.device, *, int8: bool, fp8: bool, copied: bool = True
    ) -> int:
        """As `linear.weight_bytes`. ``fp8``: on a device that multiplies it."""
        total = 0
        for one in self.parameters:
            if one.linear and fp8 and self.quantizes(one.module):
                total += math.prod(one.shape) + 4 * one.shape[0]
            elif one.linear:
                total += linear_bytes(device, one.shape, dtype, int8=int8, copied=copied)
            else:
                total += math.prod(one.shape) * dtype.itemsize
        if self.tied_embeddings and (int8 or packs(device, dtype)):  # the output layer is packed, the embedding stays
            shape = self.vocab_size // self.ranks, self.hidden_size
            total += linear_bytes(device, shape, dtype, int8=int8, copied=copied)
        return total

    def quantizes(self, module: str) -> bool:
        """Whether the linear layer ``module`` is quantized to FP8 while it is loaded."""
        return self.quantization is not None and not _UNQUANTIZED.search(module)


def load_transformers_config(folder: Path, ranks: int = 1, *, trust_remote_code: bool = False) -> TransformersConfig:
    """Builds the model without weights and traces it, whole and as one of ``ranks``. Raises `LoadError`: one line with
    what is not supported."""
    transformers, raw = load_transformers(), read_json(folder / "config.json")
    where = str(folder / "config.json")
    if (folder / ADAPTER).is_file():
        raise LoadError(f"{folder} holds a LoRA adapter: {MERGE}")
    if parse_quantization(raw, where) is not None or parse_quantization_files(folder) is not None:
        raise LoadError(f"{where}: quantized checkpoints are not read with --model-impl transformers")
    model = build(folder, TRACE, torch.bfloat16, torch.device("meta"), trust_remote_code=trust_remote_code)
    name, config = type(model).__name__, model.config.get_text_config()
    declared = (raw.get("architectures") or [name])[0]
    if declared != name and not str(declared).endswith("Model"):  # that of a base model has the weights of ``name``
        raise LoadError(f"{where}: {declared} is not what transformers makes of its model_type: {name}")
    try:
        traced = trace(model)
    except LoadError as error:
        raise LoadError(
            f"{where}: {name} is not served with transformers {transformers.__version__}: {error}"
        ) from error
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    generation = folder / "generation_config.json"
    vocab_size, embedding = int(config.vocab_size), model.get_input_embeddings()
    head = model.get_output_embeddings()
    sources = [
        EosSource(str(generation), (read_json(generation) if generation.is_file() else {}).get("eos_token_id")),
        EosSource(where, config.eos_token_id),
        EosSource("the tokenizer", eos_token_id(folder)),
    ]
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    widest = _widest(config, linears, head)
    try:
        cuts = cuts_of(model, ranks)
        parameters = tuple(_parameters(model, linears, cuts, ranks))
        heads = rank_heads(model, traced, cuts, ranks)
    except LoadError as error:
        raise LoadError(f"--tensor-parallel-size {ranks}: {name} with transformers: {error}") from error
    notes = []
    if traced.value_dim < traced.head_dim:
        notes.append(f"values of {traced.value_dim} channels are stored in {traced.head_dim}")
    if ranks > 1 and heads[1] == traced.num_kv_heads:
        notes.append("every rank has all attention heads and their keys and values")
    return TransformersConfig(
        architecture=name,
        folder=folder,
        trust_remote_code=trust_remote_code,
        layers=traced.layers,
        sinks=traced.sinks,
        vocab_size=vocab_size,
        hidden_size=int(config.hidden_size),
        intermediate_size=widest,
        num_heads=traced.num_heads,
        num_kv_heads=traced.num_kv_heads,
        head_dim=traced.head_dim,
        value_dim=traced.value_dim,
        max_model_len=_max_model_len(config, where),
        dtype=_dtype(config),
        eos_ids=eos_ids(sources, vocab_size),
        bos_id=config.bos_token_id if isinstance(config.bos_token_id, int) else None,
        parameters=parameters,
        tied_embeddings=tied,
        ranks=ranks,
        rank_heads=heads,
        note="; ".join(notes) or None,
    )


def build(folder: Path, attention: str, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool) -> Any:
    """The model of ``folder``'s config.json, with weights that are not initialized. Raises `LoadError`."""
    transformers = load_transformers()
    try:
        with building(transformers):
            config = transformers.AutoConfig.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        return build_of(config, attention, dtype, device, trust_remote_code=trust_remote_code)
    except LoadError as error:
        raise LoadError(f"{folder / 'config.json'}: {error}") from error
    except Exception as error:  # of a config's own code, or values that it refuses
        problem = f"transformers cannot read it: {first_line(error)}"
        if not trust_remote_code and "custom code" in str(error):
            problem = "it needs the code in its folder, which runs with --trust-remote-code, with the server's rights"
        raise LoadError(f"{folder / 'config.json'}: {problem}") from error


def build_of(
    config: Any, attention: str, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> Any:
    """The model of transformers' ``config``, with weights that are not initialized. Raises `LoadError`."""
    transformers = load_transformers()
    from transformers.initialization import no_init_weights

    try:
        refuse_layers(config.get_text_config())
    except LoadError as error:
        name = (config.architectures or [config.model_type])[0]
        raise LoadError(f"{name} is not served with transformers {transformers.__version__}: {error}") from error
    _check_class(transformers, config)
    try:
        with building(transformers), device, no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
            )
            return freeze_rope(model.eval().requires_grad_(False))
    except Exception as error:  # whatever a config's values provoke in the model's own code
        raise LoadError(f"transformers cannot build the model: {first_line(error)}") from error


def _check_class(transformers: Any, config: Any) -> None:
    """Raises `LoadError` if transformers' class for ``config`` does not take attention functions. Code that comes with
    the model is not looked at."""
    if getattr(config, "auto_map", None):
        return
    known = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if known is None:
        raise LoadError(f"transformers has no causal language model of model_type {config.model_type!r}")
    if not known.is_backend_compatible():
        raise LoadError(f"{known.__name__} is not marked in transformers as compatible with other attention functions")


def first_line(error: Exception) -> str:
    """The first line that says something, for an error of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:240]


def _parameters(model: Any, linears: dict[str, nn.Linear], cuts: Cuts, ranks: int) -> Iterator[ParameterShape]:
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        linear = module in linears and name.endswith(".weight")
        yield ParameterShape(module, cuts.shape(name, tuple(parameter.shape), ranks), linear)


def _widest(config: Any, linears: dict[str, nn.Linear], head: Any) -> int:
    """An upper estimate, as the intermediate size of a gated MLP, of what a token's widest layer computes."""
    widest = max((linear.out_features for linear in linears.values() if linear is not head), default=config.hidden_size)
    experts = getattr(config, "num_experts_per_tok", None) or 0
    size = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 0) or 0
    size = max(size) if isinstance(size, list | tuple) else size
    return int(max(widest, experts * (size + 2 * config.hidden_size)))


def _max_model_len(config: Any, where: str) -> int:
    """Tokens of context. Rotary embeddings that change with the length keep what they are in the original context:
    otherwise the keys of a whole context would change as it grows, so that no prefix of it could be reused."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise LoadError(f"{where}: max_position_embeddings is missing, so the longest context is not known")
    for rope in rope_parameters(config):
        if str(rope.get("rope_type")) in _CHANGING:
            original = rope.get("original_max_position_embeddings")
            length = min(length, original if isinstance(original, int) else length)
    return length


_CHANGING = ("dynamic", "longrope")


def freeze_rope(model: Any) -> Any:
    """Keeps rotary embeddings those of the original context (`_max_model_len`), in place: choosing by the positions
    copies them to the host, which neither a trace nor a CUDA graph can do."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str) and kind in _CHANGING:
            module.rope_type = "default"
        elif isinstance(kind, dict):
            module.rope_type = {layer: "default" if one in _CHANGING else one for layer, one in kind.items()}
    return model


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Those of each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _dtype(config: Any) -> str:
    name = str(config.dtype or "float32").removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else "float32"
