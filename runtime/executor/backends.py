"""Which kernels serve a device: the choice behind ``--attention-backend``."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Literal, cast

import torch
from torch import Tensor

from ...kernels import ops as torch_ops
from ...kernels.attention.base import AttentionBackend, LayerSpec
from ...kernels.attention.torch_backend import TorchAttention
from ...kernels.base import Ops
from ..config import EngineConfig
from ..errors import LoadError
from .graphs import CHUNK_TOKENS, CHUNKS, DECODES
from .inputs import PageTable

logger = logging.getLogger(__name__)


def pick_ops(device: torch.device) -> Ops:
    """Triton's on a GPU that has it, torch's otherwise."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from ...kernels import triton_ops

        return cast(Ops, triton_ops)
    return cast(Ops, torch_ops)


def make_attention(
    config: EngineConfig, pool: Tensor, layers: list[LayerSpec], num_heads: int, table: PageTable, max_tokens: int
) -> AttentionBackend:
    """The backend that ``config.attention_backend`` names; ``auto``: FlashInfer, then Triton, then torch.

    ``max_tokens``: the most query tokens of a step, padding included.

    Raises `LoadError` where a named one cannot run here, with the reason.
    """
    choice, max_requests = config.attention_backend, len(table.host) - 1
    if choice == "auto":
        choice = "torch" if pool.device.type == "cpu" else _fastest(pool)
    if choice == "torch":
        return TorchAttention(pool, layers, num_heads)
    if choice == "triton":
        if find_spec("triton") is None:
            raise LoadError("--attention-backend triton: Triton is not installed: pip install 'branchwise[gpu]'")
        if pool.device.type != "cuda":
            raise LoadError(f"--attention-backend triton runs on CUDA devices, not on {pool.device}")
        from ...kernels.attention.triton_backend import TritonAttention

        return TritonAttention(pool, layers, num_heads, max_requests, max_tokens)
    from ...kernels.attention.flashinfer_backend import FlashInferAttention
    from ...kernels.attention.flashinfer_module import Unavailable, check_available

    try:
        check_available(pool.device, pool.dtype, pool.shape[-1])
    except Unavailable as error:
        raise LoadError(f"--attention-backend flashinfer: {error}") from error
    captured = min(max_requests, DECODES[-1]), CHUNK_TOKENS[-1], CHUNKS
    return FlashInferAttention(pool, layers, num_heads, table.device, pick_ops(pool.device), max_requests, captured)


def _fastest(pool: Tensor) -> Literal["flashinfer", "triton", "torch"]:
    from ...kernels.attention.flashinfer_module import Unavailable, check_available

    try:
        check_available(pool.device, pool.dtype, pool.shape[-1])
        return "flashinfer"
    except Unavailable as error:
        logger.warning("attention does not run on FlashInfer: %s", error)
        return "torch" if find_spec("triton") is None else "triton"
