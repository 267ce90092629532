"""Matrix products with fixed weights: in the model's dtype, in FP8 on a GPU, in int8 on a CPU.

A scheme is a class: how the weight is stored, how it is multiplied, and how its input is quantized (`quantizer`), which
the operation before it may do in its own pass.

On a CPU a weight is laid out for its kernel by ``lay_out``, or else by the layer's first call: a server need not wait
for it before it is ready.

On a CPU, weights in the model's dtype are packed once for oneDNN. Measured on a Zen 4 core, float32, against
``F.linear`` (MKL): 1.2 to 1.35 times as fast for 512 rows; for the 4 to 64 rows of a decode step mostly 1.2 to 1.65
times on 256-wide layers and 1.75 to 3.3 times on the largest matrices. The packed kernel costs 20 µs a call, so a
weight of up to `COPY_BYTES` also has a transposed copy for few rows. In µs, packed and copy, on a Xeon core with
AVX512: 1 row of 512 × 256 24 and 6, of 8192 × 256 384 and 314; 8 rows 32 and 14, 621 and 424. MKL loses on two threads.
Once the compiled kernels are there (`native`), few rows read the checkpoint's own bfloat16 if it has that, of weights
of up to `NARROW_BYTES`: the same values in half the bytes, and such a step takes what reading them takes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, native_ops
from .file_weight import FileWeight
from .quantize import ZERO_POINT, QuantizedRows, Quantizer, Rows, quantize, quantize_weight

_ROWS = 512  # the number of rows that the packed layout is optimized for; it works for any
COPY_BYTES = 8 << 20  # up to so many bytes a weight is stored a second time, for few rows
NARROW_BYTES = 64 << 20  # up to so many bytes of float32 a weight is kept in a checkpoint's bfloat16 too
COPY_ROWS = 8  # fewer than `FixedRows` has in a tile: there every step takes the packed kernel
BFLOAT16_ROWS = 4  # the same of a bfloat16 model. An estimate: only single rows were measured, where oneDNN has AMX


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
        weight: ``[outputs, inputs]``. Not kept if it is packed or converted. In files, it is copied by ``lay_out``.
        bias: ``[outputs]`` or None.
        dtype: the model's; None: the weight's.
        copied: keep a copy for few rows where `linear_bytes` counts one.
        shared: ``weight`` stays in memory anyhow, as a tied embedding does: few rows may read it, however large it is.
    """

    quantizer = None

    def __init__(
        self,
        weight: Tensor | FileWeight,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        copied: bool = True,
        shared: bool = False,
    ) -> None:
        self.bias, self._weight, self._dtype = bias, weight, dtype or weight.dtype
        self._packed = packs(weight.device, self._dtype)
        self._copied = copied and _copies(weight.device, weight.shape, self._dtype)
        self._copy: Tensor | None = None  # [inputs, outputs]
        kept = copied and (shared or 4 * weight.shape.numel() <= NARROW_BYTES)
        self._keeps_narrow = kept and self._packed and weight.dtype == torch.bfloat16
        self._narrow: Tensor | None = None  # [outputs, inputs] in bfloat16, in place of the copy
        self._narrow_rows = COPY_ROWS if self._dtype == torch.float32 else BFLOAT16_ROWS
        self._keeps_weight = not self._packed and weight.dtype == self._dtype
        self._laid_out = self._keeps_weight and isinstance(weight, Tensor)

    def lay_out(self) -> None:
        """Converts and packs the weight, once."""
        if self._laid_out:
            return
        # inference_mode: the packed layout has no autograd support.
        with torch.inference_mode():
            self._keeps_narrow &= native.library() is not None or native.building()
            stored = self._stored()
            self._narrow = stored.contiguous() if self._keeps_narrow else None
            weight = stored.to(self._dtype)
            if self._copied and self._narrow is None:
                self._copy = weight.t().contiguous()
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if self._packed else weight
        self._laid_out = True

    def _stored(self) -> Tensor:
        """The weight, unless it is packed already."""
        if isinstance(self._weight, Tensor):
            return self._weight
        return self._weight.copy() if self._keeps_narrow or self._keeps_weight else self._weight.view()

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)  # nothing quantizes the input of a layer without a quantizer
        if self._keeps_narrow and x.shape[0] <= self._narrow_rows:
            if self._narrow is None:
                self._narrow = self._stored().contiguous()
            found = native_ops.linear(x, self._narrow, self.bias)
            if found is not None:
                return found
        if not self._laid_out:
            self.lay_out()
        if self._copy is not None and x.shape[0] <= (COPY_ROWS if torch.get_num_threads() == 1 else 1):
            return torch.mm(x, self._copy) if self.bias is None else torch.addmm(self.bias, x, self._copy)
        if not self._packed:
            return F.linear(x, self._stored(), self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return out


class Int8Linear:
    """A weight in int8 with a scale for each output channel; the input in 8 bits with a scale for each token. For CPUs.

    oneDNN sums in int32, which is exact, so that a token's result does not depend on the other tokens of its step. It
    has fast kernels for unsigned inputs alone, hence the zero point of 128 (`quantize`). The kernel knows one input
    scale for all rows; those of the tokens are multiplied afterwards.

    A call of that kernel costs 27 µs or more, so a weight of up to `COPY_BYTES` also has a plain copy, from which
    `torch._int_mm` computes a single row: the same sums at 2 µs a call. So do the compiled kernels (`native`) of up to
    `COPY_ROWS` rows.

    Measured on one core with AVX512-VNNI that others used too, 6144 × 1024: 1.6 ms for 64 rows, 11.6 for 512 and 64
    for 2,048; `torch._int_mm` with the scales applied 2.2, 17 and 122; float32 packed for oneDNN 6.6, 44 and 232. One
    row takes as long as reading the weight in both int8 kernels (7.1 ms for 74 MiB); 4 rows take 8.0 ms, 12.5 with
    `_int_mm`. `torch.ops.aten._weight_int8pack_mm` takes 60 ms for one row.

    Args:
        weight: ``[outputs, inputs]``. Not kept.
        bias: ``[outputs]`` or None.
        dtype: of the output; None: the weight's.
        copied: keep a copy for single rows where `linear_bytes` counts one.
    """

    quantizer = Quantizer(torch.uint8)

    def __init__(
        self,
        weight: Tensor | FileWeight,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        copied: bool = True,
    ) -> None:
        self._weight: Tensor | FileWeight | None = weight  # None once it is laid out
        self._packed = self._scale = torch.empty(0)
        self._copied = copied and weight.shape.numel() <= COPY_BYTES
        self._row_copy: Tensor | None = None  # [outputs, inputs], with the sum of each output's weights
        self._sums = torch.empty(0, dtype=torch.int32)
        self._zero_point = torch.zeros(1, dtype=torch.int32)
        self._sign_bit = torch.tensor(ZERO_POINT, dtype=torch.uint8)
        self._bias, self._dtype = bias, dtype or weight.dtype

    def lay_out(self) -> None:
        """Quantizes and packs the weight, once."""
        if self._weight is None:
            return
        # inference_mode: the packed layout has no autograd support.
        with torch.inference_mode():
            weight = self._weight if isinstance(self._weight, Tensor) else self._weight.view()
            values, scale = quantize_weight(weight, torch.int8)
            self._packed = torch.ops.onednn.qlinear_prepack(values, None)
        if self._copied:
            self._row_copy, self._sums = values, values.sum(1, dtype=torch.int32)
        self._scale, self._weight = scale[:, 0].contiguous(), None

    def __call__(self, x: Rows) -> Tensor:
        if self._weight is not None:
            self.lay_out()
        values, scales = quantize(x, self.quantizer) if isinstance(x, Tensor) else x
        if self._row_copy is not None and values.shape[0] <= COPY_ROWS:
            rows = QuantizedRows(values, scales)
            found = native_ops.int8_linear(rows, self._row_copy, self._scale, self._sums, self._bias)
            if found is not None:
                return found.to(self._dtype)
        if self._row_copy is not None and values.shape[0] == 1:
            signed = values.bitwise_xor(self._sign_bit).view(torch.int8)  # less the zero point
            out = torch._int_mm(signed, self._row_copy.t()).mul(self._scale)
        else:
            out = torch.ops.onednn.qlinear_pointwise(
                *(values, 1.0, ZERO_POINT, self._packed, self._scale, self._zero_point, None),
                *(1.0, 0, torch.float32, "none", [], ""),
            )
        out.mul_(scales)
        return (out if self._bias is None else out.add_(self._bias)).to(self._dtype)


def linear_bytes(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, *, int8: bool, copied: bool = True
) -> int:
    """Bytes of a weight ``[outputs, inputs]`` as a `PlainLinear` in ``dtype`` or an `Int8Linear` stores it.

    In int8, each output channel also has its scale and its sum for the inputs' zero point; in the copy too.
    """
    count = math.prod(shape)
    size = count * (1 if int8 else dtype.itemsize)
    narrow = not int8 and packs(device, dtype) and 4 * count <= NARROW_BYTES
    if dtype == torch.float32 and size <= COPY_BYTES:
        narrow = False  # the copy below is as large, or larger
    if copied and narrow and native.expected():  # at most: a checkpoint in float32 has no bfloat16 to keep
        return size + 2 * count
    if copied and (size <= COPY_BYTES if int8 else _copies(device, shape, dtype)):
        size = 2 * size + (4 * shape[0] if int8 else 0)
    return size + (8 * shape[0] if int8 else 0)


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


def _copies(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether `PlainLinear` has a copy for few rows beside the packed weight."""
    return dtype == torch.float32 and packs(device, dtype) and math.prod(shape) * dtype.itemsize <= COPY_BYTES
