"""Attention over a part of the keys, and the merging of parts (online softmax; Milakov & Gimelshein, 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCORES_BYTES = 64 * 1024 * 1024  # of scores in memory at once, where they are written out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """softmax(q·k) v over these keys alone, and the log-sum-exp that merges the result with other keys'.

    Args:
        q: ``[B, H, Q, D]``; k, v: ``[B, H, L, D]``. Any strides but for the last dimension.
        mask: added to the scores, 0 or -inf, in ``q``'s dtype, broadcast to ``[B, H, Q, L]``. Each query sees a key.
            A key that no query sees may hold anything: the end of a page may hold a previous request's NaN.
        causal: query i sees keys 0 … i (Q = L).

    Returns:
        ``[B, H, Q, D]`` in ``q``'s dtype, and the log of the softmax's denominator, float32 ``[B, H, Q]``.
    """
    out, lse = _attend(q, k, v, scale, softcap, mask, causal)
    if mask is not None and math.isnan(out.sum().item()):  # 0 times NaN is NaN
        hidden = mask.isneginf().all(dim=2)[..., None]
        out, lse = _attend(q, k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0), scale, softcap, mask, causal)
        if mask.shape[2] > 1 and math.isnan(out.sum().item()):  # of a key that some queries see
            alone = [attend(q[:, :, i : i + 1], k, v, scale, softcap, mask[:, :, i : i + 1]) for i in range(q.shape[2])]
            return torch.cat([part for part, _ in alone], dim=2), torch.cat([part for _, part in alone], dim=2)
    return out, lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu" and softcap is None:
        # The CPU kernel behind scaled_dot_product_attention, called directly because it also returns the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    return attend_reference(q, k, v, scale, softcap, mask, causal)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """`attend` written out: the specification, and the path for soft-caps, which no library kernel supports."""
    heads = q.shape[0] * q.shape[1]
    block = max(1, SCORES_BYTES // (4 * heads * k.shape[2]))
    outs, lses = [], []
    for start in range(0, q.shape[2], block):
        part = q[:, :, start : start + block]
        last = start + part.shape[2] if causal else k.shape[2]
        scores = torch.matmul(part, k[:, :, :last].transpose(-1, -2)).float().mul_(scale)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores.add_(mask if mask.shape[2] == 1 else mask[:, :, start : start + block])
        if causal:
            hidden = torch.ones(part.shape[2], last, dtype=torch.bool, device=q.device).triu_(start + 1)
            scores.masked_fill_(hidden, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        probs = scores.sub_(lse[..., None]).exp_()
        outs.append(torch.matmul(probs.to(v.dtype), v[:, :, :last]))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def merge_(out: Tensor, lse: Tensor, queries: slice | Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merges attention over further keys into ``out`` and ``lse`` in place.

    ``out``: float32 ``[T, H, D]``; ``lse``: float32 ``[T, H]``; ``other`` ``[N, H, D]`` and ``other_lse`` ``[N, H]``
    belong to the N query tokens ``queries``.
    """
    mine, theirs = out[queries], lse[queries]
    total = torch.logaddexp(theirs, other_lse)
    merged = mine * (theirs - total).exp_()[..., None]
    merged.addcmul_(other, (other_lse - total).exp_()[..., None])
    out[queries], lse[queries] = merged, total
