"""The elementwise operations of a decoder: `ops` (torch) specifies each, `triton_ops` is faster on a GPU."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .kv_pool import KVLayer


class Ops(Protocol):
    """Both modules implement this. See `ops` for shapes, dtypes and effects."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `ops.rms_norm`."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `ops.add_rms_norm`."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `ops.silu_mul`."""
        ...

    def gelu_mul(self, gate_up: Tensor, approximate: str = "tanh") -> Tensor:
        """See `ops.gelu_mul`."""
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ops.rope_write`."""
        ...

    def page_indices(self, table: Tensor, rows: Tensor, indptr: Tensor, max_pages: int, out: Tensor) -> None:
        """See `ops.page_indices`."""
        ...
