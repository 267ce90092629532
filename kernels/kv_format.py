"""Storage formats of cached keys and values, with the torch specification of how each is written and read.

Each format quantizes one token of one KV head at a time and stores the scales with that token. So the bytes of a token
depend on that token alone: a prefix that is reused, copied from the middle of a page or moved to another tier has the
bits that it would have if it were computed again.

| format | data of D channels | scales of one token and head |
|---|---|---|
| plain | the model's dtype | none |
| fp8 | D e4m3 values | one bfloat16, max |x| / 448, or the checkpoint's own |
| int4 | D / 2 bytes, unsigned | float16 step and minimum (asymmetric; QServe: Lin et al., 2024) |
| nvfp4 | D / 2 bytes, e2m1 | one e4m3 scale for each 16 channels, times `NVFP4_GLOBAL` |

nvfp4 maps the largest value of a block to 6 or to 4, whichever has the smaller squared error (Four Over Six: Cook et
al., 2025): e2m1 has nothing between 4 and 6.

Eight 4-bit codes are one little-endian 32-bit word. Channels 2p and 2p + 1 of a word are its nibbles p and p + 4, so
that one mask extracts two channels, each in its own half of the word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

FormatName = Literal["plain", "fp8", "int4", "nvfp4"]

E4M3_MAX = 448.0
# Kernels multiply softmax probabilities by a value's scale in float16: smaller scales would lose bits there.
FP8_MIN_SCALE = 2.0**-16
INT4_MIN_STEP = 2.0**-14  # the smallest normal float16
FLOAT16_MAX = 65504.0
NVFP4_BLOCK = 16  # channels of one scale
# e4m3 scales have 4 significant bits from 2^-6 to 448. With this factor that covers blocks whose largest value is from
# 0.012 to 336, so that no calibration is needed.
NVFP4_GLOBAL = 2.0**-3
NVFP4_PEAKS = 6.0, 4.0  # what the largest value of a block may be mapped to; the first where errors are equal
# Errors are counted in so many whole steps of a scale: a sum of integers does not depend on its order, nor on fused
# multiplications. None is above 3 scales, so 16 squares stay below 2^31, except beyond 336, where both scales are 448
# and both counts wrong alike.
NVFP4_STEPS = 2048
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys, or values, are stored.

    Attributes:
        bits: of one channel; 0: those of the model's dtype.
        scale_bytes: of one token and head, for D channels.
        rotates_keys: keys are rotated by `hadamard` before they are quantized, and queries alike, which leaves their
            products unchanged. It spreads the few large channels of keys over all of them.
        encode: ``[..., D]`` and static scales or None, to uint8 data ``[..., D * bits / 8]`` and uint8 scales
            ``[..., scale_bytes]``; plain ones stay as they are.
        decode: the inverse, to float32 ``[..., D]``.
    """

    name: FormatName
    bits: int
    # Without the functions, whose addresses change: a disk cache recognizes its pages by the text of a layout.
    scale_bytes: Callable[[int], int] = field(repr=False)
    rotates_keys: bool
    encode: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] = field(repr=False)
    decode: Callable[[Tensor, Tensor], Tensor] = field(repr=False)

    @property
    def plain(self) -> bool:
        """Whether values are stored as the model computes them."""
        return not self.bits

    def data_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of the channels of one token and head."""
        return head_dim * self.bits // 8 if self.bits else head_dim * dtype.itemsize


def hadamard(x: Tensor) -> Tensor:
    """``x`` ``[..., D]`` times the orthonormal Hadamard matrix of the largest power of two that divides D, in blocks of
    that size; in ``x``'s dtype. Its own inverse."""
    size = x.shape[-1] & -x.shape[-1]
    return (x.float().unflatten(-1, (-1, size)) @ _hadamard_matrix(size, x.device)).flatten(-2).to(x.dtype)


@cache
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device)


def _encode_fp8(x: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """``static``: float32, broadcast to ``x``: the scales of a calibrated checkpoint.

    Scales have the range of float32. Rounding them to bfloat16 costs no accuracy: values are divided by the rounded
    scale, and where it is less than max |x| / 448, by 0.2 % at most, e4m3 would round the largest value, up to 449, to
    448 anyway.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) * (1.0 / E4M3_MAX) if static is None else static.expand(*x.shape[:-1], 1)
    scale = scale.clamp(min=FP8_MIN_SCALE).bfloat16()
    data = (x * (1.0 / scale.float())).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return data.view(torch.uint8), scale.contiguous().view(torch.uint8)


def _decode_fp8(data: Tensor, scales: Tensor) -> Tensor:
    return data.view(torch.float8_e4m3fn).float() * scales.view(torch.bfloat16).float()


def _encode_int4(x: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.float().clamp(-FLOAT16_MAX, FLOAT16_MAX)
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = ((high - low) * (1.0 / 15.0)).clamp(min=INT4_MIN_STEP).half()
    scales = torch.cat([step, low.half()], dim=-1)
    codes = ((x - scales[..., 1:].float()) * (1.0 / step.float()) + 0.5).floor().clamp_(0, 15)
    return _pack(codes.to(torch.uint8)), scales.view(torch.uint8)


def _decode_int4(data: Tensor, scales: Tensor) -> Tensor:
    step, low = scales.view(torch.float16).float().split(1, dim=-1)
    return _unpack(data).float().mul_(step).add_(low)


def _encode_nvfp4(x: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor]:
    blocks = x.float().unflatten(-1, (-1, NVFP4_BLOCK))
    size = blocks.abs()
    largest = size.amax(-1, keepdim=True)
    scales, other = (
        (largest * (1.0 / (peak * NVFP4_GLOBAL))).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn).float()
        for peak in NVFP4_PEAKS
    )
    scales = torch.where(_nvfp4_error(size, other) < _nvfp4_error(size, scales), other, scales)
    unit = scales * NVFP4_GLOBAL
    # Round to nearest, ties to the even code. The products are exact, which a quotient would not be.
    codes = (blocks < 0).to(torch.uint8) << 3
    for odd in (0.25, 1.25, 2.5, 5.0):
        codes += size > unit * odd
    for even in (0.75, 1.75, 3.5):
        codes += size >= unit * even
    return _pack(codes.flatten(-2)), scales.to(torch.float8_e4m3fn).squeeze(-1).view(torch.uint8)


def _nvfp4_error(size: Tensor, scales: Tensor) -> Tensor:
    """The squared error of blocks of magnitudes ``[..., 16]`` with scales ``[..., 1]``."""
    unit = scales * NVFP4_GLOBAL
    steps = (size * (NVFP4_STEPS / unit)).to(torch.int32)
    # Neighbours in e2m1 are 1/2 apart below 2, 1 below 4, and then 2.
    gap = NVFP4_STEPS // 2 << ((steps >= 2 * NVFP4_STEPS).int() + (steps >= 4 * NVFP4_STEPS))
    nearest = (steps + (gap >> 1)).bitwise_and_(-gap).clamp_(max=6 * NVFP4_STEPS)
    return nearest.sub_(steps).square_().sum(-1, keepdim=True, dtype=torch.int32).float() * unit.square()


def _decode_nvfp4(data: Tensor, scales: Tensor) -> Tensor:
    values = _e2m1_values(data.device)[_unpack(data).int()].unflatten(-1, (-1, NVFP4_BLOCK))
    return (values * (scales.view(torch.float8_e4m3fn).float() * NVFP4_GLOBAL)[..., None]).flatten(-2)


@cache
def _e2m1_values(device: torch.device) -> Tensor:
    return torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=device)


def _pack(codes: Tensor) -> Tensor:
    """uint8 codes below 16 ``[..., D]`` to bytes ``[..., D / 2]``, in the order that the module describes."""
    nibbles = codes.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-2)
    return (nibbles[..., ::2] | (nibbles[..., 1::2] << 4)).flatten(-2)


def _unpack(data: Tensor) -> Tensor:
    nibbles = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)
    return nibbles.unflatten(-1, (-1, 2, 4)).transpose(-1, -2).flatten(-3)


PLAIN = KVFormat("plain", 0, lambda _: 0, False, lambda x, _: (x, x[..., :0]), lambda data, _: data)
FORMATS: dict[FormatName, KVFormat] = {
    "plain": PLAIN,
    "fp8": KVFormat("fp8", 8, lambda _: 2, False, _encode_fp8, _decode_fp8),
    "int4": KVFormat("int4", 4, lambda _: 4, True, _encode_int4, _decode_int4),
    "nvfp4": KVFormat("nvfp4", 4, lambda head_dim: head_dim // NVFP4_BLOCK, True, _encode_nvfp4, _decode_nvfp4),
}

# ``--kv-cache-dtype``: the formats of keys and of values.
CHOICES: dict[str, tuple[KVFormat, KVFormat]] = {
    "auto": (PLAIN, PLAIN),
    "fp8": (FORMATS["fp8"], FORMATS["fp8"]),
    "int4": (FORMATS["int4"], FORMATS["int4"]),
    "nvfp4": (FORMATS["nvfp4"], FORMATS["nvfp4"]),
    "k16v8": (PLAIN, FORMATS["fp8"]),
}

GPU_HEAD_DIMS = (64, 128, 256)  # that the Triton kernels read quantized pages of


def problem(choice: str, head_dim: int, capability: tuple[int, int] | None) -> str | None:
    """Why heads of ``head_dim`` channels cannot be stored so, and what is closest; None if they can.

    ``capability``: CUDA's compute capability; None: a CPU.
    """
    formats = [each for each in CHOICES[choice] if not each.plain]
    if not formats:
        return None
    if capability is None:
        odd = any(each.bits == 4 for each in formats) and head_dim % NVFP4_BLOCK
        return f"heads of {head_dim} channels are not a multiple of {NVFP4_BLOCK}; use fp8" if odd else None
    if head_dim not in GPU_HEAD_DIMS:
        return f"GPU kernels read quantized heads of {GPU_HEAD_DIMS} channels, not of {head_dim}; use auto"
    if capability < (8, 9) and choice != "int4":
        return "float8 needs compute capability 8.9 or newer; use int4"
    return None
