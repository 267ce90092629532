"""The operations of `ops` in Triton, each in one pass.

Every operation is bound by memory bandwidth, or at few tokens by the launch. So each is one kernel that reads its input
once, computes in float32 and rounds once; nothing but the result is allocated, and the host does not wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ops
from .addends import Addends
from .kv_pool import KVLayer
from .ops import Activation
from .quantize import QuantizedRows, Quantizer
from .triton_activation import gated
from .triton_fp8 import fp8_linear
from .triton_kv_write import write_quantized
from .triton_launch import kernel, start_next, wait_for_inputs
from .triton_quantize import QuantizedOutput, quantize, row_warps, store_quantized
from .triton_routing import route

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quantized",
    "apply_sinks",
    "copy_pages",
    "fp8_linear",
    "gate_mul",
    "gate_mul_quantized",
    "page_indices",
    "quantize",
    "rms_norm",
    "rope_write",
    "route",
]

PAIRS = 128  # of pages that are copied in one launch
TILE = 1024  # elements a program of 4 warps takes at a time: one 16-byte access of bfloat16 for each thread


@kernel("rows", overlaps=True)
def _rms_norm(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    start_next(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (channel < D)
    token, head = row // HEADS, row % HEADS
    x = tl.load(x_ptr + token * TOKEN_STRIDE + head * HEAD_STRIDE + channel, mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + head * WEIGHT_STRIDE + channel, channel < D, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + EPS)
    tl.store(out_ptr + row * D + channel, (x * scale * weight).to(out_ptr.dtype.element_ty), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`. The last dimension of ``x`` must be contiguous; tokens and heads may be strided."""
    shape, size = x.shape, x.shape[-1]
    if x.dim() not in (2, 3):
        x = x.reshape(-1, size)
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // size
    if not rows:
        return out
    heads, head_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    block = triton.next_power_of_2(size)
    some = max(1, TILE // block)
    _rms_norm(
        (triton.cdiv(rows, some), 1, 1),
        (x, weight, out),
        (rows,),
        (size, heads, x.stride(0), head_stride, size if weight.dim() > 1 else 0, eps, some, block),
        warps=row_warps(block),
    )
    return out


@kernel(overlaps=True)
def _add_rms_norm(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    static_ptr: tl.tensor,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    ADDENDS: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """``ADDENDS``: x is the sum of so many tensors, whose addresses ``x_ptr`` points at; 0: ``x_ptr`` is x itself."""
    if not GROUP:
        start_next(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < D
    residual_ptrs = residual_ptr + row * RESIDUAL_STRIDE + channel
    if ADDENDS:
        x = tl.zeros([BLOCK], tl.float32)
        for addend in tl.static_range(ADDENDS):
            address = tl.load(x_ptr + addend).to(tl.pointer_type(residual_ptr.dtype.element_ty))
            x += tl.load(tl.multiple_of(address, 16) + row * X_STRIDE + channel, mask, other=0.0).to(tl.float32)
        x = x.to(residual_ptr.dtype.element_ty).to(tl.float32)  # the sum that an all-reduce would give
    else:
        x = tl.load(x_ptr + row * X_STRIDE + channel, mask, other=0.0).to(tl.float32)
    total = tl.load(residual_ptrs, mask, other=0.0).to(tl.float32) + x
    rounded = total.to(residual_ptr.dtype.element_ty)
    tl.debug_barrier()  # several threads may read one element: all must have read it before one overwrites it
    tl.store(residual_ptrs, rounded, mask)
    total = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask, other=0.0)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / D + EPS)
    normed = (total * scale * weight).to(residual_ptr.dtype.element_ty)
    if GROUP:
        store_quantized(normed, row, 0, out_ptr, scales_ptr, static_ptr, D, BLOCK, GROUP, STATIC)
    else:
        tl.store(out_ptr + row * D + channel, normed, mask)


def add_rms_norm(x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.add_rms_norm`. Tokens may be strided."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _launch_add_rms_norm(x, residual, weight, eps, (out, out, out), (0, False))
    return out


def add_rms_norm_quantized(
    x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float, quantizer: Quantizer
) -> QuantizedRows:
    """See `ops.add_rms_norm_quantized`. Tokens may be strided."""
    tokens, size = residual.shape
    out = QuantizedOutput(tokens, size, triton.next_power_of_2(size), quantizer, residual.device)
    _launch_add_rms_norm(x, residual, weight, eps, out.tensors, out.constants)
    return out.rows


def _launch_add_rms_norm(
    x: Tensor | Addends,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    outputs: tuple[Tensor, ...],
    quantization: tuple[int, bool],
) -> None:
    tokens, size = residual.shape
    if tokens:
        block = triton.next_power_of_2(size)
        addends, first = (0, x) if isinstance(x, Tensor) else (len(x.tensors), x.tensors[0])
        constants = (size, first.stride(0), addends, residual.stride(0), eps, block, *quantization)
        start = x if isinstance(x, Tensor) else x.addresses
        _add_rms_norm((tokens, 1, 1), (start, residual, weight, *outputs), (), constants, warps=row_warps(block))


@kernel(overlaps=True)
def _gate_mul(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    static_ptr: tl.tensor,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    if not GROUP:
        start_next(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    channel = start + tl.arange(0, BLOCK)
    mask = channel < SIZE
    gate_ptrs = gate_up_ptr + row * STRIDE + channel
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + SIZE, mask, other=0.0).to(tl.float32)
    product = gated(gate, up, ACTIVATION).to(gate_up_ptr.dtype.element_ty)
    if GROUP:
        store_quantized(product, row, start, out_ptr, scales_ptr, static_ptr, SIZE, BLOCK, GROUP, STATIC)
    else:
        tl.store(out_ptr + row * SIZE + channel, product, mask)


def gate_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `ops.gate_mul`; computed in float32 and rounded once."""
    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    _launch_gate_mul(gate_up, activation, TILE, (out, out, out), (0, False))
    return out


def gate_mul_quantized(gate_up: Tensor, activation: Activation, quantizer: Quantizer) -> QuantizedRows:
    """See `ops.gate_mul_quantized`. A row that has one scale is one program."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    block = TILE if quantizer.group else triton.next_power_of_2(size)
    out = QuantizedOutput(tokens, size, block, quantizer, gate_up.device)
    _launch_gate_mul(gate_up, activation, block, out.tensors, out.constants)
    return out.rows


def _launch_gate_mul(
    gate_up: Tensor, activation: Activation, block: int, outputs: tuple[Tensor, ...], quantization: tuple[int, bool]
) -> None:
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    if tokens:
        constants = (size, gate_up.stride(0), activation, block, *quantization)
        _gate_mul((tokens, triton.cdiv(size, block), 1), (gate_up, *outputs), (), constants, warps=row_warps(block))


@triton.jit
def _head_scale(
    first: tl.tensor, second: tl.tensor, last: tl.tensor, HALF: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr
) -> tl.tensor:
    """RMSNorm's factor of each head, ``[HEADS, 1]``, whose channels are two or three tiles: see `_rope_write`."""
    squares = tl.sum(first * first, axis=1, keep_dims=True) + tl.sum(second * second, axis=1, keep_dims=True)
    if 2 * HALF < D:
        last = last.to(tl.float32)
        squares += tl.sum(last * last, axis=1, keep_dims=True)
    return tl.rsqrt(squares / D + EPS)


@kernel("num_slots", overlaps=True)
def _rope_write(
    qkv_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    static_ptr: tl.tensor,
    num_slots: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    COS_STRIDE: tl.constexpr,
    SIN_STRIDE: tl.constexpr,
    NORM: tl.constexpr,
    NORM_ROTATED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RECORD: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    ROTATE: tl.constexpr,
    STATIC: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    """One token, some of its heads. The rotated channels are two tiles: each thread has both ends of its pairs."""
    if RECORD is None:
        start_next(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    is_head = head < HEADS + 2 * KV_HEADS
    rotated = head < HEADS + KV_HEADS
    pairs, rests = is_head & (pair < HALF), is_head & (rest < D)
    base = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * D) + head * D
    first = tl.load(base + pair, pairs, other=0.0)
    second = tl.load(base + HALF + pair, pairs, other=0.0)
    last = first
    if 2 * HALF < D:
        last = tl.load(base + rest, rests, other=0.0)
    x1, x2 = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        weight = norm_ptr + head * D
        weight1 = tl.load(weight + pair, rotated & pairs, other=0.0)
        weight2 = tl.load(weight + HALF + pair, rotated & pairs, other=0.0)
        if not NORM_ROTATED:  # rounded before the rotation, as when the two are separate operations
            scale = _head_scale(x1, x2, last, HALF, D, EPS)
            x1 = (x1 * scale * weight1).to(first.dtype).to(tl.float32)
            x2 = (x2 * scale * weight2).to(first.dtype).to(tl.float32)
    cos = tl.load(cos_ptr + token * COS_STRIDE + pair, pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * SIN_STRIDE + pair, pair < HALF, other=0.0)
    first = tl.where(rotated, (x1 * cos - x2 * sin).to(first.dtype), first)
    second = tl.where(rotated, (x2 * cos + x1 * sin).to(second.dtype), second)
    if NORM:
        if NORM_ROTATED:
            x1, x2 = first.to(tl.float32), second.to(tl.float32)
            scale = _head_scale(x1, x2, last, HALF, D, EPS)
            first = tl.where(rotated, (x1 * scale * weight1).to(first.dtype), first)
            second = tl.where(rotated, (x2 * scale * weight2).to(second.dtype), second)
        if 2 * HALF < D:
            normed = last.to(tl.float32) * scale * tl.load(weight + rest, rotated & rests, other=0.0)
            last = tl.where(rotated, normed.to(last.dtype), last)

    tl.debug_barrier()  # as in `_add_rms_norm`
    tl.store(base + pair, first, rotated & pairs)
    tl.store(base + HALF + pair, second, rotated & pairs)
    if 2 * HALF < D and NORM:
        tl.store(base + rest, last, rotated & rests)
    slot = tl.load(slots_ptr + token)
    if RECORD is None:
        is_kv = head >= HEADS
        kv_head = tl.where(is_kv, head - HEADS, 0)
        slot += (kv_head // KV_HEADS) * num_slots.to(tl.int64)
        target = pool_ptr + (slot * KV_HEADS + kv_head % KV_HEADS) * D
        tl.store(target + pair, first.to(pool_ptr.dtype.element_ty), is_kv & pairs)
        tl.store(target + HALF + pair, second.to(pool_ptr.dtype.element_ty), is_kv & pairs)
        if 2 * HALF < D:
            tl.store(target + rest, last.to(pool_ptr.dtype.element_ty), is_kv & rests)
    else:  # read again: quantization needs all channels of a head in one tile
        tl.debug_barrier()
        token_ptr = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * D)
        heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        write_quantized(
            token_ptr, heads, slot, pool_ptr, static_ptr, HEADS, KV_HEADS, D, PAGE_SIZE, RECORD, K_FORMAT, V_FORMAT,
            ROTATE, STATIC, BLOCK_HEADS,
        )  # fmt: skip


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
    """See `ops.rope_write`. In place: what is returned are views of ``qkv``. ``qkv`` is contiguous."""
    tokens, all_heads, size = qkv.shape
    kv_heads, half = (all_heads - heads) // 2, cos.shape[1]
    if tokens:
        block_half = max(16, triton.next_power_of_2(half))
        block_heads = max(1, min(TILE // block_half, triton.next_power_of_2(all_heads)))
        block_rest = triton.next_power_of_2(max(1, size - 2 * half))
        constants = (
            *(heads, kv_heads, size, half, cos.stride(0), sin.stride(0)),
            *(qk_norm is not None, norm_rotated, eps, block_heads, block_half, block_rest),
            *(kv.k.shape[1], _record(kv), kv.k_format.name, kv.v_format.name),
            *(kv.k_format.rotates_keys, kv.static_scales is not None),
        )
        _rope_write(
            (tokens, triton.cdiv(all_heads, block_heads), 1),
            (
                *(qkv, cos, sin, kv.k, slots, cos if qk_norm is None else qk_norm),
                cos if kv.static_scales is None else kv.static_scales,
            ),
            (kv.k.shape[0] * kv.k.shape[1],),
            constants,
            warps=4,
        )
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def _record(kv: KVLayer) -> tuple[int, ...] | None:
    """As `triton_kv_write.write_quantized` takes it."""
    if kv.record is None:
        return None
    return (*kv.record, *(x.shape[-1] * x.element_size() for x in (kv.k, kv.v, kv.k_scales, kv.v_scales)))


@kernel(overlaps=True)
def _apply_sinks(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    channel = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + token * HEADS + head, head < HEADS, other=0.0)
    sink = tl.load(sinks_ptr + head, head < HEADS, other=0.0) * 1.4426950408889634
    scale = 1.0 / (1.0 + tl.exp2(sink - lse))
    mask = (head < HEADS)[:, None] & (channel < D)[None, :]
    out_ptrs = out_ptr + token * OUT_STRIDE + (head * D)[:, None] + channel[None, :]
    out = tl.load(out_ptrs, mask, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask)


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """See `ops.apply_sinks`."""
    tokens, heads, size = out.shape
    if tokens:
        block_d = triton.next_power_of_2(size)
        block_h = max(1, TILE // block_d)
        constants = heads, size, out.stride(0), block_h, block_d
        _apply_sinks((tokens, triton.cdiv(heads, block_h), 1), (out, lse, sinks), (), constants, warps=4)


@kernel("count")
def _copy_words(
    pages_ptr: tl.tensor,
    copies_ptr: tl.tensor,
    count: tl.tensor,
    ROW_STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The same words of all pages of one row, so that no other program writes what this one reads."""
    pair, word = tl.arange(0, PAIRS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_pair = pair < count
    source = tl.load(copies_ptr + 2 * pair, is_pair, other=0)
    destination = tl.load(copies_ptr + 2 * pair + 1, is_pair, other=0)
    row = pages_ptr + tl.program_id(1).to(tl.int64) * ROW_STRIDE
    mask = is_pair[:, None] & (word < WORDS)[None, :]
    words = tl.load(row + (source * WORDS)[:, None] + word[None, :], mask)
    tl.debug_barrier()  # all are read
    tl.store(row + (destination * WORDS)[:, None] + word[None, :], words, mask)


def copy_pages(pages: Tensor, copies: Tensor) -> None:
    """See `ops.copy_pages`. In one launch, unless there are many: torch takes two for each layer, as it indexes with 32
    bits."""
    rows, _, size = pages.shape
    count, block = len(copies), TILE // PAIRS * 8
    if count > PAIRS or size % 4:
        ops.copy_pages(pages, copies)
    elif count:
        words = pages.view(torch.int32)
        grid = triton.cdiv(size // 4, block), rows, 1
        _copy_words(grid, (words, copies), (count,), (words.stride(0), size // 4, PAIRS, block), warps=4)


@kernel()
def _page_indices(
    table_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    indptr_ptr: tl.tensor,
    out_ptr: tl.tensor,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    request = tl.program_id(0)
    start, end = tl.load(indptr_ptr + request), tl.load(indptr_ptr + request + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < end - start
    row = tl.load(rows_ptr + request).to(tl.int64)
    tl.store(out_ptr + start + column, tl.load(table_ptr + row * STRIDE + column, mask), mask)


def page_indices(table: Tensor, rows: Tensor, indptr: Tensor, max_pages: int, out: Tensor) -> None:
    """See `ops.page_indices`. The grid depends on the number of rows and on ``max_pages`` alone."""
    if len(rows) and max_pages:
        grid = (len(rows), triton.cdiv(max_pages, TILE), 1)
        _page_indices(grid, (table, rows, indptr, out), (), (table.stride(0), TILE), warps=4)
