"""Long chunks over quantized pages: FlashInfer reads a copy of their pages in the model's dtype.

A chunk of hundreds of tokens reads each key hundreds of times, so converting it once, in a pass of its own, costs less
than in every tile of queries. The copy is one layer's, made anew for each layer, of the pages that the step's chunks
read, each once however many chunks share it. It has the values that the pages have, the chunk's own tokens included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arrays import Int32
from ..kv_pool import KVPool
from ..staging import Staging
from ..triton_launch import kernel
from .base import AttentionBackend, AttentionBatch, StepShape
from .flashinfer_backend import LONG_CHUNK
from .kv_tiles import load_values, restore_values

MakeLong = Callable[[KVPool, Tensor], AttentionBackend]


class DequantizedChunks:
    """See `AttentionBackend`. Steps that are captured, short chunks and decodes are left to ``flat``.

    Args:
        pool: quantized.
        flat: reads quantized pages.
        make_long: the backend of long chunks over a pool and a page table, int32 ``[rows, columns]`` on the device.
        max_requests: the most requests of a step.
        row_pages: pages of the longest request.
    """

    captures = True
    joint = False
    saved_keys = 0

    def __init__(
        self, pool: KVPool, flat: AttentionBackend, make_long: MakeLong, max_requests: int, row_pages: int
    ) -> None:
        layout, device = pool.layout, pool.device
        self._pool, self._flat = pool, flat
        copied, pages = layout.dequantized(row_pages)
        self._copy = KVPool.allocate(copied, pages, device)
        self._table = torch.zeros((max_requests, row_pages), dtype=torch.int32, device=device)
        # All layers are the one copy.
        every = self._copy.data.expand(layout.num_layers, *self._copy.data.shape[1:])
        self._long = make_long(KVPool(every, replace(copied, num_layers=layout.num_layers)), self._table)
        self._staging = Staging(0, torch.int32, device)
        self._pages: Tensor | None = None  # of the step's long chunks
        self._chunks_from = 0  # query token

    def forms(self, shape: StepShape) -> list[StepShape]:
        """See `AttentionBackend.forms`."""
        return self._flat.forms(shape)

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> StepShape | None:
        """See `AttentionBackend.plan`."""
        n = batch.num_decodes
        found = self._chunk_pages(batch) if shape is None else None
        if found is None:
            self._pages = None
            return self._flat.plan(batch, shape)
        pages, table = found
        rows, columns = table.shape
        self._staging.begin(len(pages) + table.size)
        self._pages, staged = self._staging.put(pages), self._staging.put(table.ravel())
        self._staging.send()
        self._table[:rows, :columns].copy_(staged.view(rows, columns))
        self._chunks_from = n
        if n:
            decodes = replace(batch, rows=batch.rows[:n], q_lens=batch.q_lens[:n], kv_lens=batch.kv_lens[:n])
            self._flat.plan(decodes)
        chunks = replace(
            batch,
            rows=np.arange(rows, dtype=np.int32),
            q_lens=batch.q_lens[n:],
            kv_lens=batch.kv_lens[n:],
            num_decodes=0,
            page_table=self._table,
            host_page_table=table,
            written=None,
        )
        self._long.plan(chunks)
        return None

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.run`."""
        if self._pages is None:
            return self._flat.run(layer, q, k, v, out)
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        at = self._chunks_from
        if at:
            self._flat.run(layer, q[:at], k[:at], v[:at], out[:at])
        dequantize(self._pool, layer, self._pages, self._copy.data[0])
        self._long.run(layer, q[at:], k[at:], v[at:], out[at:])
        return out

    def _chunk_pages(self, batch: AttentionBatch) -> tuple[Int32, Int32] | None:
        """The pages that the step's chunks read, ``[P]``, and each chunk's indices into them, ``[chunks, columns]``;
        None where chunks are short or the copy has no room."""
        n = batch.num_decodes
        own = batch.rows[n:] != len(batch.host_page_table) - 1  # tree attention reads those of the scratch row
        lengths = batch.q_lens[n:][own].astype(np.int64)
        if not len(lengths) or (lengths * lengths).sum() < LONG_CHUNK * lengths.sum():
            return None
        counts = -(-batch.kv_lens[n:] // batch.page_size)
        columns = int(counts.max())
        read = np.arange(columns) < counts[:, None]
        table = batch.host_page_table[batch.rows[n:], :columns]
        pages, places = np.unique(table[read], return_inverse=True)
        if len(pages) > self._copy.num_pages:
            return None
        indices = np.zeros(table.shape, np.int32)
        indices[read] = places
        return pages.astype(np.int32), indices


@kernel()
def _dequantize_pages(
    pages_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    v_out_ptr: tl.tensor,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIDES: tl.constexpr,
    K_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """One page and head. ``out``: ``[P, PAGE_SIZE, KV_HEADS, D]``."""
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(pages_ptr + index).to(tl.int64)
    token = tl.arange(0, TOKENS)
    mask = token < PAGE_SIZE
    MASKED: tl.constexpr = TOKENS != PAGE_SIZE
    out = ((index * PAGE_SIZE + token) * KV_HEADS + head) * D
    at = page * STRIDES[0] + token * STRIDES[1] + head * STRIDES[2]
    scales_at = page * STRIDES[6] + token * STRIDES[7] + head * STRIDES[8]
    x = load_values(k_ptr, at, k_scales_ptr, scales_at, mask, K_FORMAT, MASKED, D, 64, TOKENS, D)
    x = restore_values(x, k_scales_ptr, scales_at, mask, K_FORMAT, False, MASKED, D)
    tl.store(k_out_ptr + out[:, None] + tl.arange(0, D)[None, :], x, mask[:, None])
    at = page * STRIDES[3] + token * STRIDES[4] + head * STRIDES[5]
    scales_at = page * STRIDES[9] + token * STRIDES[10] + head * STRIDES[11]
    x = load_values(v_ptr, at, v_scales_ptr, scales_at, mask, V_FORMAT, MASKED, D, 64, TOKENS, D)
    x = restore_values(x, v_scales_ptr, scales_at, mask, V_FORMAT, True, MASKED, D)
    tl.store(v_out_ptr + out[:, None] + tl.arange(0, D)[None, :], x, mask[:, None])


def dequantize(pool: KVPool, layer: int, pages: Tensor, out: Tensor) -> None:
    """Copies pages of one layer, int32 ``[P]``, to the first of ``out`` in its dtype.

    ``out``: ``[2, pages, page_size, kv_heads, head_dim]``; head_dim is a power of two.
    """
    kv, layout = pool.layer(layer), pool.layout
    constants = (layout.kv_heads, layout.head_dim, layout.page_size, kv.strides, kv.k_format.name, kv.v_format.name)
    _dequantize_pages(
        (len(pages), layout.kv_heads, 1),
        (pages, kv.k, kv.v, kv.k_scales, kv.v_scales, out[0], out[1]),
        (),
        (*constants, triton.next_power_of_2(layout.page_size)),
        warps=4,
    )
