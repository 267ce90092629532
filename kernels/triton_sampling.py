"""Sampling in Triton: see `sampling.SamplingKernels`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import kernel

BLOCK = 4096  # columns read at a time


@kernel()
def _block_mass(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    best_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> None:
    """One block of columns of one row: its largest logit, NaN if the block holds NaN or positive infinity, and the sum
    of ``exp((logit - largest) / temperature)``."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logit = tl.load(logits_ptr + row * V + column, column < V, other=float("-inf")).to(tl.float32)
    best = tl.max(logit, axis=0)
    probs = tl.exp((logit - best) / tl.load(temperature_ptr + row))
    probs = tl.where(best == float("-inf"), 0.0, probs)
    not_finite = tl.max(((logit != logit) | (logit == float("inf"))).to(tl.int32), axis=0)
    to = row * tl.num_programs(0) + block
    tl.store(best_ptr + to, tl.where(not_finite > 0, float("nan"), best))
    tl.store(mass_ptr + to, tl.sum(probs.to(tl.float64), axis=0))


@kernel()
def _sample(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    best_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    finite_ptr: tl.tensor,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """One row: finds the block that holds the share ``uniform`` of the mass, then the column in it. Where rounding puts
    the share beyond the end, the last one of positive probability is taken."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_B)
    temperature, uniform = tl.load(temperature_ptr + row), tl.load(uniform_ptr + row)
    bests = tl.load(best_ptr + row * BLOCKS + block, block < BLOCKS, other=float("-inf"))
    finite = tl.max((bests != bests).to(tl.int32), axis=0) == 0
    best = tl.max(tl.where(finite, bests, float("-inf")), axis=0)
    factor = tl.where(bests > float("-inf"), tl.exp((bests - best) / temperature), 0.0).to(tl.float64)
    mass = tl.load(mass_ptr + row * BLOCKS + block, block < BLOCKS, other=0.0)
    mass = tl.where(finite & (factor > 0.0), mass * factor, 0.0)
    through = tl.cumsum(mass, axis=0)
    target = uniform * tl.sum(mass, axis=0)
    last = tl.max(tl.where(mass > 0.0, block, -1), axis=0)
    chosen = tl.minimum(tl.sum((through <= target).to(tl.int32), axis=0), last)
    here = block == chosen
    left = target - tl.sum(tl.where(here, through - mass, 0.0), axis=0)
    left /= tl.sum(tl.where(here, factor, 0.0), axis=0)
    peak = tl.sum(tl.where(here, bests, 0.0), axis=0)
    column = tl.maximum(chosen, 0) * BLOCK_V + tl.arange(0, BLOCK_V)
    logit = tl.load(logits_ptr + row * V + column, column < V, other=float("-inf")).to(tl.float32)
    probs = tl.exp((logit - peak) / temperature)
    inside = tl.cumsum(probs.to(tl.float64), axis=0)
    nth = tl.sum((inside <= left).to(tl.int32), axis=0)
    token = tl.minimum(chosen * BLOCK_V + nth, tl.max(tl.where(probs > 0.0, column, -1), axis=0))
    tl.store(tokens_ptr + row, tl.where(chosen < 0, V - 1, token).to(tl.int64))
    tl.store(finite_ptr + row, finite)


def sample_logits(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """See `sampling.sample_logits`; reads each logit once."""
    rows, vocab_size = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if not rows:
        return tokens, finite
    blocks = triton.cdiv(vocab_size, BLOCK)
    best = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    mass = torch.empty((rows, blocks), dtype=torch.float64, device=logits.device)
    _block_mass((blocks, rows, 1), (logits, temperature, best, mass), (), (vocab_size, BLOCK), warps=8)
    _sample(
        (rows, 1, 1),
        (logits, temperature, uniform, best, mass, tokens, finite),
        (),
        (vocab_size, BLOCK, blocks, triton.next_power_of_2(blocks)),
        warps=8,
    )
    return tokens, finite


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
