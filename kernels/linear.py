"""Matrix products with fixed weights: in the model's dtype, in FP8 on a GPU, in int8 on a CPU.

A scheme is a class: how the weight is stored, how it is multiplied, and how its input is quantized (`quantizer`), which
the operation before it may do in its own pass.

On a CPU, weights in the model's dtype are packed once for oneDNN. Measured on a Zen 4 core, float32, against
``F.linear`` (MKL): 1.2 to 1.35 times as fast for 512 rows; for the 4 to 64 rows of a decode step mostly 1.2 to 1.65
times on 256-wide layers and 1.75 to 3.3 times on the largest matrices. A single row is level to slower (1.8 times on
the smallest).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantize import QuantizedRows, Quantizer, Rows, quantize, quantize_weight

_ROWS = 512  # the number of rows that the packed layout is optimized for; it works for any


class Linear(Protocol):
    """``x @ weight.T + bias``."""

    @property
    def quantizer(self) -> Quantizer | None:
        """How the input is quantized; None: it is not."""
        ...

    def __call__(self, x: Rows) -> Tensor:
        """``[T, inputs]`` to ``[T, outputs]`` in the model's dtype. Quantizes ``x`` unless it is quantized already."""
        ...


class PlainLinear:
    """A weight in the model's dtype.

    Args:
        weight: ``[outputs, inputs]``. Not kept if it is packed.
        bias: ``[outputs]`` or None.
    """

    quantizer = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._packed = packs(weight.device, weight.dtype)
        # inference_mode: the packed layout has no autograd support.
        with torch.inference_mode():
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._packed else weight

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)  # nothing quantizes the input of a layer without a quantizer
        if not self._packed:
            return F.linear(x, self._weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return out


class Int8Linear:
    """A weight in int8 with a scale for each output channel; the input in int8 with a scale for each token. For CPUs.

    Sums are exact in int32, so that a token's result does not depend on the other tokens of its step. Measured on one
    core with AVX512-VNNI, 4096 × 1024, against float32 packed for oneDNN, without scales: 0.15 against 0.64 ms for 1
    row, 0.40 against 0.88 for 8, 3.3 against 18 for 256. `torch.ops.aten._weight_int8pack_mm`: 0.26, 1.0 and 46 ms.
    `torch.ops.quantized.linear_dynamic`: 0.18, 0.23 and 7.4 ms, but one activation scale for all tokens of a step.
    """

    quantizer = Quantizer(torch.int8)

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        values, scale = quantize_weight(weight, torch.int8)
        self._weight, self._scale = values.t(), scale.t()
        self._bias, self._dtype = bias, weight.dtype

    def __call__(self, x: Rows) -> Tensor:
        values, scales = quantize(x, self.quantizer) if isinstance(x, Tensor) else x
        out = torch._int_mm(values, self._weight).mul(self._scale).mul_(scales)
        return (out if self._bias is None else out.add_(self._bias)).to(self._dtype)


class FixedRows:
    """Calls ``inner`` with tiles of exactly ``rows`` rows, the last one padded with zeros.

    Libraries choose a kernel, and with it the order of sums, by the number of rows: padded to one shape, a row's result
    does not depend on how many others there are. Nor does it depend on its place or on the others' values, where sums
    run over a row's own inputs alone, as in a product with a matrix or an activation.

    Args:
        inner: ``[rows, inputs]`` to ``[rows, outputs]``, row by row: a `Linear`, or an MLP.
        rows: of a tile.
    """

    def __init__(self, inner: Linear, rows: int) -> None:
        self._inner, self._rows = inner, rows
        self.quantizer = inner.quantizer

    def __call__(self, x: Rows) -> Tensor:
        if isinstance(x, QuantizedRows):
            parts = [QuantizedRows(*pair) for pair in zip(*(self._tiles(part) for part in x), strict=True)]
            return torch.cat([self._inner(part) for part in parts])[: len(x.values)]
        return torch.cat([self._inner(part) for part in self._tiles(x)])[: len(x)]

    def _tiles(self, x: Tensor) -> list[Tensor]:
        """Copies, so that a tile's memory is aligned wherever it begins in ``x``."""
        tiles = []
        for part in x.split(self._rows):
            tile = part.new_zeros(self._rows, *part.shape[1:])
            tile[: len(part)] = part
            tiles.append(tile)
        return tiles


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `PlainLinear` keeps a packed copy of a weight."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # internal to torch.compile, so it may disappear
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
