"""Which weights of a checkpoint are quantized and how: FP8 as four tools write it, and GPT-OSS's MXFP4. Everything else
is refused by name, because other formats read as plain weights would give garbage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..errors import LoadError
from .folder import read_json

# ``quantization_config`` (transformers), ``compression_config`` (compressed-tensors), ``quantization`` (MLX), …
_KEY = re.compile(r"quant|compression_config|load_in_[48]bit")
_MODELOPT = "hf_quant_config.json"
_FILES = ("quantize_config.json", "quant_config.json")  # AutoGPTQ, AutoAWQ: written beside config.json
# ``q_proj.weight_scale``, ``k_scale``, ``w.scales``, ``weight_scale_inv``, ``weight_scale_2``, ``qweight``, ``absmax``.
_TENSOR = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_[0-9]+|scb|q?zeros|zero_points?|qweight|weight_packed|g_idx|absmax|quant_map"
    r"|quant_state|biases)($|\.)",
    re.IGNORECASE,
)
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
FP8_DTYPE = "F8_E4M3"
# Scales of keys and values, which `loader.load_kv_scales` reads; of queries and probabilities, which nothing needs.
KV_SCALE = re.compile(r"\.self_attn\.((([qkv]_proj)\.)?(q|k|v|kv|prob)_scale|[kv]_proj\.output_scale)$")
_INSTEAD = "use the model's unquantized or FP8 checkpoint, with --quantization fp8 or int8 for less memory"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of linear layers are stored in FP8 (e4m3), or those of experts in MXFP4.

    Args:
        weights: what shares a scale in FP8: a tensor, an output channel, or a block of 128 × 128. mxfp4: 32 inputs do.
        activations: static: calibrated, one for all tokens; token: computed for each; group: for 128 channels of each.
        scale: name of the scale's tensor beside ``weight``; of MXFP4, its suffix. None: the checkpoint's weights are
            plain floats, and are quantized while they are loaded.
        ignored: patterns of the modules that are not quantized.
        targets: patterns of the modules that are.
        kv_scales: whether the checkpoint has scales for keys and values in FP8 (`loader.load_kv_scales`).
    """

    weights: Literal["tensor", "channel", "block", "mxfp4"]
    activations: Literal["static", "token", "group", "none"]
    scale: Literal["weight_scale", "weight_scale_inv", "_scales"] | None
    ignored: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("Linear",)
    kv_scales: bool = False

    def covers(self, module: str) -> bool:
        """Whether the weight of ``module``, such as ``model.layers.0.mlp.up_proj``, is quantized."""
        return _matcher(self.targets)(module) and not _matcher(self.ignored)(module)


ONLINE_FP8 = Quantization("channel", "token", None, ignored=("lm_head",))


def parse_quantization(raw: Mapping[str, Any], where: str) -> Quantization | None:
    """The quantization that a config.json declares, None if it declares none. Raises `LoadError` for one that is not
    supported, naming the key or the method."""
    text = raw.get("text_config")
    declared = {
        key: value
        for values in (raw, text if isinstance(text, dict) else {})
        for key, value in values.items()
        if _KEY.search(key) and value
    }
    if not declared:
        return None
    key = next(iter(declared))
    if set(declared) == {"quantization_config"} and isinstance(declared[key], dict):
        return _parse(declared[key], f"{where}: {key}")
    raise LoadError(f"{where}: quantized checkpoints are not supported ({key}); {_INSTEAD}")


def parse_quantization_files(folder: Path) -> Quantization | None:
    """As `parse_quantization`, from the files that tools write beside config.json."""
    for name in _FILES:
        if (folder / name).is_file():
            raise LoadError(f"{folder / name}: quantized checkpoints are not supported; {_INSTEAD}")
    path = folder / _MODELOPT
    if not path.is_file():
        return None
    config = read_json(path).get("quantization")
    if not isinstance(config, dict):
        raise LoadError(f"{path}: quantization is missing")
    return _modelopt(config, str(path))


def _parse(config: Mapping[str, Any], where: str) -> Quantization:
    method = config.get("quant_method")
    parsers = {"compressed-tensors": _compressed_tensors, "fp8": _fp8, "modelopt": _modelopt, "mxfp4": _mxfp4}
    if not isinstance(method, str) or method not in parsers:
        _refuse(where, f"quant_method {method!r}")
    return parsers[method](config, where)


def _compressed_tensors(config: Mapping[str, Any], where: str) -> Quantization:
    """llm-compressor's FP8, FP8_DYNAMIC and FP8_BLOCK; also checkpoints with scales of keys and values alone."""
    for key in ("sparsity_config", "transform_config"):
        if (found := _table(config, key, where)) and found.get("format") != "dense":
            _refuse(where, key)
    kv_scales = _kv_scales(_table(config, "kv_cache_scheme", where), where)
    groups = _table(config, "config_groups", where)
    if not groups and kv_scales:
        return Quantization("tensor", "static", "weight_scale", targets=(), kv_scales=True)
    if config.get("format") not in ("float-quantized", "naive-quantized"):
        _refuse(where, f"format {config.get('format')!r}")
    if len(groups) != 1:
        _refuse(where, f"{len(groups)} config_groups")
    group = _table(groups, next(iter(groups)), where)
    weights, inputs = (_fp8_arguments(group, key, where) for key in ("weights", "input_activations"))
    if group.get("output_activations"):
        _refuse(where, "output_activations")
    strategy, rows = weights.get("strategy"), inputs.get("strategy")
    if strategy not in ("tensor", "channel", "block"):
        _refuse(where, f"weights of strategy {strategy!r}")
    if strategy == "block" and weights.get("block_structure") not in ([128, 128], "128x128"):
        _refuse(where, f"block_structure {weights.get('block_structure')}")
    kind = "dynamic" if inputs.get("dynamic") else "static"
    activations = _ACTIVATIONS.get((rows, kind))
    if (
        activations is None
        or (strategy == "block") != (activations == "group")
        or (inputs.get("group_size") or 128) != 128
    ):
        _refuse(where, f"{strategy} weights and {kind} {rows} input_activations")
    ignored, targets = _patterns(config, "ignore", where), _patterns(group, "targets", where)
    return Quantization(strategy, activations, "weight_scale", ignored, targets, kv_scales)


_ACTIVATIONS: dict[tuple[Any, str], Literal["static", "token", "group"]] = {
    ("tensor", "static"): "static",
    ("token", "dynamic"): "token",
    ("group", "dynamic"): "group",
}


def _fp8_arguments(group: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    arguments = _table(group, key, where)
    bits, kind = arguments.get("num_bits"), arguments.get("type")
    if (bits, kind) != (8, "float") or arguments.get("symmetric") is False:
        _refuse(where, f"{key} of type {kind!r} with {bits} bits")
    return arguments


def _fp8(config: Mapping[str, Any], where: str) -> Quantization:
    """Blocks as DeepSeek and Qwen write them; without blocks, as AutoFP8 does. Neither quantizes lm_head."""
    if (config.get("fmt") or "e4m3") not in ("e4m3", "float8_e4m3fn"):
        _refuse(where, f"fmt {config.get('fmt')!r}")
    scheme, block = config.get("activation_scheme"), config.get("weight_block_size")
    if scheme not in ("dynamic", "static"):
        _refuse(where, f"activation_scheme {scheme!r}")
    if block is not None and (block != [128, 128] or scheme != "dynamic"):
        _refuse(where, f"weight_block_size {block} and activation_scheme {scheme!r}")
    ignored = (
        "lm_head",
        *_patterns(config, "modules_to_not_convert", where),
        *_patterns(config, "ignored_layers", where),
    )
    if block is not None:
        return Quantization("block", "group", "weight_scale_inv", ignored)
    kv_scales = _kv_scales(_table(config, "kv_cache_scheme", where), where)
    return Quantization(
        "tensor", "static" if scheme == "static" else "token", "weight_scale", ignored, kv_scales=kv_scales
    )


def _mxfp4(config: Mapping[str, Any], where: str) -> Quantization:
    """GPT-OSS: experts alone, as they were trained."""
    ignored = _patterns(config, "modules_to_not_convert", where)
    return Quantization("mxfp4", "none", "_scales", ignored, targets=("re:.*\\.mlp\\.experts\\.",))


def _modelopt(config: Mapping[str, Any], where: str) -> Quantization:
    """NVIDIA ModelOpt's FP8: one static scale for each tensor."""
    if config.get("quant_algo") != "FP8":
        _refuse(where, f"quant_algo {config.get('quant_algo')!r}")
    algorithm = config.get("kv_cache_quant_algo")
    if algorithm not in (None, "FP8"):
        _refuse(where, f"kv_cache_quant_algo {algorithm!r}")
    kv_scales = algorithm == "FP8" or _kv_scales(_table(config, "kv_cache_scheme", where), where)
    ignored = (*_patterns(config, "exclude_modules", where), *_patterns(config, "ignore", where))
    return Quantization("tensor", "static", "weight_scale", ignored, kv_scales=kv_scales)


def _kv_scales(scheme: Mapping[str, Any], where: str) -> bool:
    if scheme and (scheme.get("num_bits"), scheme.get("type"), bool(scheme.get("dynamic"))) != (8, "float", False):
        _refuse(where, f"kv_cache_scheme {dict(scheme)}")
    return bool(scheme)


def _table(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise LoadError(f"{where}: {key} must be an object, got {type(found).__name__}")
    return found


def _patterns(config: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of module names, wildcards or ``re:`` expressions."""
    found = config.get(key) or []
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise LoadError(f"{where}: {key} must be a list of module names")
    for item in found:
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                raise LoadError(f"{where}: {key}: {item} is not a regular expression ({error})") from error
    return tuple(found)


def _refuse(where: str, what: str) -> NoReturn:
    raise LoadError(f"{where}: quantized checkpoints with {what} are not supported; {_INSTEAD}")


@lru_cache(maxsize=16)
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether any of the patterns names a module, a module around it, or its class.

    ``re:`` begins an expression that the name must begin with; ``*`` and ``?`` are wildcards; otherwise a name matches
    at its beginning or its end, whole components only (``mlp.gate`` is not ``mlp.gate_proj``).
    """
    names, expressions = set(), []
    for pattern in patterns:
        for prefix in ("language_model.model.", "model.language_model."):  # multimodal checkpoints
            if pattern.startswith(prefix):
                pattern = "model." + pattern.removeprefix(prefix)
        if pattern.startswith("re:"):
            expressions.append(re.compile(pattern[3:]))
        elif any(wildcard in pattern for wildcard in "*?["):
            expressions.append(re.compile(translate(pattern)))
        else:
            names.add(pattern)

    def matches(module: str) -> bool:
        parts = module.split(".")
        return (
            "Linear" in names
            or any(".".join(parts[:i]) in names or ".".join(parts[i:]) in names for i in range(1, len(parts)))
            or module in names
            or any(expression.match(module) for expression in expressions)
        )

    return matches


def refuse_quantized_tensors(dtypes: Iterable[tuple[str, str]], read: Mapping[str, str], kv_scales: bool) -> None:
    """Raises `LoadError` for a weight of another dtype than its config says, and for a scale that nothing reads.

    Args:
        dtypes: (name, safetensors' dtype) of every tensor.
        read: the names that are loaded, and the dtype that each has because it is quantized; "" for plain floats.
        kv_scales: whether scales of keys and values are expected.
    """
    for name, dtype in dtypes:
        quantized = read.get(name)
        if quantized and dtype != quantized:
            raise LoadError(f"tensor {name} is {dtype}, config.json says that it is quantized to {quantized}")
        if quantized == "" and dtype not in _PLAIN_DTYPES:
            raise LoadError(f"tensor {name} is {dtype}: config.json does not say how it is quantized; {_INSTEAD}")
        expected = kv_scales and KV_SCALE.search(name)
        if quantized is None and not expected and (_TENSOR.search(name) or dtype.startswith("F8")):
            raise LoadError(f"tensor {name} ({dtype}) belongs to a quantized checkpoint: not supported; {_INSTEAD}")
