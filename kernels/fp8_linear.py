"""Matrix products in FP8 on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Ops
from .quantize import Quantizer, Rows


class Fp8Linear:
    """A weight in float8_e4m3fn.

    Args:
        weight: ``[outputs, inputs]``, both multiples of 16.
        scale: float32, of each output channel ``[outputs, 1]`` or of each block ``[ceil(N / 128), ceil(K / 128)]``.
        bias: ``[outputs]`` or None.
        quantizer: of its input; in blocks if the scales are.
        dtype: of its output.
        ops: quantizes an input that the operation before has not.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        quantizer: Quantizer,
        dtype: torch.dtype,
        ops: Ops,
    ) -> None:
        self.quantizer = quantizer
        self._weight, self._scale, self._bias = weight, scale, bias
        self._dtype, self._ops = dtype, ops

    def __call__(self, x: Rows) -> Tensor:
        rows = self._ops.quantize(x, self.quantizer) if isinstance(x, Tensor) else x
        return self._ops.fp8_linear(rows, self._weight, self._scale, self._bias, self._dtype)


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies FP8 (compute capability 8.9 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
