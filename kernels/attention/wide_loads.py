"""Loads tiles of keys and values into shared memory for `wide_kernel`, in Gluon: what its third group of warps does.

A ring holds tiles of keys and values. ``k_full`` and ``v_full`` say that a slot's keys or values are there, and
``empty`` that both groups that attend are done with them. fp8 values are copied to a ring of their own first, and
become float16 on the way to this one. ``lines`` are the words with the scales of a tile's tokens (see `kv_pool`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .split import ITEM_FIELDS

SLOTS = gl.constexpr(6)  # tiles of keys, and of values, in shared memory
IN_FLIGHT = gl.constexpr(3)  # of them on their way from global memory
_ITEM_FIELDS = gl.constexpr(ITEM_FIELDS)


@gluon.jit
def item_range(
    items_ptr: gl.tensor,
    queries_ptr: gl.tensor,
    positions_ptr: gl.tensor,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """An item's keys ``start … stop - 1``; every query sees those before the third result."""
    item = items_ptr + gl.program_id(1) * _ITEM_FIELDS
    first, num_queries, start = gl.load(item + 1), gl.load(item + 2), gl.load(item + 3)
    stop, full = gl.load(item + 4), gl.load(item + 5)
    nth = gl.arange(0, BLOCK_M, LAYOUT) // GROUP
    is_query = nth < num_queries
    query = gl.load(queries_ptr + first + nth, is_query, other=0)
    position = gl.load(positions_ptr + query, is_query, other=-1)
    nearest = gl.min(gl.where(is_query, position, 2147483647), axis=0)
    stop = gl.minimum(stop, gl.max(position, axis=0) + 1)
    return start, stop, gl.minimum(full, nearest + 1)


@gluon.jit
def _pages(
    table_ptr: gl.tensor, at: gl.tensor, last: gl.tensor, PAGE_SIZE: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr
) -> gl.tensor:
    """Pages of keys ``at … at + N - 1``; ``last``'s of those beyond it."""
    return gl.load(table_ptr + gl.minimum(at + gl.arange(0, N, LAYOUT), last) // PAGE_SIZE)


@gluon.jit
def _offsets(
    page: gl.tensor,
    at: gl.tensor,
    last: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    STRIDES: gl.constexpr,
    FIRST: gl.constexpr,
    N: gl.constexpr,
    LAYOUT: gl.constexpr,
) -> gl.tensor:
    """Where those keys are. STRIDES[FIRST] lie between pages, the next between tokens."""
    within = gl.minimum(at + gl.arange(0, N, LAYOUT), last) % PAGE_SIZE
    return page.to(gl.int64) * STRIDES[FIRST] + within * STRIDES[FIRST + 1]


@gluon.jit
def load_tiles(
    k_ptr: gl.tensor,
    v_ptr: gl.tensor,
    scales_ptr: gl.tensor,
    table_ptr: gl.tensor,
    items_ptr: gl.tensor,
    queries_ptr: gl.tensor,
    positions_ptr: gl.tensor,
    rings: gl.tuple,
    raw_values: gl.shared_memory_descriptor,
    PAGE_SIZE: gl.constexpr,
    STRIDES: gl.constexpr,
    TABLE_STRIDE: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    FP8: gl.constexpr,
) -> None:
    """Copies tiles into the rings. Groups of copies are one a tile, of which some stay in flight."""
    k_ring, v_ring, lines, k_full, v_full, empty = rings
    RUN: gl.constexpr = 16 if FP8 else 8  # elements that one copy moves
    COPY: gl.constexpr = gl.BlockedLayout([1, RUN], [32 * RUN // D, D // RUN], [gl.num_warps(), 1], [1, 0])
    WIDEN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    TOKEN: gl.constexpr = gl.SliceLayout(1, COPY)
    start, stop, _ = item_range(items_ptr, queries_ptr, positions_ptr, GROUP, BLOCK_M, LINE)
    last = gl.maximum(stop - 1, 0)
    tiles = gl.maximum(stop - 1 - start, 0) // N + 1
    kv_head = gl.program_id(0)
    pages = table_ptr + gl.load(items_ptr + gl.program_id(1) * _ITEM_FIELDS).to(gl.int64) * TABLE_STRIDE
    k_head, v_head = k_ptr + kv_head * STRIDES[2], v_ptr + kv_head * STRIDES[5]
    scales = scales_ptr + kv_head * STRIDES[8]
    if FP8:
        k_head = k_head.to(gl.pointer_type(gl.float8e4nv), bitcast=True)
    channel = gl.arange(0, D, gl.SliceLayout(0, COPY))[None, :]
    page, page_of_line = _pages(pages, start, last, PAGE_SIZE, N, TOKEN), _pages(pages, start, last, PAGE_SIZE, N, LINE)
    for nth in range(tiles + IN_FLIGHT):
        if nth < tiles:
            at, slot = start + nth * N, nth % SLOTS
            keys = k_head + _offsets(page, at, last, PAGE_SIZE, STRIDES, 0, N, TOKEN)
            values = v_head + _offsets(page, at, last, PAGE_SIZE, STRIDES, 3, N, TOKEN)
            mbarrier.wait(empty.index(slot), nth // SLOTS & 1 ^ 1)
            async_copy.async_copy_global_to_shared(k_ring.index(slot), keys[:, None] + channel)
            if FP8:
                words = scales + _offsets(page_of_line, at, last, PAGE_SIZE, STRIDES, 6, N, LINE)
                words = words.to(gl.pointer_type(gl.int32), bitcast=True)
                async_copy.async_copy_global_to_shared(lines.index(slot), words)
                raw = raw_values.index(nth % (IN_FLIGHT + 1))
                async_copy.async_copy_global_to_shared(raw, values[:, None] + channel)
                page_of_line = _pages(pages, at + N, last, PAGE_SIZE, N, LINE)
            else:
                async_copy.async_copy_global_to_shared(v_ring.index(slot), values[:, None] + channel)
            page = _pages(pages, at + N, last, PAGE_SIZE, N, TOKEN)
        async_copy.commit_group()
        async_copy.wait_group(IN_FLIGHT)
        fence_async_shared()
        if nth >= IN_FLIGHT:
            landed = nth - IN_FLIGHT
            slot = landed % SLOTS
            mbarrier.arrive(k_full.index(slot), count=1)
            if FP8:
                data = raw_values.index(landed % (IN_FLIGHT + 1)).load(WIDEN)
                v_ring.index(slot).store(data.to(gl.float8e4nv, bitcast=True).to(gl.float16))
                fence_async_shared()
            mbarrier.arrive(v_full.index(slot), count=1)
