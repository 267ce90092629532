"""How a page of the KV pool is stored in a lower tier: byte for byte, or rounded to float8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.kv_pool import KVLayout

_FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # of float8 e4m3
_SCALE_BYTES = 2  # bfloat16, one for the keys or values of one token in one head


@dataclass(frozen=True, slots=True)
class PageFormat:
    """Converts n pages between the pool's fragments, uint8 [rows, n, width], and records, uint8 [n, page_bytes].

    ``fp8``: keys and values of 16 or 32 bits are stored as float8 e4m3 with a bfloat16 scale for each token and head,
    about half the bytes of bfloat16. What comes back is rounded, with an error of at most 1/28 of the largest value of
    the token's head. The pool must be a plain one (`KVLayout.quantized` is False).
    """

    layout: KVLayout
    fp8: bool = False

    @property
    def page_bytes(self) -> int:
        """Bytes of a record."""
        if not self.fp8:
            return self.layout.page_bytes
        vectors = self.layout.page_bytes // (self.layout.head_dim * self.layout.dtype.itemsize)
        return vectors * (self.layout.head_dim + _SCALE_BYTES)

    def encode(self, fragments: Tensor) -> Tensor:
        """Records of these fragments, contiguous."""
        if self.fp8:
            rows, n, _ = fragments.shape
            vectors = fragments.contiguous().view(self.layout.dtype).view(rows, n, -1, self.layout.head_dim).float()
            scales = vectors.abs().amax(-1, keepdim=True).mul_(1 / _LARGEST)
            scales = scales.clamp_(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
            rounded = vectors.div_(scales).clamp_(-_LARGEST, _LARGEST).to(_FP8).view(torch.uint8)
            fragments = torch.cat((rounded, scales.view(torch.uint8)), dim=-1)
        return fragments.transpose(0, 1).reshape(fragments.shape[1], -1)

    def decode(self, records: Tensor) -> Tensor:
        """The fragments of these records."""
        rows = self.layout.num_layers * (1 if self.layout.quantized else 2)
        fragments = records.view(len(records), rows, -1).transpose(0, 1)
        if not self.fp8:
            return fragments
        dim = self.layout.head_dim
        stored = fragments.reshape(rows, len(records), -1, dim + _SCALE_BYTES)
        scales = stored[..., dim:].contiguous().view(torch.bfloat16)
        values = stored[..., :dim].contiguous().view(_FP8).float().mul_(scales).to(self.layout.dtype)
        return values.view(torch.uint8).flatten(2)
