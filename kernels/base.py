"""The elementwise operations of a decoder: `ops` (torch) specifies each, `triton_ops` is faster on a GPU."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .addends import Addends
from .kv_pool import KVLayer
from .ops import Activation, Routing
from .quantize import QuantizedRows, Quantizer


class Ops(Protocol):
    """Both modules implement this. See `ops` for shapes, dtypes and effects."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `ops.rms_norm`."""
        ...

    def add_rms_norm(self, x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `ops.add_rms_norm`."""
        ...

    def add_rms_norm_quantized(
        self, x: Tensor | Addends, residual: Tensor, weight: Tensor, eps: float, quantizer: Quantizer
    ) -> QuantizedRows:
        """See `ops.add_rms_norm_quantized`."""
        ...

    def gate_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `ops.gate_mul`."""
        ...

    def gate_mul_quantized(self, gate_up: Tensor, activation: Activation, quantizer: Quantizer) -> QuantizedRows:
        """See `ops.gate_mul_quantized`."""
        ...

    def quantize(self, x: Tensor, quantizer: Quantizer) -> QuantizedRows:
        """See `quantize.quantize`."""
        ...

    def fp8_linear(
        self, x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """See `ops.fp8_linear`."""
        ...

    def rope_write(
        self,
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
        ...

    def route(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        """See `ops.route`."""
        ...

    def apply_sinks(self, out: Tensor, lse: Tensor, sinks: Tensor) -> None:
        """See `ops.apply_sinks`."""
        ...

    def copy_pages(self, pages: Tensor, copies: Tensor) -> None:
        """See `ops.copy_pages`."""
        ...

    def page_indices(self, table: Tensor, rows: Tensor, indptr: Tensor, max_pages: int, out: Tensor) -> None:
        """See `ops.page_indices`."""
        ...
