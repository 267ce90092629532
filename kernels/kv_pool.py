"""The paged KV pool: keys and values of every layer, in pages that the radix tree hands out.

Everything that depends on how a token's keys and values are stored is here: the bytes of a token, how they are written,
how pages are copied, and the view that kernels read (`KVLayer`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COPY_BYTES = 64 * 1024 * 1024  # most bytes in flight while pages are copied


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the pool, without its number of pages."""

    num_layers: int
    page_size: int  # tokens
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in every layer."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in every layer."""
        return self.page_size * self.token_bytes


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer of the pool. ``k`` and ``v`` are views of ``data``."""

    data: Tensor  # [2, pages, page_size, kv_heads, head_dim]: keys, values
    k: Tensor  # [pages, page_size, kv_heads, head_dim]
    v: Tensor

    @classmethod
    def of(cls, data: Tensor) -> KVLayer:
        """``data``: contiguous."""
        return cls(data, data[0], data[1])

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores T tokens. ``slots``: int64 ``[T]``, page * page_size + offset; ``k``, ``v``: ``[T, kv_heads, D]``."""
        self.k.flatten(0, 1).index_copy_(0, slots, k)
        self.v.flatten(0, 1).index_copy_(0, slots, v)


class KVPool:
    """Pages of keys and values.

    Args:
        data: ``[layers, 2, pages, page_size, kv_heads, head_dim]``, contiguous. Must hold finite values everywhere:
            what attention masks is multiplied by 0, and 0 * NaN would be NaN.
    """

    def __init__(self, data: Tensor) -> None:
        num_layers, _, self.num_pages, page_size, kv_heads, head_dim = data.shape
        self.layout = KVLayout(num_layers, page_size, kv_heads, head_dim, data.dtype)
        self.device = data.device
        self._data = data
        self._layers = [KVLayer.of(layer) for layer in data]

    @classmethod
    def allocate(cls, layout: KVLayout, num_pages: int, device: torch.device) -> KVPool:
        """A pool of zeros.

        On a CPU the memory comes from calloc, which the kernel zeroes page by page as it is first written: 4 GiB cost
        5 ms instead of seconds, and memory that is never used is never taken.
        """
        shape = (layout.num_layers, 2, num_pages, layout.page_size, layout.kv_heads, layout.head_dim)
        if device.type != "cpu":
            return cls(torch.zeros(shape, dtype=layout.dtype, device=device))
        size = math.prod(shape) * layout.dtype.itemsize
        return cls(torch.from_numpy(np.zeros(size, np.uint8)).view(layout.dtype).view(shape))

    def layer(self, index: int) -> KVLayer:
        """The view of one layer that kernels read and write."""
        return self._layers[index]

    def fragments(self) -> Tensor:
        """The memory as bytes, whatever its format: uint8 ``[rows, pages, bytes]``, a view. ``fragments()[:, p]`` is
        all of page p."""
        return self._data.flatten(3).flatten(0, 1).view(torch.uint8)

    def copy_pages(self, copies: Tensor) -> None:
        """Copies whole pages in every layer: copy-on-write of a page whose first tokens are reused.

        ``copies``: int64 ``[C, 2]`` of (source, destination), on the pool's device. In each layer ALL sources are
        gathered before a destination is written, so a page may be the source of one pair and the destination of
        another.
        """
        sources, destinations = copies.unbind(1)
        layers = max(1, self.layout.num_layers * COPY_BYTES // max(self.layout.page_bytes * len(copies), 1))
        for some in self._data.split(layers):
            some.index_copy_(2, destinations, some.index_select(2, sources))
