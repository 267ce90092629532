"""Refuses quantized checkpoints, whichever file declares it: read as plain weights, their values would give garbage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import LoadError

# ``quantization_config`` (transformers), ``compression_config`` (compressed-tensors), ``quantization`` (MLX), …
_KEY = re.compile(r"quant|compression_config|load_in_[48]bit")
# ModelOpt, AutoGPTQ, AutoAWQ: written beside config.json.
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# ``q_proj.weight_scale``, ``k_scale``, ``w.scales``, ``weight_scale_inv``, ``weight_scale_2``, ``qweight``, ``absmax``.
_TENSOR = re.compile(
    r"(^|[._])(scales?|scale_inv|scale_[0-9]+|scb|q?zeros|zero_points?|qweight|weight_packed|g_idx|absmax|quant_map"
    r"|quant_state|biases)($|\.)",
    re.IGNORECASE,
)
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")


def refuse_quantized_config(raw: Mapping[str, Any], where: str) -> None:
    """Raises `LoadError` naming the key of a config.json, or of its text_config, that declares quantization."""
    for values in (raw, raw.get("text_config")):
        for key, value in values.items() if isinstance(values, dict) else ():
            if _KEY.search(key) and value:
                raise LoadError(f"{where}: quantized checkpoints are not supported ({key})")


def refuse_quantized_folder(folder: Path) -> None:
    """Raises `LoadError` naming a file that quantization tools write."""
    for name in _FILES:
        if (folder / name).is_file():
            raise LoadError(f"{folder / name}: quantized checkpoints are not supported")


def refuse_quantized_tensors(dtypes: Iterable[tuple[str, str]], read: set[str]) -> None:
    """Raises `LoadError` for a weight whose dtype is not a plain float, or a scale that belongs to a quantized weight.

    ``dtypes``: (name, safetensors' dtype) of every tensor. ``read``: the names that are loaded.
    """
    for name, dtype in dtypes:
        if name in read and dtype not in _PLAIN_DTYPES:
            raise LoadError(f"tensor {name} is {dtype}: quantized checkpoints are not supported")
        if name not in read and (_TENSOR.search(name) or dtype.startswith("F8")):
            raise LoadError(f"tensor {name} ({dtype}) belongs to a quantized checkpoint: these are not supported")
