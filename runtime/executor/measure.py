"""How much GPU memory a step takes, measured by running the largest one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...kernels.attention.base import AttentionBatch, StepShape
from ...kernels.kv_pool import KVLayout, KVPool
from ..models.decoder import StepTokens
from ..models.implementation import AnyConfig, AnyDecoder
from ..sampling_params import SamplingParams
from ..step import RowStart
from .backends import pick_sampling
from .sampler import Sampler


class _NoAttention:
    """Stands in for attention: its result is as large as the queries."""

    captures = False
    joint = False
    saved_keys = 0

    def forms(self, shape: StepShape) -> list[StepShape]:
        return []

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> None: ...

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        return q.contiguous()


def measure_activations(
    decoder: AnyDecoder,
    model: AnyConfig,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    rows: int,
    max_model_len: int,
) -> int:
    """Peak bytes of a step of ``tokens`` query tokens in which ``rows`` requests (at most one a token) sample with the
    most expensive parameters. Includes the penalties' token history of every row; not what stays allocated, such as the
    decoder's rotary tables.
    """
    rows = min(rows, tokens)
    layout = KVLayout(model.num_layers, 1, model.num_kv_heads, model.head_dim, dtype)
    pool = KVPool.allocate(layout, 1, device)
    params = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=20)
    zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
    torch.cuda.synchronize(device)
    # What stays allocated must not lie in the memory that loading has freed, which could then not be returned.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    decoder.reserve(max_model_len)
    with torch.inference_mode():
        sampler = Sampler(rows, model.vocab_size, device, kernels=pick_sampling(device))
        for row in range(rows):
            sampler.start(RowStart(row, params, row, np.zeros(1, np.int32), 1))
        hidden = decoder.forward(
            StepTokens(zeros, zeros, zeros), pool, _NoAttention(), zeros[:rows], decoder.few_layers
        )
        sampler.sample(decoder.logits(hidden), np.arange(rows, dtype=np.int32), np.ones(rows, np.int64))
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del hidden, pool, sampler, zeros
    torch.cuda.empty_cache()
    return peak - torch.cuda.memory_allocated(device)


def taken_beside(device: torch.device, free_before: int, weights: int, activations: int) -> int:
    """Bytes of ``device`` that are taken beside the weights, since ``free_before`` were free: by libraries, by buffers
    between ranks, and by what torch has freed and cannot return, but for what the largest step will use of it."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(free_before - free - weights - min(unused, activations), 0)
