"""Mixtures of experts in Triton: two products and a weighted sum, over weights as they are stored.

A step of few tokens is bound by reading the experts' weights. As in `triton_fp8`, tiles of the weight are the left
operand, so that tensor cores work on 64 or more output channels however few tokens an expert has. Weights in FP8 and
MXFP4 are widened in registers: half and a quarter of the bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts import ExpertWeight
from .ops import Activation
from .quantize import MXFP4_BLOCK
from .triton_activation import gated
from .triton_fp8 import store_rows
from .triton_launch import kernel
from .triton_routing import Alignment

_HALF = MXFP4_BLOCK // 2
MANY_TOKENS = 2048  # of a step


class Tile(NamedTuple):
    """How products are cut into programs."""

    outputs: int  # output channels of a program; for gate and up: of each
    rows: int  # tokens of an expert
    inputs: int  # input channels of an iteration
    warps: int
    stages: int


def interleave_mxfp4(values: Tensor) -> Tensor:
    """MXFP4 values uint8 ``[N, K / 2]``, in blocks of 16 bytes, with inputs i and i + 16 of a block in byte i rather
    than inputs 2i and 2i + 1: the low and the high bits of a tile then meet inputs that are neighbours in memory."""
    blocks = values.unflatten(1, (-1, _HALF))
    even, odd = blocks & 0xF, blocks >> 4
    inputs = torch.stack([even, odd], dim=-1).flatten(2)
    return (inputs[..., :_HALF] | (inputs[..., _HALF:] << 4)).flatten(1)


@triton.jit
def _load_inputs(x_ptr: tl.tensor, k: tl.tensor, valid: tl.tensor, K: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """``[len(k), rows]``: inputs k of rows that begin at ``x_ptr`` ``[1, rows]``."""
    mask = valid[None, :]
    if MASKED:
        mask = mask & (k < K)[:, None]
    return tl.load(x_ptr + k[:, None], mask, other=0.0)


@triton.jit
def _widen(code: tl.tensor, factor: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """e2m1 codes times ``factor``: as bits of float16, exponent and mantissa of e2m1 are its value times 2 ** -14."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * factor).to(dtype)


@triton.jit
def _multiply(
    acc: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row: tl.tensor,
    at: tl.tensor,
    x: tl.tensor,
    x_high: tl.tensor,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> tl.tensor:
    """Adds the product of rows ``row`` of the weight with inputs ``at … at + INPUTS - 1``. ``x_high``: of MXFP4."""
    if FORMAT == "mxfp4":
        byte = at // 2 + tl.arange(0, INPUTS // 2)
        block = at // 32 + tl.arange(0, INPUTS // 32)
        if MASKED:
            codes = tl.load(w_ptr + row[:, None] * (K // 2) + byte[None, :], (byte < K // 2)[None, :], other=0)
            scale = tl.load(scale_ptr + row[:, None] * (K // 32) + block[None, :], (block < K // 32)[None, :], other=0)
        else:
            codes = tl.load(w_ptr + row[:, None] * (K // 2) + byte[None, :])
            scale = tl.load(scale_ptr + row[:, None] * (K // 32) + block[None, :])
        factor = ((scale.to(tl.int32) + 14) << 23).to(tl.float32, bitcast=True)
        factor = tl.broadcast_to(factor[:, :, None], [OUTPUTS, INPUTS // 32, 16]).reshape(OUTPUTS, INPUTS // 2)
        codes = codes.to(tl.int32)
        acc = tl.dot(_widen(codes & 15, factor, x.dtype), x, acc, input_precision=PRECISION)
        acc = tl.dot(_widen(codes >> 4, factor, x.dtype), x_high, acc, input_precision=PRECISION)
    else:
        k = at + tl.arange(0, INPUTS)
        if MASKED:
            weight = tl.load(w_ptr + row[:, None] * K + k[None, :], (k < K)[None, :], other=0.0)
        else:
            weight = tl.load(w_ptr + row[:, None] * K + k[None, :])
        if FORMAT == "block":  # OUTPUTS and INPUTS divide 128 × 128: an iteration has one scale
            scale = tl.load(scale_ptr + tl.min(row, axis=0) // 128 * (K // 128) + at // 128)
            acc += tl.dot(weight.to(x.dtype), x, input_precision=PRECISION) * scale
        else:
            acc = tl.dot(weight.to(x.dtype), x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(
    acc: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    row: tl.tensor,
    FORMAT: tl.constexpr,
    BIAS: tl.constexpr,
) -> tl.tensor:
    if FORMAT == "channel":
        acc *= tl.load(scale_ptr + row)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    return acc


@kernel()
def _expert_products(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    order_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
) -> None:
    """Some output channels of one block of `Alignment`.

    With an ACTIVATION, x has the tokens, and the weight of an expert has N rows of gate and N of up. Without one, x is
    in order of the experts, and its weight has N rows. The output ``[T * k, N]`` is in order of the experts.
    """
    block = tl.program_id(1)
    expert = tl.load(blocks_ptr + 2 * block)
    if expert < 0:
        return
    first, end = tl.load(blocks_ptr + 2 * block + 1), tl.load(ends_ptr + expert)
    place = first + tl.arange(0, ROWS)
    valid = place < end
    source = place if ACTIVATION == "" else tl.load(order_ptr + place, valid, other=0) // TOP_K
    x_rows = x_ptr + source.to(tl.int64)[None, :] * K
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    # Beyond the edge the last channel is read again, which needs no mask in the loop.
    channel = tl.minimum(n, N - 1).to(tl.int64)
    GATED: tl.constexpr = 1 if ACTIVATION == "" else 2
    row = expert.to(tl.int64) * (GATED * N) + channel
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    MASKED: tl.constexpr = K % INPUTS != 0
    for at in range(0, K, INPUTS):
        if FORMAT == "mxfp4":
            half = tl.arange(0, INPUTS // 2)
            k = at + half // 16 * 32 + half % 16
            x = _load_inputs(x_rows, k, valid, K, MASKED)
            x_high = _load_inputs(x_rows, k + 16, valid, K, MASKED)
        else:
            x = _load_inputs(x_rows, at + tl.arange(0, INPUTS), valid, K, MASKED)
            x_high = x
        acc = _multiply(acc, w_ptr, scale_ptr, row, at, x, x_high, K, FORMAT, MASKED, PRECISION, OUTPUTS, INPUTS)
        if ACTIVATION != "":
            up = _multiply(up, w_ptr, scale_ptr, row + N, at, x, x_high, K, FORMAT, MASKED, PRECISION, OUTPUTS, INPUTS)
    acc = _finish(acc, scale_ptr, bias_ptr, row, FORMAT, BIAS)
    if ACTIVATION != "":
        acc = gated(acc, _finish(up, scale_ptr, bias_ptr, row + N, FORMAT, BIAS), ACTIVATION)
    store_rows(tl.trans(acc), out_ptr, place.to(tl.int64), n, valid, N)


@kernel()
def _combine(
    x_ptr: tl.tensor,
    place_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + i).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + i)
        total += tl.load(x_ptr + place * N + n, n < N, other=0.0).to(tl.float32) * weight
    tl.store(out_ptr + token * N + n, total.to(out_ptr.dtype.element_ty), n < N)


@kernel("blocks")
def _dequantize(
    codes_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor, blocks: tl.tensor, BLOCKS: tl.constexpr
) -> None:
    """Some blocks of 32 inputs, as `interleave_mxfp4` lays them out."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    byte, exists = tl.arange(0, 16), (block < blocks)[:, None]
    codes = tl.load(codes_ptr + block[:, None] * 16 + byte[None, :], exists, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + block, block < blocks, other=0).to(tl.int32)
    factor = ((scale + 14) << 23).to(tl.float32, bitcast=True)[:, None]
    out_ptrs = out_ptr + block[:, None] * 32 + byte[None, :]
    tl.store(out_ptrs, _widen(codes & 15, factor, out_ptr.dtype.element_ty), exists)
    tl.store(out_ptrs + 16, _widen(codes >> 4, factor, out_ptr.dtype.element_ty), exists)


def dequantized(weight: ExpertWeight, dtype: torch.dtype) -> ExpertWeight:
    """A weight in interleaved MXFP4 in ``dtype``."""
    assert weight.scale is not None
    rows, size = weight.values.shape
    out = torch.empty((rows, 2 * size), dtype=dtype, device=weight.values.device)
    blocks, some = weight.scale.numel(), 64
    _dequantize((triton.cdiv(blocks, some), 1, 1), (weight.values, weight.scale, out), (blocks,), (some,), warps=4)
    return ExpertWeight(out, bias=weight.bias)


class TritonExperts:
    """See `experts.Experts`.

    In steps of many tokens, each product first dequantizes its weight in MXFP4 whole: tiles would widen it once for
    each of their rows. Such steps are larger than any captured one, so no CUDA graph keeps the buffer.

    Args:
        gate_up: gate and up of each expert, gate first.
        down: of each expert.
        count: experts.
        activation: of the gate.
    """

    def __init__(self, gate_up: ExpertWeight, down: ExpertWeight, count: int, activation: Activation) -> None:
        self.weights = tuple(
            weight._replace(values=interleave_mxfp4(weight.values)) if weight.format == "mxfp4" else weight
            for weight in (gate_up, down)
        )
        self._count, self._activation = count, activation
        self._inner, self._outputs = len(gate_up.values) // (2 * count), len(down.values) // count

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `experts.Experts`."""
        out = torch.empty((len(x), self._outputs), dtype=x.dtype, device=x.device)
        if not len(x):
            return out
        tile = pick_tile(ids.numel() / self._count, self.weights[0].scale is None)
        alignment = Alignment(ids, self._count, tile.rows)
        inner = products(x, self._weight(0, x), alignment, self._inner, self._activation, tile)
        combine(products(inner, self._weight(1, x), alignment, self._outputs, "", tile), alignment, weights, out)
        return out

    def _weight(self, nth: int, x: Tensor) -> ExpertWeight:
        """Of the first or the second product of a step with inputs ``x``."""
        weight = self.weights[nth]
        return dequantized(weight, x.dtype) if weight.format == "mxfp4" and len(x) > MANY_TOKENS else weight


def products(
    x: Tensor, weight: ExpertWeight, alignment: Alignment, outputs: int, activation: str, tile: Tile
) -> Tensor:
    """One product of `_expert_products`: ``[T * k, outputs]`` in order of the experts."""
    slots, inputs = len(alignment.order), x.shape[1]
    out = torch.empty((slots, outputs), dtype=x.dtype, device=x.device)
    scale, bias = weight.scale, weight.bias
    _expert_products(
        (triton.cdiv(outputs, tile.outputs), len(alignment.blocks), 1),
        (
            *(x, weight.values, out if scale is None else scale, out if bias is None else bias),
            *(alignment.order, alignment.ends, alignment.blocks, out),
        ),
        (),
        (
            *(outputs, inputs, alignment.top_k, activation, weight.format, bias is not None),
            *("ieee" if x.dtype == torch.float32 else "tf32", tile.outputs, tile.rows, tile.inputs),
        ),
        warps=tile.warps,
        stages=tile.stages,
    )
    return out


def combine(x: Tensor, alignment: Alignment, weights: Tensor, out: Tensor) -> None:
    """Each token's sum of its experts' outputs ``x`` ``[T * k, N]``, in order of the experts, times their ``weights``,
    float32 ``[T, k]``, into ``out`` ``[T, N]``. Summed in the order of the token's experts."""
    tokens, outputs = out.shape
    grid = tokens, triton.cdiv(outputs, 1024), 1
    _combine(grid, (x, alignment.place, weights, out), (), (outputs, alignment.top_k, 1024), warps=4)


def pick_tile(mean: float, plain: bool) -> Tile:
    """The tile for experts of ``mean`` tokens each, of weights in the model's dtype if ``plain``.

    Of those that `tests/benchmarks/bench_experts.py` tries on an H200. Both products of a layer of Qwen3-30B-A3B take
    273 µs for 64 tokens, where reading the weights takes 246 and `torch.nn.functional.grouped_mm` 423, and 778 µs for
    4,096 tokens, where that takes 837.
    """
    rows = min(max(16, triton.next_power_of_2(max(1, int(1.5 * mean)))), 128)
    if rows >= 64:
        return Tile(64 if rows == 128 else 128, rows, 64, 8, 3)
    return Tile(64, rows, 64 if plain and rows > 16 else 128, 4, 3)
