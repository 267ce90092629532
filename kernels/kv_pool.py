"""The paged KV pool: keys and values of every layer, in pages that the radix tree hands out.

Everything that depends on how a token's keys and values are laid out is here: the bytes of a token, how they are
written and read, how pages are copied, and the view that kernels read (`KVLayer`). `kv_format` has the formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kv_format import CHOICES, PLAIN, KVFormat

DEQUANTIZED_BYTES = 256 * 1024 * 1024  # most of `KVLayout.dequantized`: 64k tokens of 8 heads of 128 in bfloat16
ALIGNMENT = 16  # bytes: a quantized page is a multiple of the widest load


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the pool, without its number of pages."""

    num_layers: int
    page_size: int  # tokens
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of the model: what is written and what is read back
    k_format: KVFormat = PLAIN
    v_format: KVFormat = PLAIN

    @classmethod
    def of(
        cls,
        choice: str,
        num_layers: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> KVLayout:
        """The layout of ``--kv-cache-dtype`` ``choice``."""
        return cls(num_layers, page_size, kv_heads, head_dim, dtype, *CHOICES[choice])

    def __str__(self) -> str:
        k, v = self.names
        stored = k if k == v else f"keys in {k}, values in {v}"
        of = f" of {str(self.dtype).removeprefix('torch.')}" if self.quantized else ""
        return (
            f"{self.num_layers} layers of {self.kv_heads} heads of {self.head_dim}, {stored}{of}, "
            f"pages of {self.page_size} tokens"
        )

    @property
    def quantized(self) -> bool:
        """Whether keys or values are stored in another format than the model's dtype."""
        return not (self.k_format.plain and self.v_format.plain)

    @property
    def names(self) -> tuple[str, str]:
        """The formats of keys and values, for people."""
        dtype = str(self.dtype).removeprefix("torch.")
        k, v = (dtype if each.plain else each.name for each in (self.k_format, self.v_format))
        return k, v

    @property
    def head_bytes(self) -> int:
        """Bytes of one token's keys and values in one head of one layer, scales included."""
        return sum(self._parts()) // (self.page_size * self.kv_heads)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in every layer."""
        return -(-self.page_bytes // self.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in every layer."""
        return self.num_layers * (_align(sum(self._parts())) if self.quantized else sum(self._parts()))

    def dequantized(self, row_pages: int) -> tuple[KVLayout, int]:
        """The layout and the number of pages of a copy of one layer in the model's dtype, which long chunks read.

        ``row_pages``: of the longest request.
        """
        layout = replace(self, num_layers=1, k_format=PLAIN, v_format=PLAIN)
        return layout, min(2 * row_pages, DEQUANTIZED_BYTES // layout.page_bytes)

    def data_shape(self, num_pages: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the pool's memory. A page is index p of the third dimension in all layouts.

        Plain: ``[layers, 2, pages, page_size, kv_heads, head_dim]``. Quantized: uint8 ``[layers, 1, pages, bytes]``,
        where a page is its keys, its values, the keys' scales and the values' scales, each ``[kv_heads, page_size,
        bytes of one head]``: a kernel reads one head, whose rows of 4-bit channels would be short bursts otherwise.
        Of fp8, the scales of a key and of its value are the lower and the upper half of one 32-bit word: a GPU copies
        no less to shared memory asynchronously.
        """
        if self.quantized:
            return (self.num_layers, 1, num_pages, self.page_bytes // self.num_layers), torch.uint8
        shape = self.num_layers, 2, num_pages, self.page_size, self.kv_heads, self.head_dim
        return shape, self.dtype

    @property
    def _scale_words(self) -> bool:
        """Whether scales are words that keys and values share."""
        return self.v_format.name == "fp8"

    def _parts(self) -> tuple[int, int, int, int]:
        """Bytes of keys, values, key scales and value scales of one page in one layer. Words count as values'."""
        heads, formats = self.page_size * self.kv_heads, (self.k_format, self.v_format)
        k, v = (heads * each.data_bytes(self.head_dim, self.dtype) for each in formats)
        k_scales, v_scales = (heads * each.scale_bytes(self.head_dim) for each in formats)
        if self._scale_words:
            k_scales, v_scales = 0, heads * 4
        return k, v, k_scales, v_scales

    def layer(self, data: Tensor) -> KVLayer:
        """The view of one layer's ``data``, which is shaped as `data_shape` says, without the first dimension."""
        if not self.quantized:
            empty = data[0, ..., :0]
            return KVLayer(data[0], data[1], empty, empty)
        sizes, formats = self._parts(), (self.k_format, self.v_format)
        parts = data[0, :, : sum(sizes)].split(sizes, dim=1)
        k, v, k_scales, v_scales = (
            part.unflatten(1, (self.kv_heads, self.page_size, -1)).transpose(1, 2) for part in parts
        )
        k, v = (x.view(self.dtype) if each.plain else x for x, each in zip((k, v), formats, strict=True))
        record = PageRecord(data.shape[2], sizes[0], sizes[0] + sizes[1], sum(sizes[:3]))
        if self._scale_words:
            k_scales, record = v_scales, record._replace(value_scales=record.value_scales + 2)
        return KVLayer(k, v, k_scales, v_scales, *formats, record)


class PageRecord(NamedTuple):
    """Bytes of a quantized page in one layer, and of what lies before its values, key scales and value scales."""

    page: int
    values: int
    key_scales: int
    value_scales: int


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer of the pool. ``k`` and ``v`` have the model's dtype where their format is plain, else uint8."""

    k: Tensor  # [pages, page_size, kv_heads, head_dim, or the bytes of one head]; may be strided
    v: Tensor
    k_scales: Tensor  # uint8 [pages, page_size, kv_heads, bytes of one head's scales]; of fp8 both are the same words
    v_scales: Tensor
    k_format: KVFormat = PLAIN
    v_format: KVFormat = PLAIN
    record: PageRecord | None = None  # where keys or values are quantized
    # Scales of keys and of values in a calibrated checkpoint, float32 [2, kv_heads]; None: of each token and head.
    static_scales: Tensor | None = None

    @classmethod
    def of(cls, data: Tensor) -> KVLayer:
        """Plain keys and values: contiguous ``[2, pages, page_size, kv_heads, head_dim]``."""
        empty = data[0, ..., :0]
        return cls(data[0], data[1], empty, empty)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of keys, values, key scales and value scales: between pages, tokens and heads, in elements of each tensor."""
        return tuple(x.stride(i) for x in (self.k, self.v, self.k_scales, self.v_scales) for i in range(3))

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores T tokens. ``slots``: int64 ``[T]``, page * page_size + offset; ``k``, ``v``: ``[T, kv_heads, D]``.

        Keys are stored as they are given: rotate them first where ``k_format.rotates_keys``.
        """
        k_static, v_static = (None, None) if self.static_scales is None else self.static_scales[..., None]
        k_scales, v_scales = self._scales()
        for x, data, scales, each, static in (
            (k, self.k, k_scales, self.k_format, k_static),
            (v, self.v, v_scales, self.v_format, v_static),
        ):
            encoded, encoded_scales = each.encode(x, static)
            _put(data, slots, encoded)
            if not each.plain:
                _put(scales, slots, encoded_scales)

    def read(self, index: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of whole pages (int64 ``[P]``), or of tokens (pages and offsets, int64 ``[T]`` each).

        Returns ``[P, page_size, kv_heads, D]`` or ``[T, kv_heads, D]`` each, in float32 where the format is not plain.
        Keys are as stored: see `write`.
        """
        k_scales, v_scales = self._scales()
        k = self.k_format.decode(self.k[index], k_scales[index])
        return k, self.v_format.decode(self.v[index], v_scales[index])

    def _scales(self) -> tuple[Tensor, Tensor]:
        """The scales of keys and of values: of fp8, the halves of words."""
        if self.v_format.name == "fp8":
            return self.k_scales[..., :2], self.v_scales[..., 2:]
        return self.k_scales, self.v_scales


class KVPool:
    """Pages of keys and values.

    Args:
        data: of the layout's `KVLayout.data_shape`, contiguous. Must hold finite values everywhere: what attention
            masks is multiplied by 0, and 0 * NaN would be NaN.
        layout: default: plain, as ``data`` is shaped.
    """

    def __init__(self, data: Tensor, layout: KVLayout | None = None) -> None:
        if layout is None:
            num_layers, _, _, page_size, kv_heads, head_dim = data.shape
            layout = KVLayout(num_layers, page_size, kv_heads, head_dim, data.dtype)
        self.num_pages = data.shape[2]
        self.layout = layout
        self.device = data.device
        self.data = data
        self._layers = [layout.layer(layer) for layer in data]

    @classmethod
    def allocate(cls, layout: KVLayout, num_pages: int, device: torch.device) -> KVPool:
        """A pool of zeros.

        On a CPU the memory comes from calloc, which the kernel zeroes page by page as it is first written: 4 GiB cost
        5 ms instead of seconds, and memory that is never used is never taken.
        """
        shape, dtype = layout.data_shape(num_pages)
        if device.type != "cpu":
            return cls(torch.zeros(shape, dtype=dtype, device=device), layout)
        size = math.prod(shape) * dtype.itemsize
        return cls(torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape), layout)

    def layer(self, index: int) -> KVLayer:
        """The view of one layer that kernels read and write."""
        return self._layers[index]

    def fragments(self) -> Tensor:
        """The memory as bytes, whatever its format: uint8 ``[rows, pages, bytes]``, a view. ``fragments()[:, p]`` is
        all of page p."""
        return self.data.flatten(3).flatten(0, 1).view(torch.uint8)

    def set_static_scales(self, index: int, scales: Tensor) -> None:
        """Makes layer ``index`` quantize by a checkpoint's own fp8 scales: ``[2, kv_heads]``, of keys and of values."""
        scales = scales.to(self.device, torch.float32).contiguous()
        self._layers[index] = replace(self._layers[index], static_scales=scales)


def _put(pages: Tensor, slots: Tensor, x: Tensor) -> None:
    """Stores ``x`` ``[T, ...]`` at ``slots`` of ``pages`` ``[pages, page_size, ...]``."""
    if pages.is_contiguous():
        pages.flatten(0, 1).index_copy_(0, slots, x)
    else:
        pages.index_put_((slots // pages.shape[1], slots % pages.shape[1]), x)


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
