"""Matrix products in FP8 on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Ops
from .quantize import BLOCK, Quantizer, Rows, in_blocks


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


def has_fp8(weight: Tensor, scale: Tensor) -> bool:
    """Whether `Fp8Linear` takes this weight: its device multiplies FP8, and its sizes fit."""
    outputs, inputs = weight.shape
    fits = outputs % 16 == 0 and inputs % (BLOCK if in_blocks(weight, scale) else 16) == 0
    return fits and multiplies_fp8(weight.device)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 8.9 or later. A memory plan may be of a GPU that is not here:
    it is taken for a recent one."""
    if device.type != "cuda":
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 9)
