"""8-bit formats of weights and activations in torch: the specification of the faster kernels.

A quantized value is ``value * scale``, in uint8 ``(value - 128) * scale``. Weights have one float32 scale for each
output channel, or for each block of 128 × 128. Activations have one for each token, or for each 128 channels of a
token, so that a token's result does not depend on the other tokens of its step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # rows and columns of a weight, or channels of a token, that share a scale in block formats
MXFP4_BLOCK = 32  # inputs that share a scale in MXFP4
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ZERO_POINT = 128  # of uint8: the value that stands for 0
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, torch.uint8: 127.0}  # magnitudes
_PART, _CPU_PART = 1 << 24, 1 << 18  # elements of a weight that are quantized at once; on a CPU, in its cache
_SMALLEST = 1e-12  # magnitude that a scale is computed from at least: rows of zeros have a scale too


@dataclass(frozen=True, slots=True, eq=False)
class Quantizer:
    """How the input of a linear layer is quantized.

    Args:
        dtype: float8_e4m3fn, int8, or uint8, whose scales are dynamic.
        group: channels of a token that share a scale; 0: all of them.
        scale: float32 ``[1]``, calibrated (static); None: computed from the largest magnitude of each group (dynamic).
    """

    dtype: torch.dtype
    group: int = 0
    scale: Tensor | None = None


class QuantizedRows(NamedTuple):
    """Tokens ``[T, K]`` of a `Quantizer`'s dtype, with float32 scales ``[T, 1]`` or ``[T, K / group]``."""

    values: Tensor
    scales: Tensor

    def index_select(self, dim: int, index: Tensor) -> QuantizedRows:
        """As `torch.Tensor.index_select`."""
        return QuantizedRows(self.values.index_select(dim, index), self.scales.index_select(dim, index))


Rows = Tensor | QuantizedRows  # the input of a linear layer, ``[T, K]``


def quantize(x: Tensor, quantizer: Quantizer) -> QuantizedRows:
    """Tokens ``[T, K]`` in 8 bits. K is a multiple of the group. Values beyond a static scale's range saturate."""
    if quantizer.group:
        groups = quantize(x.reshape(-1, quantizer.group), replace(quantizer, group=0))
        return QuantizedRows(groups.values.view(x.shape), groups.scales.view(len(x), -1))
    x, largest = x.float(), LARGEST[quantizer.dtype]
    if quantizer.scale is None:
        magnitude, limit = x.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST), constant(largest, x.device)
        factors, scales = limit / magnitude, magnitude / limit
        if quantizer.dtype == torch.uint8:  # conversion truncates
            return QuantizedRows(torch.addcmul(constant(ZERO_POINT + 0.5, x.device), x, factors).byte(), scales)
        scaled = x * factors
    else:
        scaled = (x * (1 / quantizer.scale)).clamp_(-largest, largest)
        scales = quantizer.scale.repeat(len(x), 1)
    if quantizer.dtype == torch.int8:
        scaled.round_()
    return QuantizedRows(scaled.to(quantizer.dtype), scales)


@functools.cache
def constant(value: float, device: torch.device) -> Tensor:
    """A float32 scalar tensor: an operation with a Python number makes one anew each time."""
    with torch.inference_mode(False):
        return torch.tensor(value, device=device)


def quantize_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight ``[N, K]`` in 8 bits, and its float32 scale of each output channel ``[N, 1]``.

    Rows are taken in parts: temporaries of a whole weight may not fit beside a large model, and on a CPU parts that fit
    the cache take a quarter of the time.
    """
    part = _CPU_PART if weight.device.type == "cpu" else _PART
    parts = [quantize(rows, Quantizer(dtype)) for rows in weight.split(max(1, part // weight.shape[1]))]
    return torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])


def in_blocks(weight: Tensor, scale: Tensor) -> bool:
    """Whether the scales of ``weight`` ``[N, K]`` are of blocks, and not of output channels."""
    return scale.shape != (len(weight), 1)


def dequantize_mxfp4(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[N, K]`` of a weight in MXFP4 (OCP Microscaling Formats, 2023).

    Args:
        values: uint8 ``[N, K / 2]``: e2m1, the first of two in the low bits.
        scales: uint8 ``[N, K / 32]``: e8m0, exponents with a bias of 127 of each 32 inputs.
        dtype: of the result.
    """
    table = torch.tensor(_E2M1, dtype=torch.float32, device=values.device)
    pairs = torch.stack([values & 0xF, values >> 4], dim=-1).flatten(1)
    blocks = table[pairs.int()].unflatten(1, (-1, MXFP4_BLOCK))
    return torch.ldexp(blocks, scales.int()[..., None] - 127).flatten(1).to(dtype)


def dequantize_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` ``[N, K]`` times ``scale``, ``[N, 1]`` or of blocks, or in MXFP4, rounded once to ``dtype``."""
    if weight.dtype == torch.uint8:
        return dequantize_mxfp4(weight, scale, dtype)
    if scale.shape[0] != weight.shape[0]:
        scale = scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]]
    if scale.shape[1] != 1:
        scale = scale.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return (weight.float() * scale).to(dtype)
