"""FP8 matrix products on a GPU: a Triton kernel that streams the weight for few tokens, torch's GEMM for many.

With scales of blocks torch's is faster from few tokens on, where there is one (Hopper, with CUDA 12.9 or newer).

With few tokens the product is bound by reading the weight. The kernel takes tiles of the weight as the left operand, so
that tensor cores work on 64 or more output channels however few tokens there are ("swap AB"). If the output channels
make too few programs to read at full bandwidth, several programs share a tile's input channels, and a second kernel
adds their sums in a fixed order.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .quantize import BLOCK, QuantizedRows, Quantizer, in_blocks, quantize
from .triton_launch import kernel, start_next, wait_for_inputs

# Tokens up to which the kernel is used where torch has a GEMM; twice that for products of few output channels.
FEW = 128
NARROW, WIDE = 4096, 8192  # output channels
FEW_IN_BLOCKS = 15  # the same with scales of blocks, where torch multiplies these
ALIGNED = 4  # tokens: cuBLAS multiplies with scales of blocks a multiple of it
TRIAL = 32  # tokens of the trial

logger = logging.getLogger(__name__)
_in_torch: dict[tuple[object, ...], bool] = {}  # by device, dtype and shape of a weight: whether `_torch_blocks` serves


class Tile(NamedTuple):
    """How a product is cut into programs."""

    outputs: int  # output channels of a program
    tokens: int
    inputs: int  # input channels of an iteration
    splits: int  # programs that share the input channels of a tile
    warps: int
    stages: int


@triton.jit
def store_rows(
    tile: tl.tensor, out_ptr: tl.tensor, row: tl.tensor, n: tl.tensor, valid: tl.tensor, N: tl.constexpr
) -> None:
    """Writes ``tile`` ``[rows, channels]`` to rows ``row``, int64, and channels ``n`` of an output with N channels:
    rows that are ``valid`` and channels below N."""
    out_ptrs = out_ptr + row[:, None] * N + n[None, :]
    tl.store(out_ptrs, tile.to(out_ptr.dtype.element_ty), valid[:, None] & (n < N)[None, :])


@kernel("tokens", overlaps=True)
def _fp8_linear(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    wait_for_inputs(OVERLAPS)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(2)
    # Beyond the edges the first channels and tokens are read again, which needs no mask in the loop. Not the last one
    # each time: on an H200, 96 tokens in a tile of 128 then take 1.6 times as long as 128.
    row, token = n % N, t % tokens
    STEPS: tl.constexpr = (K + INPUTS * SPLITS - 1) // (INPUTS * SPLITS)
    k = split * (STEPS * INPUTS) + tl.arange(0, INPUTS)
    weight_ptrs = weight_ptr + row[:, None].to(tl.int64) * K + k[None, :]
    x_ptrs = x_ptr + token[None, :].to(tl.int64) * K + k[:, None]
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for step in range(STEPS):
        if K % (INPUTS * SPLITS):
            inside = k + step * INPUTS < K
            weight = tl.load(weight_ptrs, inside[None, :], other=0.0)
            x = tl.load(x_ptrs, inside[:, None], other=0.0)
        else:
            weight = tl.load(weight_ptrs)
            x = tl.load(x_ptrs)
        if BLOCKS:  # INPUTS is 128 and OUTPUTS at most that: an iteration has one scale of the weight
            block = tl.minimum(split * STEPS + step, K // 128 - 1)
            scale = tl.load(scale_ptr + tl.program_id(0) * OUTPUTS // 128 * (K // 128) + block)
            scales = tl.load(x_scale_ptr + block * tokens + token) * scale
            total += tl.dot(weight, x) * scales[None, :]
        else:
            total = tl.dot(weight, x, total)
        weight_ptrs += INPUTS
        x_ptrs += INPUTS
    start_next(OVERLAPS)
    total = tl.trans(total)
    if SPLITS == 1:
        if not BLOCKS:
            total *= tl.load(x_scale_ptr + token)[:, None] * tl.load(scale_ptr + row)[None, :]
        if BIAS:
            total += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    store_rows(total, out_ptr, split * tokens + t.to(tl.int64), n, t < tokens, N)


@kernel("tokens", overlaps=True)
def _add_splits(
    sums_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
) -> None:
    wait_for_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums_ptr + (split * tokens + token) * N + n, n < N, other=0.0)
    if not BLOCKS:
        total *= tl.load(x_scale_ptr + token) * tl.load(scale_ptr + n, n < N, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * N + n, total.to(out_ptr.dtype.element_ty), n < N)


def fp8_linear(x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `ops.fp8_linear`. K is a multiple of 16, or of 128 if scales are of blocks."""
    tokens, (outputs, inputs) = len(x.values), weight.shape
    if not tokens:
        return torch.empty((0, outputs), dtype=dtype, device=weight.device)
    blocks = in_blocks(weight, scale)
    if dtype == torch.bfloat16 and tokens > (FEW if outputs > NARROW else 2 * FEW) and not blocks:
        scales = x.scales.flatten().view(-1, 1), scale.t()
        return torch._scaled_mm(x.values, weight.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    if blocks and tokens > FEW_IN_BLOCKS and _torch_has_blocks(weight, scale, dtype):
        return _torch_blocks(x, weight, scale, bias, dtype)
    return fp8_linear_in_tiles(x, weight, scale, bias, dtype, pick_tile(tokens, outputs, inputs, blocks))


def _torch_blocks(x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`fp8_linear` with scales of blocks by torch's GEMM.

    On an H200, µs of the four products of a layer of Llama 3.1 8B, the kernel of this file and torch: 16 tokens 127 and
    90, 64 118 and 108, 128 169 and 107, 256 288 and 129, 2,048 2,150 and 785.
    """
    tokens, values, scales = len(x.values), x.values, x.scales.t().contiguous()
    missing = -tokens % ALIGNED
    if missing:
        values = F.pad(values.view(torch.uint8), (0, 0, 0, missing)).view(values.dtype)
        scales = F.pad(scales, (0, missing), value=1.0)
    out = torch._scaled_mm(values, weight.t(), scales.t(), scale.t(), out_dtype=dtype)[:tokens]
    return out if bias is None else out.add_(bias)


def _torch_has_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch multiplies such weights, and as the kernel of this file does: that depends on the GPU, on CUDA and
    on torch. Tried once for each shape; a step that is being captured tries nothing."""
    outputs, inputs = weight.shape
    key = weight.device, dtype, outputs, inputs
    found = _in_torch.get(key)
    if found is not None or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return found or False
    generator = torch.Generator(weight.device).manual_seed(0)
    tokens = torch.randn((TRIAL, inputs), generator=generator, device=weight.device)
    given = quantize(tokens, Quantizer(weight.dtype, BLOCK)), weight, scale, None, dtype
    expected = fp8_linear_in_tiles(*given, pick_tile(TRIAL, outputs, inputs, blocks=True)).float()
    try:
        distance = float((_torch_blocks(*given).float() - expected).norm() / expected.norm())
        problem = None if distance < 0.01 else f"its results are {distance:.1%} off"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        problem = str(error).strip().splitlines()[0]
    if problem is not None:
        logger.info("torch does not multiply FP8 weights of %s with scales of blocks: %s", tuple(weight.shape), problem)
    return _in_torch.setdefault(key, problem is None)


def fp8_linear_in_tiles(
    x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: Tile
) -> Tensor:
    """`fp8_linear` by the kernel of this file, for at least one token."""
    tokens, (outputs, inputs) = len(x.values), weight.shape
    out = torch.empty((tokens, outputs), dtype=dtype, device=weight.device)
    sums = out
    if tile.splits > 1:
        sums = torch.empty((tile.splits, tokens, outputs), dtype=torch.float32, device=weight.device)
    scales = x.scales.t().contiguous(), scale, scale if bias is None else bias
    flags = in_blocks(weight, scale), bias is not None, tile.splits
    _fp8_linear(
        (triton.cdiv(outputs, tile.outputs), triton.cdiv(tokens, tile.tokens), tile.splits),
        (x.values, scales[0], weight, *scales[1:], sums),
        (tokens,),
        (outputs, inputs, *flags, tile.outputs, tile.tokens, tile.inputs),
        warps=tile.warps,
        stages=tile.stages,
    )
    if tile.splits > 1:
        grid = (tokens, triton.cdiv(outputs, 1024), 1)
        _add_splits(grid, (sums, *scales, out), (tokens,), (outputs, *flags, 1024), warps=4)
    return out


def pick_tile(tokens: int, outputs: int, inputs: int, blocks: bool) -> Tile:
    """The fastest tile of those that `tests/benchmarks/bench_fp8_linear.py` tries, for the products of Llama 3.1 8B.

    One wave of programs has several stages of wide rows in flight. More waves overlap, and shorter stages let more
    programs run at once.
    """
    columns = min(max(16, triton.next_power_of_2(tokens)), 128)
    splits = 2 if outputs <= NARROW and inputs >= 8192 and tokens <= 128 else 1
    if blocks:
        return Tile(64, columns, BLOCK, splits, 4, 5 if outputs <= WIDE else 3)
    if outputs > WIDE:
        return Tile(128 if columns == 128 else 64, columns, 128, 1, 4, 3)
    return Tile(64, columns, 128 if columns == 128 else 256, splits, 4, 5)
