"""Attention in Triton, for any GPU it supports: no compiler on the machine, no library but Triton.

A step is at most two launches a layer, its decodes and its chunks, each followed by a merge if key ranges were split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from ..staging import Staging
from .base import AttentionBatch, Int64, LayerSpec, StepShape
from .split import ITEM_FIELDS, MERGE_FIELDS, Bounds, cut
from .triton_kernels import attend, merge

HEAD_DIMS = range(16, 257)
MERGE_PIECES = 16  # partial results read at a time
CAPTURED_CHUNK = 16  # query tokens that a chunk of a captured step is taken to have


class Tile(NamedTuple):
    """Sizes of a program of `attend`."""

    rows: int  # query tokens times query heads of a key head, padded
    keys: int  # read at a time
    warps: int
    stages: int
    per_sm: int  # programs to aim at for each multiprocessor: two rounds of what fits at once


def tile_for(rows: int, head_dim: int, itemsize: int) -> Tile:
    """The tile for requests of about so many rows. Larger ones spill registers (checked for sm_90 in the tests)."""
    if itemsize > 2:  # float32 is multiplied without tensor cores: for tests
        return Tile(16, 32, 4, 2, 4) if rows <= 16 else Tile(32, 32, 4, 2, 4)
    if head_dim > 128:
        return Tile(16, 32, 4, 3, 6) if rows <= 16 else Tile(64, 32, 8, 3, 2)
    if rows <= 16:
        return Tile(16, 64, 2, 3, 8)
    return Tile(64, 64, 4, 3, 4) if rows <= 64 else Tile(128, 64, 8, 3, 2)


@dataclass(slots=True)
class _Call:
    """One launch of `attend`: what it computes, on the device, and how."""

    tile: Tile
    tokens: int  # query tokens of a tile
    items: Tensor  # int32 [N * ITEM_FIELDS]
    merges: Tensor  # int32 [M * MERGE_FIELDS]


@dataclass(slots=True)
class _Members:
    """The decodes or the chunks of a step."""

    rows: Int64
    firsts: Int64  # query tokens
    q_lens: Int64
    kv_lens: Int64
    typical: int  # query tokens of the request that the average query token is in
    longest: int  # the most query tokens of a request
    padded: tuple[int, int] | None = None  # the most requests and query tokens of the shape


class TritonAttention:
    """See `AttentionBackend`. `plan` and `run` are for one stream.

    Which requests are planned with which tile depends, with a `StepShape`, on the shape alone, and so do the grids and
    every address that `run` hands to a kernel: plan, capture the `run` calls, and from then on plan and replay.

    Args:
        pool: ``[layers, 2, pages, page_size, kv_heads, head_dim]``, head_dim 16 to 256.
        layers: one spec a layer; scales are positive.
        num_heads: query heads, a multiple of kv_heads.
        max_requests, max_tokens: of one step. A larger one moves the buffers, which shapes captured before would miss.
    """

    captures = True

    def __init__(
        self, pool: Tensor, layers: list[LayerSpec], num_heads: int, max_requests: int = 1024, max_tokens: int = 16384
    ) -> None:
        _, _, _, self._page_size, kv_heads, self._head_dim = pool.shape
        if self._head_dim not in HEAD_DIMS or num_heads % kv_heads:
            raise ValueError(f"no kernel for {num_heads} and {kv_heads} heads of {self._head_dim} channels")
        if any(spec.scale <= 0 for spec in layers):
            raise ValueError("scales must be positive")
        self._pool, self._layers = [(kv[0], kv[1]) for kv in pool], layers
        self._heads, self._kv_heads, self._group = num_heads, kv_heads, num_heads // kv_heads
        self._itemsize = pool.element_size()
        self._precision = "ieee" if pool.dtype == torch.float32 else "tf32"
        self._block_d = triton.next_power_of_2(self._head_dim)
        self._processors = 4
        if pool.device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(pool.device).multi_processor_count
        self._windows = list(dict.fromkeys(spec.window for spec in layers))
        partial_rows = ints = 0
        for typical in (1, CAPTURED_CHUNK, max_tokens):  # a step's decodes and chunks take less than these together
            tile, tokens = self._tile(typical)
            target = self._target(tile)
            bounds = Bounds.of(max_requests + 1, max_tokens, tokens, target)
            partial_rows = max(partial_rows, Bounds.partial_rows(tokens, target))
            ints += bounds.items * ITEM_FIELDS + bounds.merges * MERGE_FIELDS
        shape = (partial_rows, num_heads, self._head_dim)
        self._partial = torch.empty(shape, dtype=torch.float32, device=pool.device)
        self._lse = torch.empty(shape[:2], dtype=torch.float32, device=pool.device)
        self._staging = Staging(ints * len(self._windows), torch.int32, pool.device)
        self._table = pool.new_empty((0, 0), dtype=torch.int32)  # the plan's
        self._calls: dict[int | None, list[_Call]] = {}

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> None:
        self._table = batch.page_table
        planned = []
        for members in self._members(batch, shape):
            tile, tokens = self._tile(members.typical)
            tokens = min(tokens, members.longest)
            target = self._target(tile)
            bounds = None if members.padded is None else Bounds.of(*members.padded, tokens, target)
            for window in self._windows:
                pieces = cut(
                    members.rows, members.firsts, members.q_lens, members.kv_lens, window, tokens, target, bounds
                )
                planned.append((window, tile, tokens, pieces))
        staging = self._staging
        staging.begin(sum(pieces.items.size + pieces.merges.size for *_, pieces in planned))
        self._calls = {window: [] for window in self._windows}
        for window, tile, tokens, pieces in planned:
            items, merges = staging.put(pieces.items.ravel()), staging.put(pieces.merges.ravel())
            self._calls[window].append(_Call(tile, tokens, items, merges))
        staging.send()

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if q.stride()[1:] != (self._head_dim, 1) or out.stride()[1:] != (self._head_dim, 1):
            raise ValueError("the heads of a token must be contiguous")
        spec = self._layers[layer]
        k_pages, v_pages = self._pool[layer]
        heads, dim, table = self._heads, self._head_dim, self._table
        for call in self._calls[spec.window]:
            tile, items, merges = call.tile, len(call.items) // ITEM_FIELDS, len(call.merges) // MERGE_FIELDS
            attend(
                (self._kv_heads, items, 1),
                (q, k_pages, v_pages, table, call.items, out, self._partial, self._lse),
                (),
                (
                    *(heads, self._kv_heads, dim, self._page_size, q.stride(0), out.stride(0), table.stride(0)),
                    *(spec.scale, spec.softcap or 0.0, spec.window or 0, self._precision),
                    *(tile.rows, tile.keys, self._block_d),
                ),
                warps=tile.warps,
                stages=tile.stages,
            )
            if merges:
                merge(
                    (heads, merges, call.tokens),
                    (self._partial, self._lse, call.merges, out),
                    (),
                    (heads, dim, out.stride(0), MERGE_PIECES, self._block_d),
                    warps=4,
                )
        return out

    def _members(self, batch: AttentionBatch, shape: StepShape | None) -> list[_Members]:
        """The decodes and the chunks, without those that are none."""
        n, found = batch.num_decodes, []
        decodes = n if shape is None else shape.decodes
        if decodes:
            # A padding decode has no keys.
            rows, kv_lens = (_pad(array[:n], decodes) for array in (batch.rows, batch.kv_lens))
            padded = None if shape is None else (decodes, decodes)
            found.append(_Members(rows, np.arange(decodes), np.ones(decodes, np.int64), kv_lens, 1, 1, padded))
        q_lens = batch.q_lens[n:].astype(np.int64)
        tokens, chunks = int(q_lens.sum()), len(q_lens)
        if shape is None and chunks:
            rows, kv_lens = (_pad(array[n:], chunks) for array in (batch.rows, batch.kv_lens))
            typical = -(-int((q_lens * q_lens).sum()) // tokens)
            found.append(_Members(rows, n + np.cumsum(q_lens) - q_lens, q_lens, kv_lens, typical, tokens))
        if shape is not None and shape.tokens:
            # Tokens that only pad are one more request, without keys.
            q_lens = np.append(q_lens, shape.tokens - tokens)
            rows, kv_lens = (_pad(array[n:], chunks + 1) for array in (batch.rows, batch.kv_lens))
            firsts = decodes + np.cumsum(q_lens) - q_lens
            # A shape has room for more requests than most of its steps bring, so their mean is no guide.
            typical, padded = min(shape.tokens, CAPTURED_CHUNK), (shape.requests + 1, shape.tokens)
            found.append(_Members(rows, firsts, q_lens, kv_lens, typical, shape.tokens, padded))
        return found

    def _tile(self, tokens: int) -> tuple[Tile, int]:
        """The tile for requests of about so many query tokens, and how many of them it holds: whole tokens."""
        tile = tile_for(tokens * self._group, self._head_dim, self._itemsize)
        tile = tile._replace(rows=max(tile.rows, triton.next_power_of_2(self._group)))
        return tile, tile.rows // self._group

    def _target(self, tile: Tile) -> int:
        return math.ceil(self._processors * tile.per_sm / self._kv_heads)


def _pad(array: np.ndarray[tuple[int], np.dtype[np.int32]], size: int) -> Int64:
    """As int64, with zeros behind."""
    return np.concatenate([array, np.zeros(size - len(array), np.int64)])
