"""Weights for a model of transformers: read by transformers, with its conversions of names, and checked here."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from ...errors import LoadError
from ..unread import warn_of_unread
from .config import TransformersConfig, build, first_line, freeze_rope
from .library import SERVE, building, load_transformers

logger = logging.getLogger(__name__)


def load_model(config: TransformersConfig, dtype: torch.dtype) -> Any:
    """The model with its checkpoint's weights, on the CPU.

    Raises `LoadError` for files that are missing or corrupt, for tensors that are missing or of another shape, which
    transformers would make up, and for values that are not finite.
    """
    transformers = load_transformers()
    if config.trust_remote_code:
        logger.warning("--trust-remote-code: Python files of %s may run with all rights of this process", config.folder)
    try:
        with building(transformers):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                config.folder,
                dtype=dtype,
                attn_implementation=SERVE,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # of safetensors, of conversions, of the model's own code
        raise LoadError(f"{config.folder}: transformers cannot load the weights: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        named = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise LoadError(f"{config.folder}: the checkpoint has no {named}: it is incomplete, or of another architecture")
    if info["mismatched_keys"]:
        raise LoadError(
            f"{config.folder}: tensors are of other shapes than config.json says: {info['mismatched_keys']}"
        )
    warn_of_unread(sorted(info["unexpected_keys"]), ())
    for name, parameter in model.named_parameters():
        if not math.isfinite(parameter.detach().sum(dtype=torch.float32).item()):
            raise LoadError(
                f"tensor {name} holds NaN or infinity in {dtype}: the checkpoint is damaged, or needs bfloat16"
            )
    return freeze_rope(model.requires_grad_(False))


def dummy_model(config: TransformersConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """The model with random weights of its shape, on ``device``: the same for the same seed."""
    model = build(config.folder, SERVE, dtype, device, trust_remote_code=config.trust_remote_code)
    generator, bound = torch.Generator(device).manual_seed(seed), 0.02 * 3**0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.tie_weights()
    return model
