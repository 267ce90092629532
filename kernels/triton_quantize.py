"""Quantization of activations to FP8 in Triton: alone, or at the end of a kernel that computes them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import QuantizedRows, Quantizer
from .triton_launch import kernel, wait_for_inputs


@triton.jit
def store_quantized(
    x: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    out_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    static_ptr: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
) -> None:
    """Stores ``x`` ``[BLOCK]``, the channels of ``row`` from ``start`` on, in e4m3, and a scale for each group.

    ``x`` is 0 beyond the ``SIZE`` channels of a row. ``GROUP`` divides ``BLOCK``. ``STATIC``: ``static_ptr`` holds the
    scale of all rows. Rows are the grid's first dimension.
    """
    GROUPS: tl.constexpr = BLOCK // GROUP
    groups = tl.reshape(x.to(tl.float32), [GROUPS, GROUP])
    if STATIC:
        scale = tl.full([GROUPS, 1], 0.0, tl.float32) + tl.load(static_ptr)
        inverse = tl.div_rn(tl.full([GROUPS, 1], 1.0, tl.float32), scale)
    else:
        magnitude = tl.maximum(tl.max(tl.abs(groups), axis=1, keep_dims=True), 1e-12)
        inverse = tl.div_rn(tl.full([GROUPS, 1], 448.0, tl.float32), magnitude)
        scale = magnitude * (1 / 448.0)
    values = groups * inverse
    if STATIC:  # NaN stays NaN: a request with such values ends with an error
        values = tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    channel = start + tl.arange(0, BLOCK)
    values = tl.reshape(values, [BLOCK]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * SIZE + channel, values, channel < SIZE)
    group = start // GROUP + tl.arange(0, GROUPS)
    tl.store(scales_ptr + group * tl.num_programs(0) + row, tl.reshape(scale, [GROUPS]), group < tl.cdiv(SIZE, GROUP))


@kernel(overlaps=True)
def _quantize(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    static_ptr: tl.tensor,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STATIC: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * STRIDE + channel, channel < SIZE, other=0.0)
    store_quantized(x, row, 0, out_ptr, scales_ptr, static_ptr, SIZE, BLOCK, GROUP, STATIC)


def quantize(x: Tensor, quantizer: Quantizer) -> QuantizedRows:
    """See `quantize.quantize`, for e4m3. Tokens may be strided."""
    tokens, size = x.shape
    block = triton.next_power_of_2(size)
    out = QuantizedOutput(tokens, size, block, quantizer, x.device)
    if tokens:
        constants = (size, x.stride(0), block, *out.constants)
        _quantize((tokens, 1, 1), (x, *out.tensors), (), constants, warps=row_warps(block))
    return out.rows


class QuantizedOutput:
    """Arguments of a kernel that ends in `store_quantized`: its tensors, and the constants ``GROUP`` and ``STATIC``."""

    def __init__(self, tokens: int, size: int, block: int, quantizer: Quantizer, device: torch.device) -> None:
        group = quantizer.group or block
        values = torch.empty((tokens, size), dtype=quantizer.dtype, device=device)
        self.rows = QuantizedRows(values, torch.empty((triton.cdiv(size, group), tokens), device=device).t())
        static = quantizer.scale
        self.tensors = (*self.rows, self.rows.scales if static is None else static)
        self.constants = (group, static is not None)


def row_warps(block: int) -> int:
    """Warps for rows of one program: 16 elements a thread, so that several accesses are in flight."""
    return min(max(block // 512, 4), 16)
