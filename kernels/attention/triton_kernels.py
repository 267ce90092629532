"""Attention over paged keys and values in Triton: FlashAttention-2 (Dao, 2023) over the pieces that `split` cuts.

The query heads that share a key head are rows of one tile, so a key is read once for all of them. Softmax is in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_launch import kernel
from .split import (
    FIRST,
    ITEM_FIELDS,
    MERGE_COUNT,
    MERGE_FIELDS,
    MERGE_FIRST,
    MERGE_SLOT,
    MERGE_TOKENS,
    POSITION,
    ROW,
    SLOT,
    START,
    STOP,
    TOKENS,
)

_LOG2_E = tl.constexpr(1.4426950408889634)
_ROW, _FIRST, _TOKENS, _POSITION = tl.constexpr(ROW), tl.constexpr(FIRST), tl.constexpr(TOKENS), tl.constexpr(POSITION)
_START, _STOP, _SLOT, _ITEM_FIELDS = (
    tl.constexpr(START),
    tl.constexpr(STOP),
    tl.constexpr(SLOT),
    tl.constexpr(ITEM_FIELDS),
)
_MERGE_FIRST, _MERGE_TOKENS = tl.constexpr(MERGE_FIRST), tl.constexpr(MERGE_TOKENS)
_MERGE_SLOT, _MERGE_COUNT = tl.constexpr(MERGE_SLOT), tl.constexpr(MERGE_COUNT)
_MERGE_FIELDS = tl.constexpr(MERGE_FIELDS)


@triton.jit
def _attend_range(
    acc: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over keys ``start … stop - 1``; row i sees ``lowest[i] … highest[i]``. MASKED: not all of them."""
    FACTOR: tl.constexpr = (SOFTCAP if SOFTCAP > 0.0 else SCALE) * _LOG2_E
    channel = tl.arange(0, BLOCK_D)
    for at in range(start, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        if MASKED:
            page = tl.load(pages_ptr + key // PAGE_SIZE, key < stop, other=0)
        else:
            page = tl.load(pages_ptr + key // PAGE_SIZE)
        offset = (page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE) * TOKEN_STRIDE
        k_ptrs = k_ptr + offset[None, :] + channel[:, None]
        v_ptrs = v_ptr + offset[:, None] + channel[None, :]
        # Masked values are 0, not whatever the pool holds there: 0 * nan would spread.
        if MASKED:
            k = tl.load(k_ptrs, (key < stop)[None, :] & (channel < D)[:, None], other=0.0)
            v = tl.load(v_ptrs, (key < stop)[:, None] & (channel < D)[None, :], other=0.0)
        elif D < BLOCK_D:
            k = tl.load(k_ptrs, (channel < D)[:, None], other=0.0)
            v = tl.load(v_ptrs, (channel < D)[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(v_ptrs)
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        if SOFTCAP > 0.0:  # softcap * tanh(x), with exponentials; an infinite one makes tanh 1
            scores = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * SCALE / SOFTCAP * _LOG2_E)) + 1.0)
        if MASKED:
            visible = key[None, :] <= highest[:, None]
            if WINDOWED:
                visible &= key[None, :] >= lowest[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * FACTOR)
        safe = new_peak
        if MASKED:  # a row that has seen nothing yet
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * FACTOR - safe[:, None])
        alpha = tl.exp2(peak - safe)
        total = total * alpha + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * alpha[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@kernel()
def attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    items_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One item of `Pieces`, one key head. Items without tokens fill up a captured grid. SOFTCAP, WINDOW: 0 for none."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0)
    item = items_ptr + tl.program_id(1) * _ITEM_FIELDS
    tokens = tl.load(item + _TOKENS)
    if tokens == 0:
        return
    row, first, position = tl.load(item + _ROW), tl.load(item + _FIRST), tl.load(item + _POSITION)
    start, stop, slot = tl.load(item + _START), tl.load(item + _STOP), tl.load(item + _SLOT)

    token = tl.arange(0, BLOCK_M) // GROUP
    head = kv_head * GROUP + tl.arange(0, BLOCK_M) % GROUP
    channel = tl.arange(0, BLOCK_D)
    mask = (token < tokens)[:, None] & (channel < D)[None, :]
    at = (first + token).to(tl.int64)
    q = tl.load(q_ptr + (at * Q_STRIDE + head * D)[:, None] + channel[None, :], mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.minimum(position + token, stop - 1)
    lowest = position + token - (WINDOW - 1)
    k_head, v_head = k_ptr + kv_head * D, v_ptr + kv_head * D
    pages = table_ptr + row.to(tl.int64) * TABLE_STRIDE
    middle = start
    if WINDOW == 0:  # whole blocks that every row sees need no mask
        middle = start + tl.maximum(tl.minimum(position + 1, stop) - start, 0) // BLOCK_N * BLOCK_N
        acc, peak, total = _attend_range(
            acc, peak, total, q, k_head, v_head, pages, start, middle, lowest, highest,
            D, PAGE_SIZE, KV_HEADS * D, SCALE, SOFTCAP, False, False, PRECISION, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, peak, total = _attend_range(
        acc, peak, total, q, k_head, v_head, pages, middle, stop, lowest, highest,
        D, PAGE_SIZE, KV_HEADS * D, SCALE, SOFTCAP, WINDOW > 0, True, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    seen = total > 0.0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    if slot < 0:
        out_ptrs = out_ptr + (at * OUT_STRIDE + head * D)[:, None] + channel[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask)
    else:
        to = (slot + token).to(tl.int64) * HEADS + head
        tl.store(partial_ptr + (to * D)[:, None] + channel[None, :], acc, mask)
        lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + to, lse, token < tokens)


@kernel()
def merge(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    merges_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Puts the pieces of one query token and head together, in a fixed order."""
    head, nth = tl.program_id(0), tl.program_id(2)
    entry = merges_ptr + tl.program_id(1) * _MERGE_FIELDS
    tokens = tl.load(entry + _MERGE_TOKENS)
    if nth >= tokens:
        return
    first, slot, count = tl.load(entry + _MERGE_FIRST), tl.load(entry + _MERGE_SLOT), tl.load(entry + _MERGE_COUNT)
    channel = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for at in range(0, count, BLOCK_S):
        piece = at + tl.arange(0, BLOCK_S)
        row = (slot + nth + piece * tokens).to(tl.int64) * HEADS + head
        lse = tl.load(lse_ptr + row, piece < count, other=float("-inf"))
        mask = (piece < count)[:, None] & (channel < D)[None, :]
        part = tl.load(partial_ptr + (row * D)[:, None] + channel[None, :], mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights, alpha = tl.exp2(lse - safe), tl.exp2(peak - safe)
        acc = acc * alpha + tl.sum(part * weights[:, None], axis=0)
        total = total * alpha + tl.sum(weights, axis=0)
        peak = new_peak
    out = acc / tl.where(total > 0.0, total, 1.0)
    to = out_ptr + (first + nth).to(tl.int64) * OUT_STRIDE + head * D + channel
    tl.store(to, out.to(out_ptr.dtype.element_ty), channel < D)
