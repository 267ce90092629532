"""The operations of `ops`, and products for `linear`: compiled kernels (`native`) for few rows, torch for more."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, ops
from .addends import Addends
from .kv_pool import KVLayer
from .ops import Activation, apply_sinks, copy_pages, fp8_linear, page_indices, route
from .quantize import QuantizedRows, Quantizer, quantize

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quantized",
    "apply_sinks",
    "copy_pages",
    "fp8_linear",
    "gate_mul",
    "gate_mul_quantized",
    "page_indices",
    "quantize",
    "rms_norm",
    "rope_write",
    "route",
]


def takes(x: Tensor) -> bool:
    """Whether the kernels take these rows ``[T, size]``: few, contiguous, in float32 or bfloat16, of full vectors."""
    return (
        x.shape[0] <= native.ROWS
        and x.is_contiguous()
        and x.shape[-1] % native.LANES == 0
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    library = native.library()
    if library is None or x.dim() != 2 or not takes(x):
        return ops.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    sizes = x.shape[0], x.shape[1], x.dtype == torch.bfloat16
    library.add_rms_norm(None, x.data_ptr(), weight.data_ptr(), eps, *sizes, out.data_ptr(), None, None)
    return out


def add_rms_norm(x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.add_rms_norm`."""
    library = native.library()
    if library is None or not isinstance(x, Tensor) or not x.is_contiguous() or not takes(residual):
        return ops.add_rms_norm(x, residual, weight, eps)
    out = torch.empty_like(x)
    sizes = x.shape[0], x.shape[1], x.dtype == torch.bfloat16
    pointers = x.data_ptr(), residual.data_ptr(), weight.data_ptr()
    library.add_rms_norm(*pointers, eps, *sizes, out.data_ptr(), None, None)
    return out


def add_rms_norm_quantized(
    x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float, quantizer: Quantizer
) -> QuantizedRows:
    """See `ops.add_rms_norm_quantized`."""
    library = native.library()
    if (
        library is None
        or not isinstance(x, Tensor)
        or quantizer.dtype != torch.uint8
        or not x.is_contiguous()
        or not takes(residual)
    ):
        return ops.add_rms_norm_quantized(x, residual, weight, eps, quantizer)
    out, row = _quantized(x.shape[0], x.shape[1])
    sizes = x.shape[0], x.shape[1], x.dtype == torch.bfloat16
    pointers = x.data_ptr(), residual.data_ptr(), weight.data_ptr()
    library.add_rms_norm(*pointers, eps, *sizes, row.data_ptr(), out.values.data_ptr(), out.scales.data_ptr())
    return out


def gate_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `ops.gate_mul`."""
    library, size = native.library(), gate_up.shape[-1] // 2
    if library is None or activation != "silu" or size % native.LANES or not takes(gate_up):
        return ops.gate_mul(gate_up, activation)
    out = gate_up.new_empty(gate_up.shape[0], size)
    bf16 = gate_up.dtype == torch.bfloat16
    library.silu_mul(gate_up.data_ptr(), gate_up.shape[0], size, bf16, out.data_ptr(), None, None)
    return out


def gate_mul_quantized(gate_up: Tensor, activation: Activation, quantizer: Quantizer) -> QuantizedRows:
    """See `ops.gate_mul_quantized`."""
    library, size = native.library(), gate_up.shape[-1] // 2
    if (
        library is None
        or activation != "silu"
        or quantizer.dtype != torch.uint8
        or size % native.LANES
        or not takes(gate_up)
    ):
        return ops.gate_mul_quantized(gate_up, activation, quantizer)
    out, row = _quantized(gate_up.shape[0], size)
    pointers = row.data_ptr(), out.values.data_ptr(), out.scales.data_ptr()
    library.silu_mul(gate_up.data_ptr(), gate_up.shape[0], size, gate_up.dtype == torch.bfloat16, *pointers)
    return out


def rope_write(
    qkv: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    kv: KVLayer,
    slots: Tensor,
    qk_norm: Tensor | None = None,
    eps: float = 0.0,
    norm_rotated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.rope_write`."""
    library, half = native.library(), cos.shape[1]
    if (
        library is None
        or half % native.LANES
        or not takes(qkv)
        or not (kv.k_format.plain and kv.v_format.plain)
        or kv.k.dtype != qkv.dtype
    ):
        return ops.rope_write(qkv, heads, cos, sin, kv, slots, qk_norm, eps, norm_rotated)
    rows, all_heads, dim = qkv.shape
    kv_heads = (all_heads - heads) // 2
    norm = None if qk_norm is None else qk_norm.data_ptr()
    library.rope_write(
        *(qkv.data_ptr(), rows, heads, kv_heads, dim, half, cos.data_ptr(), sin.data_ptr(), cos.stride(0)),
        *(norm, eps, norm_rotated, slots.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), qkv.dtype == torch.bfloat16),
    )
    q, k, v = qkv.split_with_sizes([heads, kv_heads, kv_heads], 1)
    return q, k, v


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x @ weight.T + bias`` summed in float32, for a weight ``[outputs, inputs]`` in bfloat16; None: not here.

    Args:
        x: ``[rows, inputs]`` in float32 or bfloat16, as is the result.
        bias: ``[outputs]``, or None.
    """
    library, (outputs, inputs) = native.library(), weight.shape
    if library is None or inputs % native.LANES or not x.is_contiguous():
        return None
    dtype, x, rows = x.dtype, x.float(), x.shape[0]
    bias = None if bias is None else bias.float().contiguous()
    out = x.new_empty(rows, outputs)
    pointers = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
    library.linear(*pointers, rows, outputs, inputs, None, None, None, torch.get_num_threads())
    return out.to(dtype)


def int8_linear(x: QuantizedRows, weight: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor | None:
    """The same in int8, from unsigned rows with a scale each.

    Args:
        x: uint8 with a zero point (`quantize.quantize`).
        weight: int8 ``[outputs, inputs]``.
        scale, sums: of each output's weights, float32 and int32 ``[outputs]``.
        bias: ``[outputs]`` or None.
    """
    library, (outputs, inputs) = native.library(), weight.shape
    if library is None or inputs % (4 * native.LANES) or not x.values.is_contiguous() or not _fits(bias):
        return None
    rows = x.values.shape[0]
    out = torch.empty(rows, outputs)
    pointers = x.values.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
    scales = x.scales.data_ptr(), scale.data_ptr(), sums.data_ptr()
    library.linear(*pointers, rows, outputs, inputs, *scales, torch.get_num_threads())
    return out


def _fits(bias: Tensor | None) -> bool:
    return bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())


def _quantized(rows: int, size: int) -> tuple[QuantizedRows, Tensor]:
    """Room for quantized rows, and for one of floats."""
    return QuantizedRows(torch.empty(rows, size, dtype=torch.uint8), torch.empty(rows, 1)), torch.empty(size)
