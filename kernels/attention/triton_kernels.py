"""Attention over paged keys and values in Triton: FlashAttention-2 (Dao, 2023) over the pieces of `split`.

The query heads that share a key head are rows of one tile, so each key is read once for the whole group. The softmax
is in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_launch import kernel, start_next, wait_for_inputs
from .kv_tiles import finish_output, load_keys, load_values, prepare_queries, scale_probs, scale_scores
from .split import ITEM_FIELDS, MERGE_FIELDS

_LOG2_E = tl.constexpr(1.4426950408889634)
_ITEM_FIELDS = tl.constexpr(ITEM_FIELDS)
_MERGE_FIELDS = tl.constexpr(MERGE_FIELDS)


@triton.jit
def _read_item(items_ptr: tl.tensor, index: tl.tensor) -> tuple[tl.tensor, ...]:
    """The fields of `split.ITEM`, in its order, without ``unused``."""
    at = items_ptr + index * _ITEM_FIELDS
    row, query, num_queries = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    start, stop, full, partial = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
    return row, query, num_queries, start, stop, full, partial


@triton.jit
def _read_merge(merges_ptr: tl.tensor, index: tl.tensor) -> tuple[tl.tensor, ...]:
    """The fields of `split.MERGE`, in its order."""
    at = merges_ptr + index * _MERGE_FIELDS
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _attend_range(
    acc: tl.tensor,
    bias: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    q_factor: tl.tensor,
    q_total: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIDES: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOWED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over keys ``start … stop - 1``; row i sees ``lowest[i] … highest[i]``. MASKED: not all of them."""
    FACTOR: tl.constexpr = (SOFTCAP if SOFTCAP > 0.0 else SCALE) * _LOG2_E
    for at in range(start, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        valid = key < stop
        if MASKED:
            page = tl.load(pages_ptr + key // PAGE_SIZE, valid, other=0).to(tl.int64)
        else:
            page = tl.load(pages_ptr + key // PAGE_SIZE).to(tl.int64)
        within = key % PAGE_SIZE
        k_at, v_at = page * STRIDES[0] + within * STRIDES[1], page * STRIDES[3] + within * STRIDES[4]
        k_scale_at, v_scale_at = page * STRIDES[6] + within * STRIDES[7], page * STRIDES[9] + within * STRIDES[10]
        k = load_keys(k_ptr, k_at, k_scales_ptr, k_scale_at, valid, K_FORMAT, MASKED, D, BLOCK_N, BLOCK_D)
        v = load_values(v_ptr, v_at, v_scales_ptr, v_scale_at, valid, V_FORMAT, MASKED, D, BLOCK_M, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        scores = scale_scores(scores, q_factor, q_total, k_scales_ptr, k_scale_at, valid, K_FORMAT, MASKED)
        if SOFTCAP > 0.0:  # softcap * tanh(x), with exponentials; an infinite one makes tanh 1
            scores = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * SCALE / SOFTCAP * _LOG2_E)) + 1.0)
        if MASKED:
            visible = key[None, :] <= highest[:, None]
            if WINDOWED:
                visible &= key[None, :] >= lowest[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * FACTOR)
        safe = new_peak
        if MASKED:  # a row that has seen no key yet
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs = tl.exp2(scores * FACTOR - safe[:, None])
        alpha = tl.exp2(peak - safe)
        total = total * alpha + tl.sum(probs, axis=1)
        weighted, low = scale_probs(probs, v_scales_ptr, v_scale_at, valid, q.dtype, V_FORMAT, MASKED)
        if V_FORMAT == "int4":
            bias = bias * alpha + low
        acc = tl.dot(weighted, v.to(weighted.dtype), acc * alpha[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, bias, peak, total


@triton.jit
def _sink_scale(lse: tl.tensor, sinks_ptr: tl.tensor, head: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """What a whole softmax is multiplied by for its head's sink: sigmoid(lse - sink); ``lse`` is to base 2."""
    sink = tl.load(sinks_ptr + head, mask, other=0.0) * _LOG2_E
    return 1.0 / (1.0 + tl.exp2(sink - lse))


@kernel(overlaps=True)
def attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    queries_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    items_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIDES: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """One `split.ITEM`, one key head. ``positions``: of the step's query tokens. SOFTCAP, WINDOW: 0 for none.

    STRIDES: see `KVLayer.strides`.
    """
    start_next(OVERLAPS)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(0)
    row, first, num_queries, start, stop, full, partial = _read_item(items_ptr, tl.program_id(1))
    nth = tl.arange(0, BLOCK_M) // GROUP
    head = kv_head * GROUP + tl.arange(0, BLOCK_M) % GROUP
    channel = tl.arange(0, BLOCK_D)
    is_query = nth < num_queries
    mask = is_query[:, None] & (channel < D)[None, :]
    query = tl.load(queries_ptr + first + nth, is_query, other=0).to(tl.int64)
    position = tl.load(positions_ptr + query, is_query, other=-1)
    wait_for_inputs(OVERLAPS)
    if num_queries == 0:
        return
    nearest = tl.min(tl.where(is_query, position, 2147483647), axis=0)
    stop = tl.minimum(stop, tl.max(position, axis=0) + 1)
    full = tl.minimum(full, nearest + 1)
    q = tl.load(q_ptr + (query * Q_STRIDE + head * D)[:, None] + channel[None, :], mask, other=0.0)
    q, q_factor, q_total = prepare_queries(q, K_FORMAT, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.minimum(position, stop - 1)
    lowest = position - (WINDOW - 1)
    k_head, v_head = k_ptr + kv_head * STRIDES[2], v_ptr + kv_head * STRIDES[5]
    k_scales, v_scales = k_scales_ptr + kv_head * STRIDES[8], v_scales_ptr + kv_head * STRIDES[11]
    if K_FORMAT == "fp8" and V_FORMAT == "fp8":  # in the same words, which are then loaded once
        v_scales = k_scales
    pages = table_ptr + row.to(tl.int64) * TABLE_STRIDE
    middle = start
    if WINDOW == 0:  # whole blocks that every query sees need no mask
        middle = start + tl.maximum(full - start, 0) // BLOCK_N * BLOCK_N
        acc, bias, peak, total = _attend_range(
            acc, bias, peak, total, q, q_factor, q_total, k_head, v_head, k_scales, v_scales, pages, start, middle,
            lowest, highest, D, PAGE_SIZE, STRIDES, K_FORMAT, V_FORMAT, SCALE, SOFTCAP, False, False, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:  # blocks outside of every query's window are skipped
        middle = start + tl.maximum(nearest - (WINDOW - 1) - start, 0) // BLOCK_N * BLOCK_N
    acc, bias, peak, total = _attend_range(
        acc, bias, peak, total, q, q_factor, q_total, k_head, v_head, k_scales, v_scales, pages, middle, stop,
        lowest, highest, D, PAGE_SIZE, STRIDES, K_FORMAT, V_FORMAT, SCALE, SOFTCAP, WINDOW > 0, True, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    seen = total > 0.0
    acc = finish_output(acc, bias, V_FORMAT, BLOCK_M, BLOCK_D) / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    if partial < 0:
        if SINKS:
            acc *= _sink_scale(lse, sinks_ptr, head, is_query)[:, None]
        out_ptrs = out_ptr + (query * OUT_STRIDE + head * D)[:, None] + channel[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask)
    else:
        to = (partial + nth).to(tl.int64) * HEADS + head
        tl.store(partial_ptr + (to * D)[:, None] + channel[None, :], acc, mask)
        tl.store(lse_ptr + to, lse, is_query)


@kernel(overlaps=True)
def merge(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    queries_ptr: tl.tensor,
    merges_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Merges the partial results of one query token and head, in a fixed order."""
    start_next(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    head, nth = tl.program_id(0), tl.program_id(2)
    first, num_queries, partial, count = _read_merge(merges_ptr, tl.program_id(1))
    if nth >= num_queries:
        return
    query = tl.load(queries_ptr + first + nth).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for at in range(0, count, BLOCK_S):
        piece = at + tl.arange(0, BLOCK_S)
        row = (partial + nth + piece * num_queries).to(tl.int64) * HEADS + head
        lse = tl.load(lse_ptr + row, piece < count, other=float("-inf"))
        mask = (piece < count)[:, None] & (channel < D)[None, :]
        part = tl.load(partial_ptr + (row * D)[:, None] + channel[None, :], mask, other=0.0)
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs, alpha = tl.exp2(lse - safe), tl.exp2(peak - safe)
        acc = acc * alpha + tl.sum(part * probs[:, None], axis=0)
        total = total * alpha + tl.sum(probs, axis=0)
        peak = new_peak
    seen = total > 0.0
    out = acc / tl.where(seen, total, 1.0)
    if SINKS:
        lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        out *= _sink_scale(lse, sinks_ptr, head + tl.zeros([1], tl.int32), seen)
    to = out_ptr + query * OUT_STRIDE + head * D + channel
    tl.store(to, out.to(out_ptr.dtype.element_ty), channel < D)


@triton.jit
def _read_partial(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    nth: tl.tensor,
    count: tl.tensor,
    head: tl.tensor,
    channel: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A query token's nth partial result and its log-sum-exp; 0 and -inf from ``count`` on."""
    exists = nth < count
    row = tl.load(slots_ptr + nth, exists, other=0).to(tl.int64) * HEADS + head
    lse = tl.load(lse_ptr + row, exists & (head < HEADS), other=float("-inf"))
    mask = exists & (head < HEADS)[:, None] & (channel < D)[None, :]
    return tl.load(partial_ptr + (row * D)[:, None] + channel[None, :], mask, other=0.0), lse


@kernel(overlaps=True)
def merge_slots(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    merges_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """Merges one query token's partial results, wherever they are, for some heads: see `tree_plan.TreePlan`.

    A token that has none (0) is set to 0; one that has nothing to merge (-1) is left as it is. Four partial results are
    read at a time, to have their loads in flight together.
    """
    start_next(OVERLAPS)
    query = tl.program_id(0)
    first, count = tl.load(merges_ptr + query * 2), tl.load(merges_ptr + query * 2 + 1)
    wait_for_inputs(OVERLAPS)
    if count < 0:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_D)
    slots = slots_ptr + first
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for at in range(0, count, 4):
        part0, lse0 = _read_partial(partial_ptr, lse_ptr, slots, at, count, head, channel, HEADS, D)
        part1, lse1 = _read_partial(partial_ptr, lse_ptr, slots, at + 1, count, head, channel, HEADS, D)
        part2, lse2 = _read_partial(partial_ptr, lse_ptr, slots, at + 2, count, head, channel, HEADS, D)
        part3, lse3 = _read_partial(partial_ptr, lse_ptr, slots, at + 3, count, head, channel, HEADS, D)
        new_peak = tl.maximum(peak, tl.maximum(tl.maximum(lse0, lse1), tl.maximum(lse2, lse3)))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        alpha = tl.exp2(peak - safe)
        weight0, weight1 = tl.exp2(lse0 - safe), tl.exp2(lse1 - safe)
        weight2, weight3 = tl.exp2(lse2 - safe), tl.exp2(lse3 - safe)
        acc = acc * alpha[:, None] + part0 * weight0[:, None] + part1 * weight1[:, None]
        acc += part2 * weight2[:, None] + part3 * weight3[:, None]
        total = total * alpha + weight0 + weight1 + weight2 + weight3
        peak = new_peak
    seen = total > 0.0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    if SINKS:
        lse = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        out *= _sink_scale(lse, sinks_ptr, head, head < HEADS)[:, None]
    out_ptrs = out_ptr + query.to(tl.int64) * OUT_STRIDE + (head * D)[:, None] + channel[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), (head < HEADS)[:, None] & (channel < D)[None, :])
