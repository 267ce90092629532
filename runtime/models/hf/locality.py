"""A check of each model that transformers computes: what a step computes of earlier tokens, it reads from our pages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ....kernels.attention.base import AttentionBatch
from ....kernels.attention.torch_backend import TorchAttention
from ....kernels.kv_pool import KVLayout, KVPool
from ...errors import LoadError
from ..decoder import StepTokens
from .config import first_line
from .decoder import TransformersDecoder

_TOKENS, _PAGE = 12, 16
_LARGEST = 0.1  # mean difference, relative to the mean magnitude: rounding in bfloat16 makes some 0.01


def check_locality(decoder: TransformersDecoder, device: torch.device) -> None:
    """Runs a prompt as one step, and again as two. Raises `LoadError` if the last hidden states differ: then a token
    depends on earlier ones by something else than attention, such as a convolution or a recurrent state."""
    config = decoder.config
    dtype = next(iter(decoder.parameters())).dtype
    layout = KVLayout(config.num_layers, _PAGE, config.num_kv_heads, config.head_dim, dtype)
    pool = KVPool.allocate(layout, 1, device)
    attention = TorchAttention(pool, decoder.layer_specs(), config.num_heads)
    ids = torch.arange(2, 2 + _TOKENS, device=device) * 37 % config.vocab_size
    table = np.zeros((1, 1), np.int32)

    def step(start: int, stop: int) -> Tensor:
        lengths = np.array([stop - start], np.int32), np.array([stop], np.int32)
        attention.plan(AttentionBatch(np.zeros(1, np.int32), *lengths, 0, _PAGE, torch.from_numpy(table), table))
        positions = torch.arange(start, stop, device=device)
        return decoder.forward(StepTokens(ids[start:stop], positions, positions), pool, attention)

    try:
        with torch.inference_mode():
            whole = step(0, _TOKENS)[-1].float()
            step(0, _TOKENS // 2)
            parts = step(_TOKENS // 2, _TOKENS)[-1].float()
            decoder.logits(parts[None].to(dtype))
    except Exception as error:  # of the model's own code
        raise LoadError(
            f"{config.architecture} is not served with transformers: its forward pass fails: {first_line(error)}"
        ) from error
    if not bool((whole - parts).abs().mean() <= _LARGEST * whole.abs().mean()):
        raise LoadError(
            f"{config.architecture} is not served with transformers: a token's result depends on how its prompt is cut "
            "into steps, so its layers keep a state that is not keys and values"
        )
