"""Attention over quantized pages in Gluon.

`triton_kernels.attend` with the same arguments and results. There the compiler stages tiles through shared memory and
converts them between layouts; here every byte goes from global memory to the registers from which it is multiplied (see
`register_tiles`), and the next keys' loads are in flight while these are multiplied. A third of the instructions are
left, which decides: quantized keys are bound by their conversion, not by memory.

One warp takes up to 16 query rows and multiplies with `mma`; four take 64, with `wgmma`.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from ..kv_format import FLOAT16_MAX, GPU_HEAD_DIMS, NVFP4_GLOBAL
from ..kv_pool import KVLayout
from ..triton_launch import kernel
from .register_tiles import (
    key_operand,
    key_scales_layout,
    key_words_layout,
    permute_queries,
    restore_channels,
    value_operand,
    values_layout,
)
from .split import ITEM_FIELDS

BLOCK = 16  # keys that lie in one page: the page size is a multiple of it
_LOG2_E = gl.constexpr(1.4426950408889634)
_ITEM_FIELDS = gl.constexpr(ITEM_FIELDS)
_BLOCK = gl.constexpr(BLOCK)
_NVFP4_SCALE = gl.constexpr(2.0**14 * NVFP4_GLOBAL)
_GAIN = gl.constexpr(256.0)  # see `kv_tiles`
_FLOAT16_MAX = gl.constexpr(FLOAT16_MAX)


class RegisterTile(NamedTuple):
    """Sizes of a program of `attend_quantized`."""

    rows: int  # query tokens times the query heads of a key head, padded
    keys: int  # read at a time
    warps: int
    programs: int  # a multiprocessor: two rounds of what fits at once


def register_tile(rows: int, layout: KVLayout) -> RegisterTile | None:
    """The tile for requests of about so many rows; None where `attend` reads such pages. Triton's interpreter does not
    run Gluon."""
    fits = layout.page_size % BLOCK == 0 and layout.head_dim in GPU_HEAD_DIMS and layout.dtype.itemsize == 2
    if not layout.quantized or not fits or triton.knobs.runtime.interpret:
        return None
    if rows > 16:
        return RegisterTile(64, 64, 4, programs=4) if layout.head_dim == 128 else None
    name, rows = layout.k_format.name, 8 if rows <= 8 else 16
    # As many keys as registers allow. On an H200, 250 requests of 8k tokens, 16 → 32 keys: fp8 1,093 → 995 µs, int4
    # 681 → 623, nvfp4 864 → 854.
    keys = 32 if name in ("fp8", "int4") and layout.head_dim <= 128 else 16
    return RegisterTile(rows, keys, 1, programs=16 if name == "fp8" else 24)


@gluon.jit
def _locate(pages_ptr: gl.tensor, at: gl.tensor, last: gl.tensor, PAGE_SIZE: gl.constexpr, N: gl.constexpr) -> gl.tuple:
    """Pages of keys ``at … at + N - 1`` and where they are in them, of each `BLOCK`; of ``last`` beyond it."""
    key0 = gl.minimum(at, last)
    page0, within0 = gl.load(pages_ptr + key0 // PAGE_SIZE).to(gl.int64), key0 % PAGE_SIZE // _BLOCK * _BLOCK
    page1, within1 = page0, within0
    page2, within2 = page0, within0
    page3, within3 = page0, within0
    if N >= 32:
        key1 = gl.minimum(at + _BLOCK, last)
        page1, within1 = gl.load(pages_ptr + key1 // PAGE_SIZE).to(gl.int64), key1 % PAGE_SIZE // _BLOCK * _BLOCK
    if N >= 64:
        key2, key3 = gl.minimum(at + 2 * _BLOCK, last), gl.minimum(at + 3 * _BLOCK, last)
        page2, within2 = gl.load(pages_ptr + key2 // PAGE_SIZE).to(gl.int64), key2 % PAGE_SIZE // _BLOCK * _BLOCK
        page3, within3 = gl.load(pages_ptr + key3 // PAGE_SIZE).to(gl.int64), key3 % PAGE_SIZE // _BLOCK * _BLOCK
    return page0, page1, page2, page3, within0, within1, within2, within3


@gluon.jit
def _load(
    ptr: gl.tensor,
    place: gl.tuple,
    STRIDES: gl.constexpr,
    FIRST: gl.constexpr,
    dtype: gl.constexpr,
    N: gl.constexpr,
    COUNT: gl.constexpr,
    LAYOUT: gl.constexpr,
    SHARED_BY: gl.constexpr = 1,
) -> gl.tensor:
    """``dtype`` ``[N, COUNT]`` of a head at ``ptr``. STRIDES[FIRST] lie between pages, the next between tokens;
    SHARED_BY consecutive elements are one in memory."""
    page0, page1, page2, page3, within0, within1, within2, within3 = place
    PAGE: gl.constexpr = STRIDES[FIRST]
    TOKEN: gl.constexpr = STRIDES[FIRST + 1]
    token = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    element = gl.arange(0, COUNT, gl.SliceLayout(0, LAYOUT))
    offsets = page0 * PAGE + within0 * TOKEN + token % _BLOCK * TOKEN
    if N >= 32:
        offset = gl.where(token // _BLOCK == 0, page0 * PAGE + within0 * TOKEN, page1 * PAGE + within1 * TOKEN)
        if N >= 64:
            offset = gl.where(token // _BLOCK == 2, page2 * PAGE + within2 * TOKEN, offset)
            offset = gl.where(token // _BLOCK == 3, page3 * PAGE + within3 * TOKEN, offset)
        offsets = offset + token % _BLOCK * TOKEN
    pointers = (ptr + offsets).to(gl.pointer_type(dtype), bitcast=True)
    return gl.load(pointers[:, None] + (element // SHARED_BY)[None, :])


@gluon.jit
def _load_scales(
    ptr: gl.tensor,
    place: gl.tuple,
    STRIDES: gl.constexpr,
    FIRST: gl.constexpr,
    FORMAT: gl.constexpr,
    N: gl.constexpr,
    COUNT: gl.constexpr,
    SHARED_BY: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCKS: gl.constexpr,
) -> gl.tensor:
    """The scales of N tokens: words ``[N, 1]`` in layout TOKENS, or of nvfp4 bytes ``[N, COUNT]`` in layout BLOCKS."""
    if FORMAT == "nvfp4":
        scales = _load(ptr, place, STRIDES, FIRST, gl.uint8, N, COUNT, BLOCKS, SHARED_BY)
    elif FORMAT == "plain":
        scales = gl.zeros([N, 1], gl.int32, TOKENS)
    else:
        scales = _load(ptr, place, STRIDES, FIRST, gl.int32, N, 1, TOKENS)
    return scales


@gluon.jit
def _step_and_low(words: gl.tensor) -> tuple[gl.tensor, gl.tensor]:
    """int4's scales of each token."""
    step = words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return step, (words >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _own_sums(x: gl.tensor, WARPS: gl.constexpr) -> gl.tensor:
    """``[N, M]`` to ``[8 · WARPS, M]``: sums of the keys that one thread has."""
    N: gl.constexpr = x.shape[0]
    M: gl.constexpr = x.shape[1]
    return gl.reshape(gl.sum(gl.reshape(x, [WARPS, N // 8 // WARPS, 8, M]), axis=1), [8 * WARPS, M])


@gluon.jit
def _for_rows_of(x: gl.tensor, other: gl.tensor) -> gl.tensor:
    """``[M]`` as ``[1, M]`` in the layout of ``other`` ``[N, M]``."""
    return gl.convert_layout(x, gl.SliceLayout(0, other.type.layout), assert_trivial=True)[None, :]


@kernel(jit=gluon.jit)
def attend_quantized(
    q_ptr: gl.tensor,
    k_ptr: gl.tensor,
    v_ptr: gl.tensor,
    k_scales_ptr: gl.tensor,
    v_scales_ptr: gl.tensor,
    table_ptr: gl.tensor,
    queries_ptr: gl.tensor,
    positions_ptr: gl.tensor,
    items_ptr: gl.tensor,
    sinks_ptr: gl.tensor,
    out_ptr: gl.tensor,
    partial_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    STRIDES: gl.constexpr,
    K_FORMAT: gl.constexpr,
    V_FORMAT: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    OUT_STRIDE: gl.constexpr,
    TABLE_STRIDE: gl.constexpr,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    WINDOW: gl.constexpr,
    SINKS: gl.constexpr,
    PRECISION: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
) -> None:
    """One `split.ITEM`, one key head, as `triton_kernels.attend`, with the sizes of a `RegisterTile`.

    Ranges begin at multiples of `BLOCK`. Keys of a block beyond the range are read, which the pool allows, and masked.
    """
    GROUP: gl.constexpr = HEADS // KV_HEADS
    WIDE: gl.constexpr = BLOCK_M >= 64
    WARPS: gl.constexpr = 4 if WIDE else 1
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3 if WIDE else 2, 0],
        warps_per_cta=[WARPS, 1],
        instr_shape=[16, BLOCK_M, 16] if WIDE else [16, 8],
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [WARPS, 1], [1, 0])
    PER_QUERY: gl.constexpr = gl.SliceLayout(0, MMA)
    PER_ROW: gl.constexpr = gl.SliceLayout(1, ROWS)
    K_BITS: gl.constexpr = 4 if (K_FORMAT == "int4" or K_FORMAT == "nvfp4") else 8 if K_FORMAT == "fp8" else 16
    V_BITS: gl.constexpr = 4 if (V_FORMAT == "int4" or V_FORMAT == "nvfp4") else 8
    K_WORDS: gl.constexpr = D * K_BITS // 32
    V_TYPE: gl.constexpr = gl.int16 if (WIDE and V_BITS == 4) else gl.int32
    V_COUNT: gl.constexpr = D * V_BITS // V_TYPE.primitive_bitwidth
    K_BLOCKS: gl.constexpr = D // 16
    V_BLOCKS: gl.constexpr = 32 if WIDE else 8 * max(D // 128, 1)
    V_SHARED: gl.constexpr = V_BLOCKS * 16 // D
    K_LAYOUT: gl.constexpr = key_words_layout(BLOCK_N, K_WORDS, WARPS)
    V_LAYOUT: gl.constexpr = values_layout(BLOCK_N, V_COUNT, WARPS)
    K_SCALES: gl.constexpr = key_scales_layout(BLOCK_N, D, WARPS)
    V_SCALES: gl.constexpr = values_layout(BLOCK_N, V_BLOCKS, WARPS)
    FACTOR: gl.constexpr = SCALE if SOFTCAP > 0.0 else SCALE * _LOG2_E

    kv_head = gl.program_id(0)
    item = items_ptr + gl.program_id(1) * _ITEM_FIELDS
    row, first, num_queries, start = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3)
    stop, full, partial = gl.load(item + 4), gl.load(item + 5), gl.load(item + 6)
    if num_queries == 0:
        return

    nth = gl.arange(0, BLOCK_M, PER_ROW) // GROUP
    head = kv_head * GROUP + gl.arange(0, BLOCK_M, PER_ROW) % GROUP
    channel = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    is_query = nth < num_queries
    query = gl.load(queries_ptr + first + nth, is_query, other=0).to(gl.int64)
    position = gl.load(positions_ptr + query, is_query, other=-1)
    nearest = gl.min(gl.where(is_query, position, 2147483647), axis=0)
    stop = gl.minimum(stop, gl.max(position, axis=0) + 1)
    full = gl.minimum(gl.minimum(full, nearest + 1), stop)
    q_ptrs = q_ptr + (query * Q_STRIDE + head * D)[:, None] + channel[None, :]
    q = gl.load(q_ptrs, is_query[:, None], other=0.0)
    # int4: odd pairs of channels have larger codes (see `kv_tiles`).
    pair_factor = gl.where(channel // 2 % 2 == 1, 0.0625, 1.0)
    q_total = gl.zeros([BLOCK_M], gl.float32, PER_ROW)
    if K_FORMAT != "plain":
        scaled = gl.minimum(gl.maximum(q.to(gl.float32) * FACTOR, -_FLOAT16_MAX), _FLOAT16_MAX)
        if K_FORMAT == "int4":
            q_total = gl.sum(scaled, axis=1)
            scaled = scaled * pair_factor[None, :]
        q = scaled.to(gl.float16)
    if WIDE:
        queries_memory = gl.allocate_shared_memory(q.dtype, [BLOCK_M, D], SHARED, permute_queries(q, K_WORDS))
        queries = queries_memory.permute((1, 0))
        weights_memory = gl.allocate_shared_memory(gl.float16, [BLOCK_N, BLOCK_M], SHARED)
        fence_async_shared()
    else:
        queries = gl.convert_layout(gl.permute(permute_queries(q, K_WORDS), (1, 0)), RIGHT)
    q_total = gl.convert_layout(q_total, PER_QUERY)[None, :]

    pages = table_ptr + row.to(gl.int64) * TABLE_STRIDE
    k_head, v_head = k_ptr + kv_head * STRIDES[2], v_ptr + kv_head * STRIDES[5]
    k_scales, v_scales = k_scales_ptr + kv_head * STRIDES[8], v_scales_ptr + kv_head * STRIDES[11]
    if WINDOW > 0:  # blocks outside of every query's window are skipped
        start += gl.maximum(nearest - (WINDOW - 1) - start, 0) // BLOCK_N * BLOCK_N
    last = gl.maximum(stop - 1, 0)
    acc = gl.zeros([D, BLOCK_M], gl.float32, MMA)
    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, PER_QUERY)
    total = _own_sums(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA), WARPS)  # added up at the end
    bias = total

    place = _locate(pages, start, last, PAGE_SIZE, BLOCK_N)
    k = _load(k_head, place, STRIDES, 0, gl.int32, BLOCK_N, K_WORDS, K_LAYOUT)
    k_scale = _load_scales(k_scales, place, STRIDES, 6, K_FORMAT, BLOCK_N, K_BLOCKS, 1, MMA, K_SCALES)
    v = _load(v_head, place, STRIDES, 3, V_TYPE, BLOCK_N, V_COUNT, V_LAYOUT)
    v_scale = _load_scales(v_scales, place, STRIDES, 9, V_FORMAT, BLOCK_N, V_BLOCKS, V_SHARED, MMA, V_SCALES)
    current = place
    place = _locate(pages, start + BLOCK_N, last, PAGE_SIZE, BLOCK_N)
    for at in range(start, stop, BLOCK_N):
        keys = key_operand(k, k_scale, K_FORMAT, BLOCK_N, D, LEFT, q.dtype)
        scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
        scores = warpgroup_mma(keys, queries, scores, use_acc=False) if WIDE else mma_v2(keys, queries, scores)
        if K_FORMAT == "fp8":
            scores = scores * k_scale.to(gl.float32, bitcast=True)
        elif K_FORMAT == "int4":
            step, low = _step_and_low(k_scale)
            scores = scores * (step * 16777216.0) + low * q_total
        elif K_FORMAT == "nvfp4":
            scores = scores * _NVFP4_SCALE
        else:
            scores = scores * FACTOR
        k = _load(k_head, place, STRIDES, 0, gl.int32, BLOCK_N, K_WORDS, K_LAYOUT)
        k_scale = _load_scales(k_scales, place, STRIDES, 6, K_FORMAT, BLOCK_N, K_BLOCKS, 1, MMA, K_SCALES)
        if WIDE:  # not earlier: registers
            v = _load(v_head, current, STRIDES, 3, V_TYPE, BLOCK_N, V_COUNT, V_LAYOUT)
            v_scale = _load_scales(v_scales, current, STRIDES, 9, V_FORMAT, BLOCK_N, V_BLOCKS, V_SHARED, MMA, V_SCALES)
        if SOFTCAP > 0.0:  # softcap * tanh(x / softcap), with exponentials; an infinite one makes tanh 1
            tanh = 1.0 - 2.0 / (gl.exp2(scores * (2.0 / SOFTCAP * _LOG2_E)) + 1.0)
            scores = tanh * (SOFTCAP * _LOG2_E)
        if WINDOW > 0 or at + BLOCK_N > full:
            # Read again, because few blocks need it and it takes registers.
            mine = gl.arange(0, BLOCK_M, PER_QUERY) // GROUP
            query_of = gl.load(queries_ptr + first + mine, mine < num_queries, other=0)
            position_of = gl.load(positions_ptr + query_of, mine < num_queries, other=-1)
            key = at + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))[:, None]
            visible = key <= gl.minimum(position_of, stop - 1)[None, :]
            if WINDOW > 0:
                visible &= key > (position_of - WINDOW)[None, :]
            scores = gl.where(visible, scores, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(scores, axis=0))
        safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs = gl.exp2(scores - safe[None, :])
        alpha = gl.exp2(peak - safe)
        peak = new_peak
        total = total * _for_rows_of(alpha, total) + _own_sums(probs, WARPS)
        weighted = probs
        if V_FORMAT == "fp8":
            weighted = probs * (v_scale.to(gl.float32, bitcast=True) * _GAIN)
        elif V_FORMAT == "int4":
            step, low = _step_and_low(v_scale)
            bias = bias * _for_rows_of(alpha, bias) + _own_sums(probs * low, WARPS)
            weighted = probs * (step * _GAIN)
        values = value_operand(v, v_scale, V_FORMAT, BLOCK_N, D, LEFT, WARPS)
        if WIDE:
            weights_memory.store(weighted.to(gl.float16))
            fence_async_shared()
            acc = warpgroup_mma(values, weights_memory, acc * alpha[None, :])
        else:
            acc = mma_v2(values, gl.convert_layout(weighted.to(gl.float16), RIGHT), acc * alpha[None, :])
        if not WIDE:
            v = _load(v_head, place, STRIDES, 3, V_TYPE, BLOCK_N, V_COUNT, V_LAYOUT)
            v_scale = _load_scales(v_scales, place, STRIDES, 9, V_FORMAT, BLOCK_N, V_BLOCKS, V_SHARED, MMA, V_SCALES)
        current = place
        place = _locate(pages, at + 2 * BLOCK_N, last, PAGE_SIZE, BLOCK_N)

    sums = gl.convert_layout(gl.sum(total, axis=0), PER_QUERY)
    seen = sums > 0.0
    inverse = gl.where(seen, 1.0 / gl.where(seen, sums, 1.0), 0.0)
    if V_FORMAT == "fp8":
        acc = acc * (inverse * (1.0 / _GAIN))[None, :]
    elif V_FORMAT == "nvfp4":
        acc = acc * (inverse * _NVFP4_SCALE)[None, :]
    else:
        acc = acc * (inverse * (16777216.0 / _GAIN))[None, :]
    out = gl.convert_layout(restore_channels(acc, V_FORMAT, WARPS), ROWS)
    if V_FORMAT == "int4":
        shift = gl.convert_layout(gl.sum(bias, axis=0), PER_QUERY) * inverse
        out = out * pair_factor[None, :] + gl.convert_layout(shift, PER_ROW)[:, None]
    lse = gl.where(seen, peak + gl.log2(gl.where(seen, sums, 1.0)), float("-inf"))
    lse = gl.convert_layout(lse, PER_ROW)
    if partial < 0:
        if SINKS:
            sink = gl.load(sinks_ptr + head, is_query, other=0.0) * _LOG2_E
            out = out * (1.0 / (1.0 + gl.exp2(sink - lse)))[:, None]
        out_ptrs = out_ptr + (query * OUT_STRIDE + head * D)[:, None] + channel[None, :]
        gl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), is_query[:, None])
    else:
        to = (partial + nth).to(gl.int64) * HEADS + head
        gl.store(partial_ptr + (to * D)[:, None] + channel[None, :], out, is_query[:, None])
        gl.store(lse_ptr + to, lse, is_query)
