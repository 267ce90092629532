"""Attention of a few query rows over quantized pages, in Gluon: flash-decoding by programs of one warp.

`triton_kernels.attend` with the same arguments and results. There the compiler stages tiles through shared memory and
converts them between layouts; here every byte goes from global memory to the registers that multiply it (see
`register_tiles`), and the next keys' loads are in flight while these are multiplied. Instructions per key are about a
third, which decides: quantized keys are bound by their conversion, not by memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..kv_format import NVFP4_GLOBAL
from ..kv_pool import KVLayout
from ..triton_launch import kernel, start_next, wait_for_inputs
from .base import LayerSpec
from .register_tiles import (
    key_operand,
    key_scales_layout,
    key_words_layout,
    permute_queries,
    restore_channels,
    value_operand,
    value_scales_layout,
    value_words_layout,
)
from .split import ITEM_FIELDS

BLOCK = 16  # keys that lie in one page: the page size is a multiple of it
_LOG2_E = gl.constexpr(1.4426950408889634)
_ITEM_FIELDS = gl.constexpr(ITEM_FIELDS)
_BLOCK = gl.constexpr(BLOCK)
_NVFP4_SCALE = gl.constexpr(2.0**14 * NVFP4_GLOBAL)
_GAIN = gl.constexpr(256.0)  # see `kv_tiles`


class RegisterTile(NamedTuple):
    """Sizes of a program of `attend_few`, which is one warp."""

    rows: int  # query tokens times the query heads of a key head, padded
    keys: int  # read at a time
    programs: int = 24  # a multiprocessor: two rounds of what fits at once


def checked(layers: list[LayerSpec]) -> bool:
    """Whether layers have only settings with which `attend_few` was compared with the specification on a device."""
    return all(spec.window is None and spec.softcap is None and spec.sinks is None for spec in layers)


def register_tile(rows: int, layout: KVLayout) -> RegisterTile | None:
    """The tile for requests of about so many rows; None where `attend` reads such pages. Triton's interpreter does not
    run Gluon. Heads of 64 and 256 channels have been run in the interpreter alone: they are left to `attend`."""
    fits = layout.page_size % BLOCK == 0 and layout.head_dim == 128 and layout.dtype.itemsize == 2
    if rows > 16 or not layout.quantized or not fits or triton.knobs.runtime.interpret:
        return None
    keys = 32 if layout.k_format.name == "int4" else 16  # as many as registers allow
    return RegisterTile(8 if rows <= 8 else 16, keys)


@gluon.jit
def _locate(
    pages_ptr: gl.tensor, at: gl.tensor, last: gl.tensor, PAGE_SIZE: gl.constexpr, N: gl.constexpr
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Pages of keys ``at … at + N - 1``, N 16 or 32, and where the two blocks begin in them; of ``last`` beyond it."""
    first = gl.minimum(at, last)
    second = gl.minimum(at + (N - _BLOCK), last)
    page0, page1 = gl.load(pages_ptr + first // PAGE_SIZE), gl.load(pages_ptr + second // PAGE_SIZE)
    within0, within1 = first % PAGE_SIZE // _BLOCK * _BLOCK, second % PAGE_SIZE // _BLOCK * _BLOCK
    return page0.to(gl.int64), page1.to(gl.int64), within0, within1


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
    SHARED_BY consecutive elements are one in memory.
    """
    page0, page1, within0, within1 = place
    token = gl.arange(0, N, gl.SliceLayout(1, LAYOUT))
    element = gl.arange(0, COUNT, gl.SliceLayout(0, LAYOUT))
    offset = page0 * STRIDES[FIRST] + within0 * STRIDES[FIRST + 1]
    if N > _BLOCK:
        second = page1 * STRIDES[FIRST] + within1 * STRIDES[FIRST + 1]
        offsets = gl.where(token < _BLOCK, offset, second) + token % _BLOCK * STRIDES[FIRST + 1]
    else:
        offsets = offset + token * STRIDES[FIRST + 1]
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


@kernel(overlaps=True, jit=gluon.jit)
def attend_few(
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
    OVERLAPS: gl.constexpr,
) -> None:
    """One `split.ITEM`, one key head, as `triton_kernels.attend`. BLOCK_M: 8 or 16; BLOCK_N: 16 or 32; one warp.

    Ranges begin at multiples of `BLOCK`. Keys of a block beyond the range are read, which the pool allows, and masked.
    Layers with SINKS are left to `attend`.
    """
    GROUP: gl.constexpr = HEADS // KV_HEADS
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [1, 1], [1, 0])
    PER_QUERY: gl.constexpr = gl.SliceLayout(0, MMA)
    PER_ROW: gl.constexpr = gl.SliceLayout(1, ROWS)
    K_BITS: gl.constexpr = 4 if (K_FORMAT == "int4" or K_FORMAT == "nvfp4") else 8 if K_FORMAT == "fp8" else 16
    V_BITS: gl.constexpr = 4 if (V_FORMAT == "int4" or V_FORMAT == "nvfp4") else 8
    K_WORDS: gl.constexpr = D * K_BITS // 32
    V_WORDS: gl.constexpr = D * V_BITS // 32
    K_LAYOUT: gl.constexpr = key_words_layout(BLOCK_N, K_WORDS)
    V_LAYOUT: gl.constexpr = value_words_layout(BLOCK_N, V_WORDS)
    K_SCALES: gl.constexpr = key_scales_layout(BLOCK_N, D)
    V_SCALES: gl.constexpr = value_scales_layout(BLOCK_N, D)
    K_BLOCKS: gl.constexpr = D // 16
    V_BLOCKS: gl.constexpr = 8 * max(D // 128, 1)
    V_SHARED: gl.constexpr = max(128 // D, 1)
    SAME_WORDS: gl.constexpr = K_FORMAT == "fp8" and V_FORMAT == "fp8"
    FACTOR: gl.constexpr = (SOFTCAP if SOFTCAP > 0.0 else SCALE) * _LOG2_E

    kv_head = gl.program_id(0)
    item = items_ptr + gl.program_id(1) * _ITEM_FIELDS
    row, first, num_queries, start = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 3)
    stop, partial = gl.load(item + 4), gl.load(item + 6)
    nth = gl.arange(0, BLOCK_M, PER_ROW) // GROUP
    head = kv_head * GROUP + gl.arange(0, BLOCK_M, PER_ROW) % GROUP
    channel = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    is_query = nth < num_queries
    query = gl.load(queries_ptr + first + nth, is_query, other=0).to(gl.int64)
    position = gl.load(positions_ptr + query, is_query, other=-1)
    wait_for_inputs(OVERLAPS)
    if num_queries == 0:
        return
    stop = gl.minimum(stop, gl.max(position, axis=0) + 1)
    q_ptrs = q_ptr + (query * Q_STRIDE + head * D)[:, None] + channel[None, :]
    q = gl.load(q_ptrs, is_query[:, None], other=0.0)
    q_factor = gl.full([BLOCK_M], 1.0, gl.float32, PER_ROW)
    q_total = gl.zeros([BLOCK_M], gl.float32, PER_ROW)
    # int4: odd pairs of channels have larger codes (see `kv_tiles`).
    pair_factor = gl.where(channel // 2 % 2 == 1, 0.0625, 1.0)
    if K_FORMAT != "plain":
        scaled = q.to(gl.float32)
        q_factor = gl.maximum(gl.max(gl.abs(scaled), axis=1), 1e-30)
        scaled = scaled / q_factor[:, None]
        if K_FORMAT == "int4":
            q_total = gl.sum(scaled, axis=1) * q_factor
            scaled = scaled * pair_factor[None, :]
            q_factor = q_factor * 16777216.0
        if K_FORMAT == "nvfp4":
            q_factor = q_factor * _NVFP4_SCALE
        q = scaled.to(gl.float16)
    queries = permute_queries(q, K_WORDS, RIGHT)
    q_factor = gl.convert_layout(q_factor, PER_QUERY)[None, :]
    q_total = gl.convert_layout(q_total, PER_QUERY)[None, :]
    position_of = gl.convert_layout(position, PER_QUERY)
    highest = gl.minimum(position_of, stop - 1)[None, :]
    lowest = (position_of - (WINDOW - 1))[None, :]

    pages = table_ptr + row.to(gl.int64) * TABLE_STRIDE
    k_head, v_head = k_ptr + kv_head * STRIDES[2], v_ptr + kv_head * STRIDES[5]
    k_scales, v_scales = k_scales_ptr + kv_head * STRIDES[8], v_scales_ptr + kv_head * STRIDES[11]
    if WINDOW > 0:  # blocks outside of every query's window are skipped
        nearest = gl.min(gl.where(is_query, position, 2147483647), axis=0)
        start += gl.maximum(nearest - (WINDOW - 1) - start, 0) // BLOCK_N * BLOCK_N
    last = gl.maximum(stop - 1, 0)
    acc = gl.zeros([D, BLOCK_M], gl.float32, MMA)
    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, PER_QUERY)
    # Sums of each thread's own keys, added up at the end.
    total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)
    bias = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA)

    place = _locate(pages, start, last, PAGE_SIZE, BLOCK_N)
    k = _load(k_head, place, STRIDES, 0, gl.int32, BLOCK_N, K_WORDS, K_LAYOUT)
    k_scale = _load_scales(k_scales, place, STRIDES, 6, K_FORMAT, BLOCK_N, K_BLOCKS, 1, MMA, K_SCALES)
    v = _load(v_head, place, STRIDES, 3, gl.int32, BLOCK_N, V_WORDS, V_LAYOUT)
    v_scale = k_scale
    if not SAME_WORDS:
        v_scale = _load_scales(v_scales, place, STRIDES, 9, V_FORMAT, BLOCK_N, V_BLOCKS, V_SHARED, MMA, V_SCALES)
    place = _locate(pages, start + BLOCK_N, last, PAGE_SIZE, BLOCK_N)
    for at in range(start, stop, BLOCK_N):
        keys = key_operand(k, k_scale, K_FORMAT, BLOCK_N, D, LEFT, queries.dtype)
        scores = mma_v2(keys, queries, gl.zeros([BLOCK_N, BLOCK_M], gl.float32, MMA))
        if K_FORMAT == "fp8":
            scores = scores * (k_scale << 16).to(gl.float32, bitcast=True) * q_factor
        elif K_FORMAT == "int4":
            step, low = _step_and_low(k_scale)
            scores = scores * step * q_factor + low * q_total
        elif K_FORMAT == "nvfp4":
            scores = scores * q_factor
        k = _load(k_head, place, STRIDES, 0, gl.int32, BLOCK_N, K_WORDS, K_LAYOUT)
        if SAME_WORDS:
            v_scale = k_scale
        k_scale = _load_scales(k_scales, place, STRIDES, 6, K_FORMAT, BLOCK_N, K_BLOCKS, 1, MMA, K_SCALES)
        if SOFTCAP > 0.0:  # softcap * tanh(x), with exponentials; an infinite one makes tanh 1
            scores = 1.0 - 2.0 / (gl.exp2(scores * (2.0 * SCALE / SOFTCAP * _LOG2_E)) + 1.0)
        key = at + gl.arange(0, BLOCK_N, gl.SliceLayout(1, MMA))[:, None]
        visible = key <= highest
        if WINDOW > 0:
            visible &= key >= lowest
        scores = gl.where(visible, scores * FACTOR, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(scores, axis=0))
        safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        probs = gl.exp2(scores - safe[None, :])
        alpha = gl.exp2(peak - safe)[None, :]
        peak = new_peak
        total = total * alpha + probs
        weighted = probs
        if V_FORMAT == "fp8":
            weighted = probs * ((v_scale & -65536).to(gl.float32, bitcast=True) * _GAIN)
        elif V_FORMAT == "int4":
            step, low = _step_and_low(v_scale)
            bias = bias * alpha + probs * low
            weighted = probs * (step * _GAIN)
        weights = gl.convert_layout(weighted.to(gl.float16), RIGHT)
        values = value_operand(v, v_scale, V_FORMAT, BLOCK_N, D, LEFT)
        acc = mma_v2(values, weights, acc * alpha)
        v = _load(v_head, place, STRIDES, 3, gl.int32, BLOCK_N, V_WORDS, V_LAYOUT)
        if not SAME_WORDS:
            v_scale = _load_scales(v_scales, place, STRIDES, 9, V_FORMAT, BLOCK_N, V_BLOCKS, V_SHARED, MMA, V_SCALES)
        place = _locate(pages, at + 2 * BLOCK_N, last, PAGE_SIZE, BLOCK_N)

    start_next(OVERLAPS)
    sums = gl.sum(total, axis=0)
    seen = sums > 0.0
    inverse = gl.where(seen, 1.0 / gl.where(seen, sums, 1.0), 0.0)[None, :]
    if V_FORMAT == "fp8":
        acc = acc * (inverse * (1.0 / _GAIN))
    elif V_FORMAT == "nvfp4":
        acc = acc * (inverse * _NVFP4_SCALE)
    else:
        acc = acc * (inverse * (16777216.0 / _GAIN))
    out = gl.convert_layout(restore_channels(acc), ROWS)
    if V_FORMAT == "int4":
        shift = gl.sum(bias, axis=0)[None, :] * inverse
        out = out * pair_factor[None, :]
        out = out + gl.convert_layout(gl.sum(shift, axis=0), PER_ROW)[:, None]
    if partial < 0:
        out_ptrs = out_ptr + (query * OUT_STRIDE + head * D)[:, None] + channel[None, :]
        gl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), is_query[:, None])
    else:
        to = (partial + nth).to(gl.int64) * HEADS + head
        gl.store(partial_ptr + (to * D)[:, None] + channel[None, :], out, is_query[:, None])
        lse = gl.where(seen, peak + gl.log2(gl.where(seen, sums, 1.0)), float("-inf"))
        gl.store(lse_ptr + to, gl.convert_layout(lse, PER_ROW), is_query)
