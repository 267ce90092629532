"""Top-p without sorting, in Triton: see `sampling.keep_threshold` for the definition."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .triton_launch import kernel

BLOCK = 4096  # columns read at a time


@kernel()
def _top_p_threshold(
    probs_ptr: tl.tensor,
    floor_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    out_ptr: tl.tensor,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """One row. The largest t for which values of at least t have the needed mass, found two bits at a time: values from
    0 to 1 are ordered like their bits.

    Masses are sums of integers, in units of 2**-44: exact, whatever the order. 2**18 values of at most 1 fit.
    """
    row = tl.program_id(0).to(tl.int64)
    floor, top_p = tl.load(floor_ptr + row), tl.load(top_p_ptr + row)
    threshold = floor
    if top_p < 1.0:
        column = tl.arange(0, BLOCK_V)
        values = probs_ptr + row * V
        total = tl.zeros([BLOCK_V], tl.int64)
        for at in range(0, V, BLOCK_V):
            value = tl.load(values + at + column, at + column < V, other=0.0)
            total += tl.where(value >= floor, (value * 17592186044416.0).to(tl.int64), 0)
        mass = tl.sum(total, axis=0)
        needed = top_p * mass.to(tl.float64)
        found = tl.full((), 0, tl.int32)  # bits of the threshold
        unit = tl.full((), 268435456, tl.int32)  # 2 ** 28: float32 values up to 1 have bits below 2 ** 30
        for _ in range(15):
            first, second, third = found + unit, found + 2 * unit, found + 3 * unit
            above1 = tl.zeros([BLOCK_V], tl.int64)
            above2 = tl.zeros([BLOCK_V], tl.int64)
            above3 = tl.zeros([BLOCK_V], tl.int64)
            for at in range(0, V, BLOCK_V):
                value = tl.load(values + at + column, at + column < V, other=0.0)
                bits = value.to(tl.int32, bitcast=True)
                units = tl.where(value >= floor, (value * 17592186044416.0).to(tl.int64), 0)
                above1 += tl.where(bits >= first, units, 0)
                above2 += tl.where(bits >= second, units, 0)
                above3 += tl.where(bits >= third, units, 0)
            if tl.sum(above3, axis=0).to(tl.float64) >= needed:
                found = third
            elif tl.sum(above2, axis=0).to(tl.float64) >= needed:
                found = second
            elif tl.sum(above1, axis=0).to(tl.float64) >= needed:
                found = first
            unit = unit >> 2
        threshold = tl.maximum(floor, tl.where(mass > 0, found.to(tl.float32, bitcast=True), 0.0))
    tl.store(out_ptr + row, threshold)


def top_p_threshold(probs: Tensor, floor: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability [S, 1] that top-p keeps among those of at least ``floor``; ``floor`` where it is off.

    ``probs`` [S, V] float32 in [0, 1], contiguous; ``floor`` [S, 1] float32; ``top_p`` [S] float64, 1 is off.

    The result is that of sorting (`sampling.keep_threshold`), at the cost of reading each row 16 times.
    """
    out = torch.empty_like(floor)
    if len(probs):
        grid = (len(probs), 1, 1)
        _top_p_threshold(grid, (probs, floor, top_p, out), (), (probs.shape[1], BLOCK), warps=16)
    return out
