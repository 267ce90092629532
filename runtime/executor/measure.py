"""What is run once at start: the largest step, which says how much GPU memory one takes, and steps of other sizes."""

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
from .graphs import JOINT_TOKENS, LOGIT_ROWS
from .sampler import Sampler

_SIZES = 24  # of steps that are run to load their kernels


class _NoAttention:
    """Stands in for attention: its result is as large as the queries."""

    captures = False
    joint = 0
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
    most expensive parameters. Includes the penalties' token history of every row and the decoder's rotary tables.
    """
    rows = min(rows, tokens)
    layout = KVLayout(model.num_layers, 1, model.num_kv_heads, model.head_dim, dtype)
    pool = KVPool.allocate(layout, 1, device)
    params = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=20)
    zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
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
    peak = torch.cuda.max_memory_allocated(device) - before
    del hidden, pool, sampler, zeros
    torch.cuda.empty_cache()
    return peak


def load_kernels(
    decoder: AnyDecoder, model: AnyConfig, dtype: torch.dtype, device: torch.device, tokens: int, rows: int
) -> None:
    """Runs the first layers for numbers of tokens between those of captured steps and ``tokens``, and the output layer
    and sampling for numbers of samples up to ``rows``.

    cuBLAS chooses among a dozen kernels for a product by its number of rows, and CUDA loads a kernel when it is first
    launched. That takes 4 ms and waits for the device, so that during load it holds the host up for the rest of a step.
    """
    rows = min(rows, tokens)
    layout = KVLayout(model.num_layers, 1, model.num_kv_heads, model.head_dim, dtype)
    pool = KVPool.allocate(layout, 1, device)
    zeros = torch.zeros(tokens, dtype=torch.int64, device=device)
    decoder.reserve(1)
    with torch.inference_mode():
        for size in np.geomspace(min(JOINT_TOKENS[-1] + 1, tokens), tokens, _SIZES).astype(int).tolist():
            ids = zeros[:size]
            step = StepTokens(ids, ids, ids)
            hidden = decoder.forward(step, pool, _NoAttention(), zeros[:rows], decoder.few_layers)
        for params in (SamplingParams(temperature=0.0), SamplingParams()):
            sampler = Sampler(rows, model.vocab_size, device, kernels=pick_sampling(device))
            for row in range(rows):
                sampler.start(RowStart(row, params, row, np.zeros(1, np.int32), 1))
            for count in range(min(LOGIT_ROWS, rows), rows + 1, LOGIT_ROWS):
                sampled = np.arange(count, dtype=np.int32), np.ones(count, np.int64)
                sampler.sample(decoder.logits(hidden[:count]), *sampled)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
