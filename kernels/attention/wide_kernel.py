"""Attention of many query rows over the same keys, in Gluon, for Hopper: the widest tile of tree attention.

`triton_kernels.attend` with the same arguments and results. There a program loads, multiplies and takes exponentials in
turn. Here 4 warps load (`wide_loads`) and two groups of 4 warps attend, for half of the rows each (FlashAttention-3:
Shah et al., 2024): the softmax of one runs while tensor cores multiply for the other. A group starts the product of its
next scores together with that of its last weights and the values.

fp8 keys are multiplied as they are stored. A query, divided by its largest channel, is the sum of two e4m3 numbers,
which together hold about as many bits as bfloat16: the error of that is a twentieth or less of what storing keys and
values in fp8 costs. fp8 values are widened to float16, because tensor cores transpose operands of 16 bits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..kv_pool import KVLayout
from ..triton_launch import kernel
from .split import ITEM_FIELDS
from .wide_loads import IN_FLIGHT, SLOTS, item_range, load_tiles

KEYS = 64  # of a tile
WARPS = 4  # of each of the three groups
_LOG2_E = gl.constexpr(1.4426950408889634)
_ITEM_FIELDS = gl.constexpr(ITEM_FIELDS)
_E4M3_MAX = gl.constexpr(448.0)
# Probabilities are times 2^8, which cancels out: times a scale of values they would often be subnormal in float16.
_SHIFT = gl.constexpr(8.0)


def fits(layout: KVLayout) -> bool:
    """Whether `attend_wide` reads such pages: those with which it was compared with float64 on a device."""
    fp8 = layout.k_format.name == layout.v_format.name == "fp8" and layout.page_size % 16 == 0
    return layout.head_dim == 128 and layout.dtype.itemsize == 2 and (fp8 or not layout.quantized)


def runs_on(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU, which has products of whole groups of warps."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


class _WithoutCounts:
    """A builder whose warp specializations keep no register counts."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def create_warp_specialize(self, *arguments: Any) -> Any:
        return _WithoutCounts(self._wrapped.create_warp_specialize(*arguments))

    def set_requested_registers(self, counts: list[int]) -> None:
        pass


@builtin
def _specialize(
    functions_and_args: list[tuple[Callable[..., None], Any]],
    worker_num_warps: list[int],
    _semantic: Any = None,
    _generator: Any = None,
) -> None:
    """`gl.warp_specialize` with as many registers for each warp, as Triton 3.7 does by default. Triton 3.6 demands
    counts for each group; the assembler then takes registers to be too few and lets products wait for one another."""
    builder = _semantic.builder
    _semantic.builder = _WithoutCounts(builder)
    try:
        _semantic.warp_specialize(functions_and_args, worker_num_warps, [0] * len(worker_num_warps), _generator)
    finally:
        _semantic.builder = builder


@gluon.jit
def _softmax(
    scores: gl.tensor,
    peak: gl.tensor,
    total: gl.tensor,
    at: gl.tensor,
    highest: gl.tensor,
    factor: gl.tensor,
    MASKED: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """A tile's unnormalized probabilities, and what earlier sums are to be multiplied by. Row i sees no key above
    ``highest[i]``."""
    if MASKED:
        key = at + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] <= highest[:, None], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, axis=1) * factor - _SHIFT)
    safe = new_peak
    if MASKED:  # a row that has seen no key yet
        safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    probs = gl.exp2(scores * factor[:, None] - safe[:, None])
    alpha = gl.exp2(peak - safe)
    return probs, alpha, new_peak, total * alpha + gl.sum(probs, axis=1)


@gluon.jit
def _multiply_keys(
    q: gl.shared_memory_descriptor,
    q_rest: gl.shared_memory_descriptor,
    keys: gl.shared_memory_descriptor,
    M: gl.constexpr,
    N: gl.constexpr,
    SCORES: gl.constexpr,
    FP8: gl.constexpr,
) -> gl.tensor:
    """Starts the product that `warpgroup_mma_wait` waits for."""
    zeros = gl.zeros([M, N], gl.float32, SCORES)
    scores = warpgroup_mma(q, keys.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if FP8:
        scores = warpgroup_mma(q_rest, keys.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _scale_scores(
    scores: gl.tensor, lines: gl.shared_memory_descriptor, slot: gl.tensor, FP8: gl.constexpr
) -> gl.tensor:
    """Times the keys' scales."""
    if FP8:
        words = lines.index(slot).load(gl.SliceLayout(0, scores.type.layout))
        scores = scores * (words << 16).to(gl.float32, bitcast=True)[None, :]
    return scores


@gluon.jit
def _scale_probs(probs: gl.tensor, lines: gl.shared_memory_descriptor, slot: gl.tensor, FP8: gl.constexpr) -> gl.tensor:
    """Times the values' scales."""
    if FP8:
        words = lines.index(slot).load(gl.SliceLayout(0, probs.type.layout))
        probs = probs * (words & -65536).to(gl.float32, bitcast=True)[None, :]
    return probs


@gluon.jit
def _attend_tiles(
    scores: gl.tensor,
    acc: gl.tensor,
    peak: gl.tensor,
    total: gl.tensor,
    start: gl.tensor,
    at: gl.tensor,
    stop: gl.tensor,
    q: gl.shared_memory_descriptor,
    q_rest: gl.shared_memory_descriptor,
    highest: gl.tensor,
    factor: gl.tensor,
    rings: gl.tuple,
    M: gl.constexpr,
    N: gl.constexpr,
    MASKED: gl.constexpr,
    FP8: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Online softmax over keys ``at … stop - 1``, tile by tile from the item's ``start`` on.

    ``scores`` are those of the first tile, and on return those of the tile after the last.
    """
    k_ring, v_ring, lines, k_full, v_full, empty = rings
    SCORES: gl.constexpr = scores.type.layout
    ACC: gl.constexpr = acc.type.layout
    values = warpgroup_mma_init(acc)
    for tile in range(at, stop, N):
        nth = (tile - start) // N
        slot, next_slot = nth % SLOTS, (nth + 1) % SLOTS
        probs, alpha, peak, total = _softmax(scores, peak, total, tile, highest, factor, MASKED)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, ACC))
        mbarrier.wait(k_full.index(next_slot), (nth + 1) // SLOTS & 1)
        mbarrier.wait(v_full.index(slot), nth // SLOTS & 1)
        # A product reads its weights from registers until it is waited for: the next ones are not made before.
        acc, probs = warpgroup_mma_wait(0, [values, probs])
        probs = _scale_probs(probs, lines, slot, FP8)
        weights = gl.convert_layout(probs.to(v_ring.dtype), gl.DotOperandLayout(0, ACC, 2))
        acc = acc * alpha[:, None]
        next_scores = _multiply_keys(q, q_rest, k_ring.index(next_slot), M, N, SCORES, FP8)
        values = warpgroup_mma(weights, v_ring.index(slot), acc, is_async=True)
        mbarrier.arrive(empty.index((nth + SLOTS - 1) % SLOTS), count=1, pred=nth > 0)
        scores = _scale_scores(warpgroup_mma_wait(1, [next_scores]), lines, next_slot, FP8)
    return scores, warpgroup_mma_wait(0, [values]), peak, total


@gluon.jit
def _attend_rows(
    q_ptr: gl.tensor,
    items_ptr: gl.tensor,
    queries_ptr: gl.tensor,
    positions_ptr: gl.tensor,
    out_ptr: gl.tensor,
    partial_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    q: gl.shared_memory_descriptor,
    q_rest: gl.shared_memory_descriptor,
    rings: gl.tuple,
    PART: gl.constexpr,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    OUT_STRIDE: gl.constexpr,
    SCALE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    FP8: gl.constexpr,
) -> None:
    """The item's rows of one group of warps, from PART halves of BLOCK_M on."""
    k_ring, v_ring, lines, k_full, v_full, _ = rings
    M: gl.constexpr = BLOCK_M // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 32 if FP8 else 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    PER_SCORE: gl.constexpr = gl.SliceLayout(1, SCORES)
    PER_OUT: gl.constexpr = gl.SliceLayout(1, ACC)
    item = items_ptr + gl.program_id(1) * _ITEM_FIELDS
    first, num_queries = gl.load(item + 1), gl.load(item + 2)
    start, stop, full = item_range(items_ptr, queries_ptr, positions_ptr, GROUP, BLOCK_M, PER_SCORE)
    kv_head = gl.program_id(0)

    row = PART * M + gl.arange(0, M, gl.SliceLayout(1, LOAD))
    is_query = row // GROUP < num_queries
    query = gl.load(queries_ptr + first + row // GROUP, is_query, other=0).to(gl.int64)
    channel = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    q_ptrs = q_ptr + (query * Q_STRIDE + (kv_head * GROUP + row % GROUP) * D)[:, None] + channel[None, :]
    loaded = gl.load(q_ptrs, is_query[:, None], other=0.0)
    if FP8:
        scaled = loaded.to(gl.float32)
        largest = gl.maximum(gl.max(gl.abs(scaled), axis=1), 1e-30)
        scaled = scaled * (_E4M3_MAX / largest)[:, None]
        rounded = scaled.to(gl.float8e4nv)
        q.store(rounded)
        q_rest.store((scaled - rounded.to(gl.float32)).to(gl.float8e4nv))
        factor = gl.convert_layout(largest * (SCALE * _LOG2_E / _E4M3_MAX), PER_SCORE)
    else:
        q.store(loaded)
        factor = gl.full([M], SCALE * _LOG2_E, gl.float32, PER_SCORE)
    fence_async_shared()

    row = PART * M + gl.arange(0, M, PER_SCORE)
    is_query = row // GROUP < num_queries
    query_of = gl.load(queries_ptr + first + row // GROUP, is_query, other=0)
    highest = gl.minimum(gl.load(positions_ptr + query_of, is_query, other=-1), stop - 1)
    acc = gl.zeros([M, D], gl.float32, ACC)
    peak = gl.full([M], float("-inf"), gl.float32, PER_SCORE)
    total = gl.zeros([M], gl.float32, PER_SCORE)
    final = start + gl.maximum(stop - 1 - start, 0) // N * N  # where the last tile begins
    middle = gl.minimum(start + gl.maximum(full - start, 0) // N * N, final)  # tiles before it need no mask
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma_wait(0, [_multiply_keys(q, q_rest, k_ring.index(0), M, N, SCORES, FP8)])
    scores = _scale_scores(scores, lines, 0, FP8)
    scores, acc, peak, total = _attend_tiles(
        scores, acc, peak, total, start, start, middle, q, q_rest, highest, factor, rings, M, N, False, FP8
    )
    scores, acc, peak, total = _attend_tiles(
        scores, acc, peak, total, start, middle, final, q, q_rest, highest, factor, rings, M, N, True, FP8
    )
    nth = (final - start) // N
    slot = nth % SLOTS
    probs, alpha, peak, total = _softmax(scores, peak, total, final, highest, factor, True)
    probs = _scale_probs(probs, lines, slot, FP8)
    weights = gl.convert_layout(probs.to(v_ring.dtype), gl.DotOperandLayout(0, ACC, 2))
    mbarrier.wait(v_full.index(slot), nth // SLOTS & 1)
    acc = warpgroup_mma(weights, v_ring.index(slot), acc * gl.convert_layout(alpha, PER_OUT)[:, None])

    # Loaded again: the loops leave no registers.
    first, num_queries, partial = gl.load(item + 1), gl.load(item + 2), gl.load(item + 6)
    row = PART * M + gl.arange(0, M, PER_OUT)
    nth_query, head = row // GROUP, kv_head * GROUP + row % GROUP
    is_query = nth_query < num_queries
    channel = gl.arange(0, D, gl.SliceLayout(0, ACC))
    seen = total > 0.0
    sums = gl.where(seen, total, 1.0)
    acc = acc * gl.convert_layout(1.0 / sums, PER_OUT)[:, None]
    if partial < 0:
        to = gl.load(queries_ptr + first + nth_query, is_query, other=0).to(gl.int64) * OUT_STRIDE + head * D
        gl.store(out_ptr + to[:, None] + channel[None, :], acc.to(out_ptr.dtype.element_ty), is_query[:, None])
    else:
        to = (partial + nth_query).to(gl.int64) * HEADS + head
        gl.store(partial_ptr + (to * D)[:, None] + channel[None, :], acc, is_query[:, None])
        lse = gl.where(seen, peak + gl.log2(sums), float("-inf"))
        gl.store(lse_ptr + to, gl.convert_layout(lse, PER_OUT), is_query)


@kernel(jit=gluon.jit)
def attend_wide(
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
    """One `split.ITEM`, one key head, as `triton_kernels.attend`. BLOCK_M: 128; BLOCK_N: KEYS; launched with WARPS.

    Layers with SOFTCAP, WINDOW or SINKS are left to `attend`.
    """
    GROUP: gl.constexpr = HEADS // KV_HEADS
    FP8: gl.constexpr = K_FORMAT == "fp8"
    M: gl.constexpr = BLOCK_M // 2
    if gl.load(items_ptr + gl.program_id(1) * _ITEM_FIELDS + 2) == 0:
        return
    k_dtype: gl.constexpr = gl.float8e4nv if FP8 else k_ptr.dtype.element_ty
    v_dtype: gl.constexpr = gl.float16 if FP8 else v_ptr.dtype.element_ty
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], k_dtype)
    VALUES_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], v_dtype)
    QUERIES_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, D], k_dtype)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_ring = gl.allocate_shared_memory(k_dtype, [SLOTS, BLOCK_N, D], KEYS_LAYOUT)
    v_ring = gl.allocate_shared_memory(v_dtype, [SLOTS, BLOCK_N, D], VALUES_LAYOUT)
    q = gl.allocate_shared_memory(k_dtype, [2, M, D], QUERIES_LAYOUT)
    lines = gl.allocate_shared_memory(gl.int32, [SLOTS, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_rest, raw_values = q, v_ring
    if FP8:
        q_rest = gl.allocate_shared_memory(k_dtype, [2, M, D], QUERIES_LAYOUT)
        RAW_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
        raw_values = gl.allocate_shared_memory(gl.uint8, [IN_FLIGHT + 1, BLOCK_N, D], RAW_LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    rings = (k_ring, v_ring, lines, k_full, v_full, empty)
    _specialize(
        [
            (
                _attend_rows,
                (q_ptr, items_ptr, queries_ptr, positions_ptr, out_ptr, partial_ptr, lse_ptr, q.index(0),
                 q_rest.index(0), rings, gl.constexpr(0), HEADS, GROUP, Q_STRIDE, OUT_STRIDE, SCALE, BLOCK_M, BLOCK_N,
                 D, FP8),
            ),
            (
                _attend_rows,
                (q_ptr, items_ptr, queries_ptr, positions_ptr, out_ptr, partial_ptr, lse_ptr, q.index(1),
                 q_rest.index(1), rings, gl.constexpr(1), HEADS, GROUP, Q_STRIDE, OUT_STRIDE, SCALE, BLOCK_M, BLOCK_N,
                 D, FP8),
            ),
            (
                load_tiles,
                (k_ptr, v_ptr, k_scales_ptr, table_ptr, items_ptr, queries_ptr, positions_ptr, rings, raw_values,
                 PAGE_SIZE, STRIDES, TABLE_STRIDE, GROUP, BLOCK_M, BLOCK_N, D, FP8),
            ),
        ],
        [4, 4],
    )  # fmt: skip
