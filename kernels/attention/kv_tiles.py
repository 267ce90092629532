"""Loads tiles of cached keys and values in Triton, of any storage format (`kv_format`).

Quantized tiles become float16 for tensor cores, whose inputs may be subnormal. So most of a conversion is to move bits
to where float16 has them, which is exact up to a power of two; the powers of two, and the scales of whole tokens, are
applied to scores and probabilities, of which there are far fewer than channels:

| format | what `load_keys` and `load_values` return | to be multiplied by |
|---|---|---|
| plain | the values | |
| fp8 | e4m3 values | the token's scale |
| int4 | codes · 2^-24, those of odd pairs of channels · 2^-20 | 2^24 · step, plus the token's minimum |
| nvfp4 | values · 2^-14 / `NVFP4_GLOBAL` | 2^14 · `NVFP4_GLOBAL` |

Queries are divided by their largest channel, so that float16 holds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..kv_format import NVFP4_BLOCK, NVFP4_GLOBAL

_NVFP4_BLOCK = tl.constexpr(NVFP4_BLOCK)
_NVFP4_SCALE = tl.constexpr(2.0**14 * NVFP4_GLOBAL)
_SIGNS = tl.constexpr(-2147450880)  # 0x80008000
# Probabilities times a scale of values would often be subnormal in float16; times this they are not.
_GAIN = tl.constexpr(256.0)


@triton.jit
def _halves(first: tl.tensor, second: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """int32 words of two float16 each, to float16 ``[ROWS, D]``."""
    words = tl.join(first, second)
    return tl.reshape(tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)), (ROWS, D)).to(tl.float16, bitcast=True)


@triton.jit
def _from_int4(words: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """int32 ``[ROWS, D / 8]``. A code in the low bits of a float16 is a subnormal number: code · 2^-24."""
    upper = words >> 8
    first = tl.join(words & 0x000F000F, upper & 0x000F000F)
    second = tl.join(words & 0x00F000F0, upper & 0x00F000F0)
    return _halves(first, second, ROWS, D)


@triton.jit
def _e2m1_pair(words: tl.tensor, MAGNITUDE: tl.constexpr, SIGN: tl.constexpr) -> tl.tensor:
    """Two codes of each word as two float16 · 2^-14, by shifts to the left of so many bits."""
    magnitude = (words << MAGNITUDE) if MAGNITUDE >= 0 else (words >> -MAGNITUDE)
    return (magnitude & 0x0E000E00) | ((words << SIGN) & _SIGNS)


@triton.jit
def _from_e2m1(words: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """int32 ``[ROWS, D / 8]``, to values · 2^-14."""
    first = tl.join(_e2m1_pair(words, 9, 12), _e2m1_pair(words, 1, 4))
    second = tl.join(_e2m1_pair(words, 5, 8), _e2m1_pair(words, -3, 0))
    return _halves(first, second, ROWS, D)


@triton.jit
def _e4m3_pair(words: tl.tensor) -> tl.tensor:
    """The upper bytes of both halves of each word as two float16 · 2^-8."""
    return (words & _SIGNS) | ((words >> 1) & 0x3F803F80)


@triton.jit
def _from_e4m3(words: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """int32 ``[ROWS, D / 4]``, to values · 2^-8."""
    odd, even = _e4m3_pair(words), _e4m3_pair(words << 8)
    low = tl.join(even.to(tl.int16), odd.to(tl.int16))
    high = tl.join((even >> 16).to(tl.int16), (odd >> 16).to(tl.int16))
    halves = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(halves, (ROWS, D)).to(tl.float16, bitcast=True)


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """Masked values are 0, not what the pool has there: 0 * NaN would be NaN."""
    return tl.load(pointers, mask, other=0) if MASKED else tl.load(pointers)


@triton.jit
def _load_codes(
    ptr: tl.tensor,
    offset: tl.tensor,
    scales_ptr: tl.tensor,
    scales_offset: tl.tensor,
    valid: tl.tensor,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Tokens of a 4-bit format, ``[ROWS, D]``."""
    words_ptr = (ptr + offset)[:, None].to(tl.pointer_type(tl.int32)) + tl.arange(0, D // 8)[None, :]
    words = _load(words_ptr, valid[:, None], MASKED)
    if FORMAT == "int4":
        codes = _from_int4(words, ROWS, D)
    else:
        BLOCKS: tl.constexpr = D // _NVFP4_BLOCK
        blocks_ptr = (scales_ptr + scales_offset)[:, None] + tl.arange(0, BLOCKS)[None, :]
        scales = _load(blocks_ptr, valid[:, None], MASKED).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        blocks = tl.reshape(_from_e2m1(words, ROWS, D), (ROWS, BLOCKS, _NVFP4_BLOCK))
        codes = tl.reshape(blocks * scales[:, :, None], (ROWS, D))
    return codes


@triton.jit
def load_keys(
    ptr: tl.tensor,
    offset: tl.tensor,
    scales_ptr: tl.tensor,
    scales_offset: tl.tensor,
    valid: tl.tensor,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """``[BLOCK_D, BLOCK_N]``. Offsets ``[BLOCK_N]`` are in elements of ``ptr`` and in bytes of scales."""
    channel = tl.arange(0, BLOCK_D)[:, None]
    if FORMAT == "plain":
        mask = (channel < D) & (valid[None, :] | (not MASKED))
        k = _load(ptr + offset[None, :] + channel, mask, MASKED or D < BLOCK_D)
    elif FORMAT == "fp8":
        data = _load(ptr + offset[None, :] + channel, valid[None, :], MASKED)
        k = data.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        k = tl.trans(_load_codes(ptr, offset, scales_ptr, scales_offset, valid, FORMAT, MASKED, BLOCK_N, D))
    return k


@triton.jit
def load_values(
    ptr: tl.tensor,
    offset: tl.tensor,
    scales_ptr: tl.tensor,
    scales_offset: tl.tensor,
    valid: tl.tensor,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """``[BLOCK_N, BLOCK_D]``: see `load_keys`. With ``BLOCK_M`` below 64, fp8 values are · 2^-8."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    if FORMAT == "plain":
        mask = (channel < D) & (valid[:, None] | (not MASKED))
        v = _load(ptr + offset[:, None] + channel, mask, MASKED or D < BLOCK_D)
    elif FORMAT == "fp8" and BLOCK_M >= 64:
        data = _load(ptr + offset[:, None] + channel, valid[:, None], MASKED)
        v = data.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif FORMAT == "fp8":
        # `mma` takes pairs of tokens, which are not neighbours in shared memory: Triton would load byte by byte.
        words_ptr = (ptr + offset)[:, None].to(tl.pointer_type(tl.int32)) + tl.arange(0, D // 4)[None, :]
        v = _from_e4m3(_load(words_ptr, valid[:, None], MASKED), BLOCK_N, D)
    else:
        v = _load_codes(ptr, offset, scales_ptr, scales_offset, valid, FORMAT, MASKED, BLOCK_N, D)
    return v


@triton.jit
def restore_values(
    x: tl.tensor,
    ptr: tl.tensor,
    offset: tl.tensor,
    valid: tl.tensor,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """What `load_values` with 64 for ``BLOCK_M`` returned, as the values that were stored. ``ptr``: of scales; VALUES:
    or keys.
    """
    if FORMAT == "nvfp4":
        values = x.to(tl.float32) * _NVFP4_SCALE
    elif FORMAT == "fp8":
        scale, _ = load_scales(ptr, offset, valid, FORMAT, VALUES, MASKED)
        values = x.to(tl.float32) * scale[:, None]
    elif FORMAT == "int4":
        step, low = load_scales(ptr, offset, valid, FORMAT, VALUES, MASKED)
        values = x.to(tl.float32) * (_pair_factor(D) * 16777216.0)[None, :] * step[:, None] + low[:, None]
    else:
        values = x
    return values


@triton.jit
def load_scales(
    ptr: tl.tensor,
    offset: tl.tensor,
    valid: tl.tensor,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """float32 ``[BLOCK_N]``: what keys, or VALUES, of each token are to be multiplied by, and its minimum (int4)."""
    word = _load((ptr + offset).to(tl.pointer_type(tl.int32)), valid, MASKED)
    if FORMAT == "fp8":
        scale = (word & -65536 if VALUES else word << 16).to(tl.float32, bitcast=True)
        low = tl.zeros_like(scale)
    else:
        scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        low = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, low


@triton.jit
def prepare_queries(
    q: tl.tensor, FORMAT: tl.constexpr, BLOCK_D: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What keys of ``FORMAT`` are multiplied by, ``[BLOCK_M, BLOCK_D]``, and for each query its factor and its sum."""
    factor = tl.zeros([q.shape[0]], tl.float32)
    total = factor
    if FORMAT == "plain":
        x = q
    else:
        scaled = q.to(tl.float32)
        factor = tl.maximum(tl.max(tl.abs(scaled), axis=1), 1e-30)
        scaled = scaled / factor[:, None]
        total = tl.sum(scaled, axis=1)
        if FORMAT == "int4":
            scaled = scaled * _pair_factor(BLOCK_D)[None, :]
        if FORMAT == "nvfp4":
            factor = factor * _NVFP4_SCALE
        x = scaled.to(tl.float16)
    return x, factor, total


@triton.jit
def scale_scores(
    scores: tl.tensor,
    factor: tl.tensor,
    total: tl.tensor,
    ptr: tl.tensor,
    offset: tl.tensor,
    valid: tl.tensor,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """q·k of prepared queries and loaded keys, ``[BLOCK_M, BLOCK_N]``."""
    if FORMAT == "fp8":
        scale, _ = load_scales(ptr, offset, valid, FORMAT, False, MASKED)
        scores = scores * scale[None, :]
    if FORMAT == "int4":
        step, low = load_scales(ptr, offset, valid, FORMAT, False, MASKED)
        scores = scores * (step * 16777216.0)[None, :] + low[None, :] * total[:, None]
    if FORMAT != "plain":
        scores = scores * factor[:, None]
    return scores


@triton.jit
def scale_probs(
    probs: tl.tensor,
    ptr: tl.tensor,
    offset: tl.tensor,
    valid: tl.tensor,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What values of ``FORMAT`` are multiplied by, and what each row's output is larger by in every channel."""
    bias = tl.zeros([probs.shape[0]], tl.float32)
    if FORMAT == "plain":
        weighted = probs.to(dtype)
    elif FORMAT == "nvfp4":
        weighted = probs.to(tl.float16)
    else:
        scale, low = load_scales(ptr, offset, valid, FORMAT, True, MASKED)
        weighted = (probs * (scale * _GAIN)[None, :]).to(tl.float16)
        if FORMAT == "int4":
            bias = tl.sum(probs * low[None, :], axis=1)
    return weighted, bias


@triton.jit
def finish_output(
    acc: tl.tensor, bias: tl.tensor, FORMAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
) -> tl.tensor:
    """The sums of weighted values, undoing the powers of two of `load_values` and `scale_probs`."""
    if FORMAT == "fp8" and BLOCK_M >= 64:
        acc = acc * (1.0 / _GAIN)
    if FORMAT == "int4":
        acc = acc * (_pair_factor(BLOCK_D) * (16777216.0 / _GAIN))[None, :] + bias[:, None]
    if FORMAT == "nvfp4":
        acc = acc * _NVFP4_SCALE
    return acc


@triton.jit
def _pair_factor(BLOCK_D: tl.constexpr) -> tl.tensor:
    """What makes up for the larger codes of odd pairs of channels: see `_from_int4`."""
    return tl.where(tl.arange(0, BLOCK_D) // 2 % 2 == 1, 0.0625, 1.0)
