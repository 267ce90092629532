"""The small operations of a decoder, in torch: the specification that faster kernels are measured against.

T is tokens of a step, H hidden size, D head size. Inputs are on one device; no value is read back to the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich, 2019) over the last dimension, in float32, back in ``x``'s dtype.

    ``weight`` is float32 and holds any offset (Gemma's 1 + w): ``[D]``, or ``[heads, D]`` for x ``[T, heads, D]``.
    """
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return normed.mul_(weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds ``x`` into ``residual`` in place and returns the norm of the sum. Both ``[T, H]``."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) in the half-split layout of Hugging Face checkpoints.

    ``x``: ``[T, heads, D]``; ``cos`` and ``sin``: float32 ``[T, R / 2]``. The first R of D channels turn.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    torch.mul(x1, cos, out=out[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out[..., half : 2 * half]).addcmul_(x1, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out.to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU (Shazeer, 2020): ``[T, 2 * I]`` with the gate first, to ``[T, I]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    """GeGLU: as `silu_mul`, with GELU (``approximate``: ``tanh`` or ``none``)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate).mul_(up)


def write_kv(pool: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes one layer's keys and values of T tokens.

    ``pool``: ``[2, pages, page_size, kv_heads, D]``; ``slots``: int64 ``[T]``, page * page_size + offset, all distinct;
    ``k``, ``v``: ``[T, kv_heads, D]``.
    """
    flat = pool.flatten(1, 2)
    flat[0].index_copy_(0, slots, k)
    flat[1].index_copy_(0, slots, v)


def copy_pages(pool: Tensor, copies: Tensor) -> None:
    """Copies whole pages in every layer: copy-on-write of a page whose first tokens are reused.

    ``pool``: ``[layers, 2, pages, ...]``; ``copies``: int64 ``[C, 2]`` of (source, destination). Each layer gathers ALL
    its sources before it writes a destination, so a page may be the source of one pair and the destination of another.
    """
    sources, destinations = copies.unbind(1)
    for layer in pool:
        layer.index_copy_(1, destinations, layer.index_select(1, sources))
