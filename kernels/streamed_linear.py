"""Matrix products of few tokens on a Hopper GPU, in Gluon: a weight streamed through shared memory.

Such a product is bound by reading its weight, and at 10 to 60 µs a large part is the start: launch, first loads, and
the end of the kernel before. Here a program requests its first tiles of the weight, which no kernel writes, before it
waits for the kernel ahead (programmatic dependent launch, see `triton_launch`), and its first tiles of x afterwards.

Measured on an H200, 8 layers of Llama 3.1 8B's shape in a CUDA graph, µs a layer with cuBLAS and with these products:
147 and 139 (16 tokens), 163 and 155 (64). At 128 tokens reading x again for each 64 output channels costs more than
the start: 199 and 224. Prefetching the next weight into the L2 cache from the kernels before made every layer slower.

The weight is the left operand, as in `triton_fp8`. Where few programs would run, several share the input channels of
a tile, and the last one to arrive adds their sums in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from .quantize import Rows
from .triton_launch import ALIGNMENT, kernel, overlaps, start_next, wait_for_inputs

FEW = range(2, 65)  # tokens for which cuBLAS is slower
OUTPUTS = 64  # output channels of a program; a weight has a multiple
INPUTS = 64  # the input channels are a multiple of twice that
PROGRAMS = 132  # multiprocessors of an H200
LARGEST = 65536  # output channels: larger weights are output layers, which cuBLAS multiplies as fast
_WARPS = 4
_OUTPUTS, _NUM_WARPS, _UNIT = gl.constexpr(OUTPUTS), gl.constexpr(_WARPS), gl.constexpr(INPUTS)
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # renamed in Triton 3.7


class StreamTile(NamedTuple):
    """How a product is cut into programs."""

    tokens: int
    inputs: int  # input channels of an iteration
    stages: int  # tiles in flight
    splits: int  # programs that share the input channels


@kernel("tokens", "units", "splits", overlaps=True, jit=gluon.jit)
def _stream(
    x_ptr: gl.tensor,
    weight_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    out_ptr: gl.tensor,
    sums_ptr: gl.tensor,
    arrivals_ptr: gl.tensor,
    tokens: gl.tensor,
    units: gl.tensor,
    splits: gl.tensor,
    BIAS: gl.constexpr,
    TOKENS: gl.constexpr,
    INPUTS: gl.constexpr,
    STAGES: gl.constexpr,
    OVERLAPS: gl.constexpr,
) -> None:
    """``units``: input channels in multiples of `INPUTS`. Known multiples make loads and stores wide."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // INPUTS, INPUTS // 8], [_NUM_WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_NUM_WARPS, 1], [16, TOKENS, 16])
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, _NUM_WARPS], [0, 1])
    N, K = gl.num_programs(0) * _OUTPUTS, units * _UNIT
    split_steps = gl.cdiv(gl.cdiv(K, INPUTS), splits)
    start = gl.program_id(1) * split_steps
    steps = gl.minimum(gl.cdiv(K, INPUTS) - start, split_steps)
    row = gl.program_id(0) * _OUTPUTS + gl.arange(0, _OUTPUTS, gl.SliceLayout(1, LOAD))
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, LOAD))
    channel = start * INPUTS + gl.arange(0, INPUTS, gl.SliceLayout(0, LOAD))
    weight_ptrs = weight_ptr + row[:, None].to(gl.int64) * K + channel[None, :]
    # Beyond the last token the first ones are read again, which needs no mask.
    x_ptrs = x_ptr + (token % tokens)[:, None].to(gl.int64) * K + channel[None, :]
    weights = gl.allocate_shared_memory(weight_ptr.dtype.element_ty, [STAGES, _OUTPUTS, INPUTS], SHARED)
    xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, TOKENS, INPUTS], SHARED)
    start_next(OVERLAPS)
    for step in gl.static_range(STAGES - 1):
        if step < steps:
            async_copy.async_copy_global_to_shared(weights.index(step), weight_ptrs + step * INPUTS)
        async_copy.commit_group()
    wait_for_inputs(OVERLAPS)
    for step in gl.static_range(STAGES - 1):
        if step < steps:
            async_copy.async_copy_global_to_shared(xs.index(step), x_ptrs + step * INPUTS)
        async_copy.commit_group()
    total = gl.zeros([_OUTPUTS, TOKENS], gl.float32, MMA)
    for step in range(steps):
        # Of the groups committed, all but the newest STAGES - 2 have arrived: this step's among them.
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        _barrier()  # all warps have multiplied the tile that is now overwritten
        ahead = step + STAGES - 1
        if ahead < steps:
            async_copy.async_copy_global_to_shared(weights.index(ahead % STAGES), weight_ptrs + ahead * INPUTS)
            async_copy.async_copy_global_to_shared(xs.index(ahead % STAGES), x_ptrs + ahead * INPUTS)
        async_copy.commit_group()
        total = warpgroup_mma(weights.index(step % STAGES), xs.index(step % STAGES).permute((1, 0)), total)
    async_copy.wait_group(0)
    last = splits == 1
    if splits > 1:
        SIZE: gl.constexpr = _OUTPUTS * TOKENS
        at = gl.arange(0, _OUTPUTS, gl.SliceLayout(1, MMA))[:, None] * TOKENS
        at += gl.arange(0, TOKENS, gl.SliceLayout(0, MMA))[None, :]
        sums_ptrs = sums_ptr + gl.program_id(0) * splits * SIZE + at
        gl.store(sums_ptrs + gl.program_id(1) * SIZE, total)
        _barrier()  # every thread's part of the sum precedes the arrival
        last = gl.atomic_add(arrivals_ptr + gl.program_id(0), 1, sem="acq_rel") == splits - 1
        if last:
            gl.store(arrivals_ptr + gl.program_id(0), 0)
            total = gl.load(sums_ptrs, cache_modifier=".cg")
            for split in range(1, splits):
                total += gl.load(sums_ptrs + split * SIZE, cache_modifier=".cg")
    if last:
        if BIAS:
            of_output = gl.program_id(0) * _OUTPUTS + gl.arange(0, _OUTPUTS, gl.SliceLayout(1, MMA))
            total += gl.load(bias_ptr + of_output).to(gl.float32)[:, None]
        n = gl.program_id(0) * _OUTPUTS + gl.arange(0, _OUTPUTS, gl.SliceLayout(1, STORE))
        t = gl.arange(0, TOKENS, gl.SliceLayout(0, STORE))
        out = gl.convert_layout(total.to(out_ptr.dtype.element_ty), STORE)
        out_ptrs = out_ptr + t[None, :].to(gl.int64) * N + n[:, None]
        gl.store(out_ptrs, out, (t < tokens)[None, :])


class StreamedLinear:
    """`linear.PlainLinear` on a GPU that `streams`: few tokens by the kernel of this file, more by cuBLAS.

    One stream at a time calls it: programs that share a tile count their arrivals in memory of its own.

    Args:
        weight: ``[outputs, inputs]``, contiguous, in bfloat16 or float16.
        bias: ``[outputs]`` or None.
    """

    quantizer = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self._arrivals = torch.zeros(len(weight) // OUTPUTS, dtype=torch.int32, device=weight.device)

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)  # nothing quantizes the input of a layer without a quantizer
        if len(x) not in FEW or not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
            return F.linear(x, self._weight, self._bias)
        (tokens, inputs), outputs = x.shape, len(self._weight)
        tile = pick_tile(tokens, outputs)
        programs = outputs // OUTPUTS
        out = x.new_empty((tokens, outputs))
        parts = tile.splits if tile.splits > 1 else 0
        sums = x.new_empty((programs, parts, OUTPUTS, tile.tokens), dtype=torch.float32)
        _stream(
            (programs, tile.splits, 1),
            (x, self._weight, self._weight if self._bias is None else self._bias, out, sums, self._arrivals),
            (tokens, inputs // INPUTS, tile.splits),
            (self._bias is not None, tile.tokens, tile.inputs, tile.stages),
            warps=_WARPS,
        )
        return out


def pick_tile(tokens: int, outputs: int) -> StreamTile:
    """One wave of programs, each with much in flight, or several waves that overlap."""
    columns, programs = max(16, triton.next_power_of_2(tokens)), outputs // OUTPUTS
    if programs > PROGRAMS:
        return StreamTile(columns, 2 * INPUTS, 3, 1)
    fitting = PROGRAMS * (2 if columns <= 32 else 1) // programs  # of few tokens, two fit on a multiprocessor
    return StreamTile(columns, INPUTS, 8, 1 << min(fitting, 4).bit_length() - 1)


def streams(weight: Tensor) -> bool:
    """Whether `StreamedLinear` takes this weight of a GPU: wgmma is Hopper's alone."""
    outputs, inputs = weight.shape
    fits = (
        outputs % OUTPUTS == 0
        and outputs <= LARGEST
        and inputs % (2 * INPUTS) == 0
        and weight.dtype in (torch.bfloat16, torch.float16)
    )
    aligned = weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0
    return fits and aligned and overlaps(weight.device) and torch.cuda.get_device_capability(weight.device)[0] == 9
