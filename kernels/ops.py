"""The elementwise operations of a decoder in torch: the specification of the faster kernels.

T is tokens of a step, H hidden size, D head size. Inputs are on one device; no value is read back to the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .addends import Addends, summed
from .kv_format import hadamard
from .kv_pool import KVLayer
from .quantize import QuantizedRows, Quantizer, constant, dequantize_weight, quantize

# gelu_tanh: the approximation by tanh. swigluoai: GPT-OSS's, see `gate_mul`.
Activation = Literal["silu", "gelu", "gelu_tanh", "swigluoai"]
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
COPY_BYTES = 64 * 1024 * 1024  # most bytes in flight while pages are copied


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose experts.

    Args:
        top_k: experts of a token.
        scores: of the logits; sparsemixer: see `route`.
        normalize: divide the weights of a token's experts by their sum.
        scale: multiplies the weights of a token's experts.
        groups: of as many experts each; only experts of the best ``top_groups`` are chosen.
        jitter: of sparsemixer: experts whose logits are further below the best one are left out of its softmax.
    """

    top_k: int
    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    jitter: float = 0.0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang & Sennrich, 2019) over the last dimension, in float32, back in ``x``'s dtype.

    ``weight`` is float32 and includes any offset (Gemma's 1 + w): ``[D]``, or ``[heads, D]`` for x ``[T, heads, D]``.
    """
    x32 = x.float()
    # Not F.rms_norm, which on a CPU is ten operations, one of which writes the squares out. Nor arithmetic with Python
    # numbers, each of which is made a tensor first and costs as much as another operation.
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    scale = torch.addcmul(constant(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x32 * scale).mul_(weight).to(x.dtype)


def add_rms_norm(x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds ``x`` into ``residual`` in place and returns the norm of the sum. Both ``[T, H]``."""
    residual.add_(summed(x))
    return rms_norm(residual, weight, eps)


def add_rms_norm_quantized(
    x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float, quantizer: Quantizer
) -> QuantizedRows:
    """`add_rms_norm`, then `quantize`."""
    return quantize(add_rms_norm(x, residual, weight, eps), quantizer)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) in the half-split layout of Hugging Face checkpoints.

    ``x``: ``[T, heads, D]``; ``cos`` and ``sin``: float32 ``[T, R / 2]``. The first R of D channels are rotated.
    """
    half = cos.shape[-1]
    # view and unbind: unflatten and indexing cost as much as the arithmetic of a small step.
    rotated = x[..., : 2 * half].float().view(*x.shape[:-1], 2, half)
    out, (first, second), sin = rotated * cos[:, None, None], rotated.unbind(-2), sin[:, None]
    out_first, out_second = out.unbind(-2)
    out_first.addcmul_(second, sin, value=-1)
    out_second.addcmul_(first, sin)
    out = out.flatten(-2)
    if 2 * half < x.shape[-1]:
        out = torch.cat([out, x[..., 2 * half :].float()], -1)
    return out.to(x.dtype)


def gate_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """SwiGLU and GeGLU (Shazeer, 2020): ``[T, 2 * I]`` with the gate first, to ``activation(gate) * up`` ``[T, I]``.

    swigluoai clamps both: ``gate * sigmoid(1.702 * gate) * (up + 1)``, with the gate at most 7 and up within -7 … 7.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "swigluoai":
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return torch.sigmoid(gate * SWIGLU_ALPHA).mul_(gate).mul_(up + 1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)


def gate_mul_quantized(gate_up: Tensor, activation: Activation, quantizer: Quantizer) -> QuantizedRows:
    """`gate_mul`, then `quantize`."""
    return quantize(gate_mul(gate_up, activation), quantizer)


def fp8_linear(x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias`` of FP8 values, summed in float32: ``[T, K]`` to ``[T, N]`` in ``dtype``.

    Args:
        x: with a scale for each token, or for each 128 channels if the weight's scales are of blocks.
        weight: float8_e4m3fn ``[N, K]``.
        scale: float32 ``[N, 1]``, or of blocks of 128 × 128 ``[ceil(N / 128), ceil(K / 128)]``.
        bias: ``[N]`` or None.
    """
    values = x.values.float().unflatten(-1, (x.scales.shape[1], -1)) * x.scales[:, :, None]
    out = F.linear(values.flatten(-2), dequantize_weight(weight, scale, torch.float32))
    return (out if bias is None else out + bias).to(dtype)


def rope_write(
    qkv: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    kv: KVLayer,
    slots: Tensor,
    qk_norm: Tensor | None = None,
    eps: float = 0.0,
    norm_rotated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms (if asked) and rotates queries and keys, and writes the keys and values of T tokens to the KV pool.

    Where the pool stores rotated keys (`KVFormat.rotates_keys`), queries and keys are also multiplied by a Hadamard
    matrix.

    Args:
        qkv: ``[T, heads + 2 * kv_heads, D]``: queries, keys, values. May be overwritten.
        cos, sin: as for `rope`.
        kv: one layer of the pool.
        slots: int64 ``[T]``, page * page_size + offset. Distinct, except that tokens which only pad the step may share
            a slot of the scratch page.
        qk_norm: float32 ``[heads + kv_heads, D]`` or None.
        norm_rotated: norm what the rotary embedding gives, not what it takes.

    Returns:
        queries ``[T, heads, D]``, keys and values ``[T, kv_heads, D]``.
    """
    kv_heads = (qkv.shape[1] - heads) // 2
    qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if qk_norm is not None and not norm_rotated:
        qk = rms_norm(qk, qk_norm, eps)
    qk = rope(qk, cos, sin)
    if qk_norm is not None and norm_rotated:
        qk = rms_norm(qk, qk_norm, eps)
    q, k = (hadamard(qk) if kv.k_format.rotates_keys else qk).split_with_sizes([heads, kv_heads], 1)
    kv.write(slots, k, v)
    return q, k, v


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts of each token.

    Args:
        logits: ``[T, E]``.
        bias: float32 ``[E]``, added to the scores for the choice alone (Wang et al., 2024), or None.
        routing: how to choose.

    Returns:
        The experts' weights, float32 ``[T, k]``, and their numbers, int32 ``[T, k]``, best first.
    """
    logits = logits.float()
    if routing.scores == "sparsemixer":
        return _sparsemixer(logits, routing)
    scores = logits.sigmoid() if routing.scores == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    ids = _of_best_groups(choice, routing).topk(routing.top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scale, ids.int()


def _of_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    """DeepSeek V3's limit: a group's score is the sum of its two best experts'."""
    if routing.groups == 1:
        return choice
    groups = choice.unflatten(1, (routing.groups, -1))
    best = groups.topk(2, dim=-1).values.sum(-1).topk(routing.top_groups, dim=-1).indices
    left_out = torch.ones(groups.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, False)
    return groups.masked_fill(left_out[:, :, None], -torch.inf).flatten(1)


def _sparsemixer(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """SparseMixer (Liu et al., 2024): experts one after the other, each weighted by a softmax over those that are left
    and within ``2 * jitter`` of the best one, relative to the larger of the two magnitudes."""
    left, weights, ids = logits, [], []
    for _ in range(routing.top_k):
        best, chosen = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * routing.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, chosen))
        left = left.scatter(1, chosen, -torch.inf)
        ids.append(chosen)
    return torch.cat(weights, 1), torch.cat(ids, 1).int()


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Adds each head's sink to the denominators of softmaxes, in place: ``out *= sigmoid(lse - sink)``.

    Args:
        out: ``[T, heads, D]``. Tokens may be strided.
        lse: float32 ``[T, heads]``, the logarithms to base 2 of the denominators without sinks.
        sinks: float32 ``[heads]``, to base e.
    """
    out.mul_(torch.sigmoid(lse * math.log(2.0) - sinks)[..., None])


def copy_pages(pages: Tensor, copies: Tensor) -> None:
    """Copies pages in every layer: copy-on-write of a page whose first tokens are reused.

    Every source is read before a destination is written, so a page may be the source of one pair and the destination of
    another.

    Args:
        pages: uint8 ``[rows, P, bytes]``, as `KVPool.fragments`.
        copies: int64 ``[C, 2]`` of (source, destination).
    """
    sources, destinations = copies.unbind(1)
    rows = max(1, COPY_BYTES // max(pages.shape[2] * len(copies), 1))
    for some in pages.split(rows):
        some.index_copy_(1, destinations, some.index_select(1, sources))


def page_indices(table: Tensor, rows: Tensor, indptr: Tensor, max_pages: int, out: Tensor) -> None:
    """Lays the first pages of several rows of the page table end to end.

    ``out[indptr[r] : indptr[r + 1]] = table[rows[r], : indptr[r + 1] - indptr[r]]``. All int32: ``table``
    ``[max_rows, columns]``, ``rows`` ``[R]``, ``indptr`` ``[R + 1]``; ``max_pages`` bounds the pages of one row.
    """
    counts = (indptr[1:] - indptr[:-1])[:, None]
    columns = torch.arange(max_pages, dtype=torch.int32, device=table.device)
    pages = table[rows.long(), :max_pages][columns < counts]
    out[: len(pages)] = pages
