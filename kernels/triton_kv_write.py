"""Quantizes keys and values as they are written, in Triton: `kv_format` specifies each format.

Called by the kernel that rotates keys, so that writing a quantized pool takes no further launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kv_format import (
    E4M3_MAX,
    FLOAT16_MAX,
    FP8_MIN_SCALE,
    INT4_MIN_STEP,
    NVFP4_BLOCK,
    NVFP4_GLOBAL,
    NVFP4_PEAKS,
    NVFP4_STEPS,
)

_E4M3_MAX, _FLOAT16_MAX = tl.constexpr(E4M3_MAX), tl.constexpr(FLOAT16_MAX)
_FP8_MIN_SCALE, _INT4_MIN_STEP = tl.constexpr(FP8_MIN_SCALE), tl.constexpr(INT4_MIN_STEP)
_NVFP4_BLOCK, _NVFP4_GLOBAL = tl.constexpr(NVFP4_BLOCK), tl.constexpr(NVFP4_GLOBAL)
_NVFP4_PEAKS, _NVFP4_STEPS = tl.constexpr(NVFP4_PEAKS), tl.constexpr(NVFP4_STEPS)


@triton.jit
def hadamard(x: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """float32 ``[ROWS, D]`` times the orthonormal Hadamard matrix: a fast Walsh-Hadamard transform. D: 16 … 256."""
    STAGES: tl.constexpr = 4 if D == 16 else 5 if D == 32 else 6 if D == 64 else 7 if D == 128 else 8
    SCALE: tl.constexpr = 2.0 ** (-0.5 * STAGES)
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(x, (ROWS, D >> (stage + 1), 2, 1 << stage)), (0, 1, 3, 2))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, D))
    return x * SCALE


@triton.jit
def _round_bfloat16(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The nearest bfloat16 values of positive float32, ties to even: their bits as int16, and as float32. The
    interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return bits.to(tl.int16), (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_fp8(
    x: tl.tensor,
    data_ptrs: tl.tensor,
    scale_ptrs: tl.tensor,
    static: tl.tensor,
    mask: tl.tensor,
    STATIC: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """``x``: float32 ``[ROWS, D]``; ``static``: its scales if STATIC. Pointers to bytes and ``mask``: ``[ROWS]``."""
    scale = static
    if not STATIC:
        scale = tl.max(tl.abs(x), axis=1) * (1.0 / _E4M3_MAX)
    bits, scale = _round_bfloat16(tl.maximum(scale, _FP8_MIN_SCALE))
    y = x * tl.div_rn(1.0, scale)[:, None]
    y = tl.minimum(tl.maximum(y, -_E4M3_MAX), _E4M3_MAX).to(tl.float8e4nv)
    channel = tl.arange(0, D)[None, :]
    tl.store(data_ptrs[:, None].to(tl.pointer_type(tl.float8e4nv)) + channel, y, mask[:, None])
    tl.store(scale_ptrs.to(tl.pointer_type(tl.int16)), bits, mask)


@triton.jit
def store_words(codes: tl.tensor, data_ptrs: tl.tensor, mask: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr) -> None:
    """int32 codes below 16, ``[ROWS, D]``, eight to a word in the order of `kv_format`."""
    WORDS: tl.constexpr = D // 8
    even, odd = tl.split(tl.reshape(codes, (ROWS, WORDS, 2, 2, 2)))
    even, odd = tl.split(even | (odd << 16))
    even, odd = tl.split(even | (odd << 4))
    words = even | (odd << 8)
    tl.store(data_ptrs[:, None].to(tl.pointer_type(tl.int32)) + tl.arange(0, WORDS)[None, :], words, mask[:, None])


@triton.jit
def store_int4(
    x: tl.tensor, data_ptrs: tl.tensor, scale_ptrs: tl.tensor, mask: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr
) -> None:
    """As `store_fp8`, without static scales."""
    x = tl.minimum(tl.maximum(x, -_FLOAT16_MAX), _FLOAT16_MAX)
    low, high = tl.min(x, axis=1), tl.max(x, axis=1)
    step = tl.maximum((high - low) * (1.0 / 15.0), _INT4_MIN_STEP).to(tl.float16)
    low = low.to(tl.float16)
    codes = tl.floor((x - low.to(tl.float32)[:, None]) * tl.div_rn(1.0, step.to(tl.float32))[:, None] + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.int32)
    store_words(codes, data_ptrs, mask, ROWS, D)
    scale_ptrs = scale_ptrs.to(tl.pointer_type(tl.float16))
    tl.store(scale_ptrs, step, mask)
    tl.store(scale_ptrs + 1, low, mask)


@triton.jit
def _round_e4m3(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The nearest e4m3 values of positive float32 up to 448, ties to even: as codes, and as float32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = ((x * 512.0 + 8388608.0) - 8388608.0).to(tl.int32)
    code = tl.where(x < 0.015625, subnormal, normal)
    value = tl.where(code < 8, code.to(tl.float32) * 0.001953125, ((code + 960) << 20).to(tl.float32, bitcast=True))
    return code, value


@triton.jit
def _nvfp4_scale(size: tl.tensor, largest: tl.tensor, PEAK: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The scales that map ``largest`` ``[ROWS, BLOCKS]`` to PEAK, as codes and as float32, and the squared errors of
    the magnitudes ``[ROWS, BLOCKS, 16]`` with them."""
    scale = largest * (1.0 / (PEAK * _NVFP4_GLOBAL))
    code, scale = _round_e4m3(tl.minimum(tl.maximum(scale, 0.001953125), _E4M3_MAX))
    unit = scale * _NVFP4_GLOBAL
    steps = (size * tl.div_rn(1.0 * _NVFP4_STEPS, unit)[:, :, None]).to(tl.int32)
    gap = tl.where(steps < 4 * _NVFP4_STEPS, _NVFP4_STEPS, 2 * _NVFP4_STEPS)
    gap = tl.where(steps < 2 * _NVFP4_STEPS, _NVFP4_STEPS // 2, gap)
    error = steps - tl.minimum((steps + (gap >> 1)) & -gap, 6 * _NVFP4_STEPS)
    return code, unit, tl.sum(error * error, axis=2).to(tl.float32) * (unit * unit)


@triton.jit
def store_nvfp4(
    x: tl.tensor, data_ptrs: tl.tensor, scale_ptrs: tl.tensor, mask: tl.tensor, ROWS: tl.constexpr, D: tl.constexpr
) -> None:
    """As `store_int4`."""
    BLOCKS: tl.constexpr = D // _NVFP4_BLOCK
    blocks = tl.reshape(x, (ROWS, BLOCKS, _NVFP4_BLOCK))
    size = tl.abs(blocks)
    largest = tl.max(size, axis=2)
    scale, unit, error = _nvfp4_scale(size, largest, _NVFP4_PEAKS[0])
    other_scale, other_unit, other_error = _nvfp4_scale(size, largest, _NVFP4_PEAKS[1])
    scale = tl.where(other_error < error, other_scale, scale)
    unit = tl.where(other_error < error, other_unit, unit)[:, :, None]
    codes = (size > unit * 0.25).to(tl.int32) + (size >= unit * 0.75).to(tl.int32) + (size > unit * 1.25).to(tl.int32)
    codes += (size >= unit * 1.75).to(tl.int32) + (size > unit * 2.5).to(tl.int32) + (size >= unit * 3.5).to(tl.int32)
    codes += (size > unit * 5.0).to(tl.int32) + 8 * (blocks < 0.0).to(tl.int32)
    store_words(tl.reshape(codes, (ROWS, D)), data_ptrs, mask, ROWS, D)
    even, odd = tl.split(tl.reshape(scale, (ROWS, BLOCKS // 4, 2, 2)))
    even, odd = tl.split(even | (odd << 8))
    words_ptr = scale_ptrs[:, None].to(tl.pointer_type(tl.int32)) + tl.arange(0, BLOCKS // 4)[None, :]
    tl.store(words_ptr, even | (odd << 16), mask[:, None])


@triton.jit
def store_quantized(
    x: tl.tensor,
    data_ptrs: tl.tensor,
    scale_ptrs: tl.tensor,
    static: tl.tensor,
    mask: tl.tensor,
    FORMAT: tl.constexpr,
    STATIC: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Stores keys or values ``x`` ``[ROWS, D]``, of any format. Pointers are to bytes, ``[ROWS]``."""
    if FORMAT == "plain":
        pointers = data_ptrs[:, None].to(tl.pointer_type(x.dtype)) + tl.arange(0, D)[None, :]
        tl.store(pointers, x, mask[:, None])
    elif FORMAT == "fp8":
        store_fp8(x.to(tl.float32), data_ptrs, scale_ptrs, static, mask, STATIC, D)
    elif FORMAT == "int4":
        store_int4(x.to(tl.float32), data_ptrs, scale_ptrs, mask, ROWS, D)
    else:
        store_nvfp4(x.to(tl.float32), data_ptrs, scale_ptrs, mask, ROWS, D)


@triton.jit
def write_quantized(
    token_ptr: tl.tensor,
    head: tl.tensor,
    slot: tl.tensor,
    pool_ptr: tl.tensor,
    static_ptr: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RECORD: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    ROTATE: tl.constexpr,
    STATIC: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Quantizes and stores some heads of one token whose queries and keys have their rotary embedding.

    Args:
        token_ptr: its queries, keys and values ``[HEADS + 2 * KV_HEADS, D]``.
        head: ``[ROWS]``.
        slot: of the token.
        pool_ptr: the layer's first byte.
        static_ptr: float32 ``[2, KV_HEADS]`` if STATIC.
        RECORD: see `kv_pool.PageRecord`, and the bytes between one head's data and scales, of keys and of values.
        ROTATE: first multiply queries and keys by a Hadamard matrix, in place.
    """
    PAGE, VALUES, KEY_SCALES, VALUE_SCALES = RECORD[0], RECORD[1], RECORD[2], RECORD[3]
    K_DATA, V_DATA, K_SCALE, V_SCALE = RECORD[4], RECORD[5], RECORD[6], RECORD[7]
    pointers = token_ptr + (head * D)[:, None] + tl.arange(0, D)[None, :]
    x = tl.load(pointers, (head < HEADS + 2 * KV_HEADS)[:, None], other=0.0)
    if ROTATE:
        rotated = head < HEADS + KV_HEADS
        x = tl.where(rotated[:, None], hadamard(x.to(tl.float32), ROWS, D).to(x.dtype), x)
        tl.debug_barrier()
        tl.store(pointers, x, rotated[:, None])
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    kv_head = tl.where(is_key | is_value, (head - HEADS) % KV_HEADS, 0)
    place = kv_head * PAGE_SIZE + slot % PAGE_SIZE
    page_ptr = pool_ptr.to(tl.pointer_type(tl.uint8)) + (slot // PAGE_SIZE) * PAGE
    static = tl.zeros([ROWS], tl.float32)
    if STATIC:
        static = tl.load(static_ptr + kv_head + tl.where(is_value, KV_HEADS, 0))
    k_data, v_data = place * K_DATA, VALUES + place * V_DATA
    k_scales, v_scales = KEY_SCALES + place * K_SCALE, VALUE_SCALES + place * V_SCALE
    if K_FORMAT == V_FORMAT:
        data, scales = tl.where(is_value, v_data, k_data), tl.where(is_value, v_scales, k_scales)
        mask = is_key | is_value
        store_quantized(x, page_ptr + data, page_ptr + scales, static, mask, K_FORMAT, STATIC, ROWS, D)
    else:
        store_quantized(x, page_ptr + k_data, page_ptr + k_scales, static, is_key, K_FORMAT, STATIC, ROWS, D)
        store_quantized(x, page_ptr + v_data, page_ptr + v_scales, static, is_value, V_FORMAT, STATIC, ROWS, D)
