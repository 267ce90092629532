"""Calibrated scales of keys and values in a checkpoint, for a KV cache in FP8."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LoadError
from .checkpoint import Checkpoint
from .config import ModelConfig
from .weights import rank_config


class KVScales(NamedTuple):
    """Of one layer: float32 ``[KV heads]`` each, on the CPU. A key is its stored value times its head's scale."""

    k: Tensor
    v: Tensor


def load_kv_scales(folder: Path, config: ModelConfig, *, rank: int = 0, world: int = 1) -> dict[int, KVScales]:
    """The scales of each layer that has them, for a rank's KV heads; empty for a checkpoint without.

    Spellings: llm-compressor's ``self_attn.k_scale``, of a layer or ``[heads, 1, 1]``, and ``k_proj.output_scale``;
    ModelOpt's ``k_proj.k_scale``; ``kv_scale`` for both. Raises `LoadError` naming a tensor of another shape or with
    scales that are not positive.
    """
    if config.quantization is None or not config.quantization.kv_scales:
        return {}
    heads = rank_config(config, world).num_kv_heads
    first = rank * config.num_kv_heads // world
    found = {}
    with Checkpoint(folder) as checkpoint:
        for i in range(config.num_layers):
            k, v = (_scale(checkpoint, config, i, which) for which in range(2))
            if k is not None and v is not None:
                found[i] = KVScales(k[first : first + heads], v[first : first + heads])
    return found


def _scale(checkpoint: Checkpoint, config: ModelConfig, layer: int, which: int) -> Tensor | None:
    """float32 ``[KV heads]`` of all ranks, of keys (0) or values (1)."""
    prefix, letter, module = f"model.layers.{layer}.self_attn.", "kv"[which], config.qkv[1 + which]
    for spelling in (f"{letter}_scale", f"{module}.{letter}_scale", f"{module}.output_scale", "kv_scale"):
        name = prefix + spelling
        if name not in checkpoint:
            continue
        scale = checkpoint.read(name, ()).float().flatten()
        if len(scale) not in (1, config.num_kv_heads):
            shape = list(checkpoint.shape(name))
            raise LoadError(f"tensor {name} has shape {shape}, expected one value or {config.num_kv_heads}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise LoadError(f"tensor {name} holds scales that are not positive numbers: the checkpoint is damaged")
        return scale.expand(config.num_kv_heads)
    return None
