"""The elementwise operations of a decoder: `ops` (torch) specifies each, `triton_ops` is faster on a GPU."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .kv_pool import KVLayer


class Ops(Protocol):
    """Both modules implement this. See `ops` for shapes, dtypes and effects."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

    def gelu_mul(self, gate_up: Tensor, approximate: str = "tanh") -> Tensor: ...

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
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def page_indices(self, table: Tensor, rows: Tensor, indptr: Tensor, max_pages: int, out: Tensor) -> None: ...
