"""Attention in Triton, for any GPU it supports: no compiler on the machine, no library but Triton.

A step is at most two launches a layer, its decodes and its chunks, each followed by a merge if key ranges were split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from ..arrays import Int64, ranges
from ..kv_pool import KVLayout, KVPool
from ..staging import Staging
from ..triton_launch import ALIGNMENT
from .base import AttentionBatch, LayerSpec, RequestGroup, StepShape, split_step
from .register_kernel import attend_few, checked, register_tile
from .split import ITEM_FIELDS, MERGE_FIELDS, Bounds, Pieces, cut
from .triton_kernels import attend, merge

HEAD_DIMS = range(16, 257)
MERGE_PIECES = 16  # partial results read at a time
FIXED_ROWS = 64  # of the tile of ``fixed``
CAPTURED_CHUNK = 16  # query tokens that a chunk of a captured step is assumed to have
ALIGNMENT_INTS = ALIGNMENT // 4


class Tile(NamedTuple):
    """Sizes of a program of `attend`."""

    rows: int  # query tokens times query heads of a key head, padded
    keys: int  # read at a time
    warps: int
    stages: int
    per_sm: int  # programs to aim at for each multiprocessor: two rounds of what fits at once
    in_registers: bool = False  # whether `attend_few` runs it, not `attend`


def tile_for(rows: int, layout: KVLayout, in_registers: bool = True) -> Tile:
    """The tile for requests of about so many rows. Larger ones spill registers (checked for sm_90 in the tests)."""
    head_dim, itemsize, quantized = layout.head_dim, layout.dtype.itemsize, layout.quantized
    found = register_tile(rows, layout) if in_registers else None
    if found is not None:
        return Tile(found.rows, found.keys, 1, 1, found.programs, in_registers=True)
    if itemsize > 2:  # float32 is multiplied without tensor cores: for tests
        return Tile(16, 32, 4, 2, 4) if rows <= 16 else Tile(32, 32, 4, 2, 4)
    if head_dim > 128:
        narrow, wide = (
            (Tile(16, 64, 4, 3, 6), Tile(32, 32, 8, 2, 2))
            if quantized
            else (
                Tile(16, 32, 4, 3, 6),
                Tile(64, 32, 8, 3, 2),
            )
        )
        return narrow if rows <= 16 else wide
    if rows <= 16:
        return Tile(16, 64, max(1, head_dim // 64) if quantized else 2, 3, 8)
    return Tile(64, 64, 4, 3, 4) if rows <= 64 else Tile(128, 64, 8, 3, 2)


@dataclass(slots=True)
class _Call:
    """One launch of `attend`, and of `merge` where key ranges were split. Tensors are int32 on the device."""

    tile: Tile
    tokens: int  # query tokens of a tile
    queries: Tensor  # query tokens of the step
    items: Tensor  # `ITEM` records
    merges: Tensor  # `MERGE` records


@dataclass(slots=True)
class _Cut:
    """A `RequestGroup` cut into pieces, on the host."""

    tile: Tile
    tokens: int  # query tokens of a tile
    queries: Int64
    positions: Int64
    pieces: list[Pieces]  # for each window

    @property
    def size(self) -> int:
        """int32 elements, with room for alignment."""
        records = sum(pieces.items.nbytes + pieces.merges.nbytes for pieces in self.pieces) // 4
        return 2 * (len(self.queries) + ALIGNMENT_INTS) + records


class TritonAttention:
    """See `AttentionBackend`. `plan` and `run` are for one stream.

    With a `StepShape`, the tiles, the grids and every address that `run` hands to a kernel depend on the shape alone:
    plan, capture the `run` calls, and from then on plan and replay.

    Args:
        pool: keys and values, head_dim 16 to 256.
        layers: one spec a layer; scales are positive.
        num_heads: query heads, a multiple of kv_heads.
        max_requests, max_tokens: of one step. A larger step moves the buffers, which invalidates captured graphs.
        fixed: one tile for all steps, and no key range is split: a query meets its keys in blocks that begin at
            multiples of their size, in order, and its result has the same bits in any step.
    """

    captures = True
    joint = False
    saved_keys = 0

    def __init__(
        self,
        pool: KVPool,
        layers: list[LayerSpec],
        num_heads: int,
        max_requests: int = 1024,
        max_tokens: int = 16384,
        *,
        fixed: bool = False,
    ) -> None:
        layout, device = pool.layout, pool.device
        self._page_size, kv_heads, self._head_dim = layout.page_size, layout.kv_heads, layout.head_dim
        if self._head_dim not in HEAD_DIMS or num_heads % kv_heads:
            raise ValueError(f"no kernel for {num_heads} and {kv_heads} heads of {self._head_dim} channels")
        if any(spec.scale <= 0 for spec in layers):
            raise ValueError("scales must be positive")
        self._pool, self._layers, self._fixed = pool, layers, fixed
        self._heads, self._kv_heads, self._group = num_heads, kv_heads, num_heads // kv_heads
        self._precision = "ieee" if layout.dtype == torch.float32 else "tf32"
        self._storage = pool.layer(0).strides, layout.k_format.name, layout.v_format.name
        self._block_d = triton.next_power_of_2(self._head_dim)
        self._processors = 4
        if device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._windows = list(dict.fromkeys(spec.window for spec in layers))
        partial_rows = ints = 0
        for typical in (1, CAPTURED_CHUNK, max_tokens):  # a step's decodes and chunks take less than these together
            tile, tokens = self._tile(typical)
            target = self._target(tile)
            bounds = Bounds.of(max_requests + 1, max_tokens, tokens, target)
            partial_rows = max(partial_rows, Bounds.partial_rows(tokens, target))
            ints += bounds.items * ITEM_FIELDS + bounds.merges * MERGE_FIELDS
        shape = (partial_rows, num_heads, self._head_dim)
        self._partial = torch.empty(shape, dtype=torch.float32, device=device)
        self._lse = torch.empty(shape[:2], dtype=torch.float32, device=device)
        ints = ints * len(self._windows) + 2 * (max_tokens + 2 * ALIGNMENT_INTS)
        self._staging = Staging(ints, torch.int32, device)
        self._table = torch.empty((0, 0), dtype=torch.int32, device=device)  # the plan's
        self._calls: dict[int | None, list[_Call]] = {}

    def forms(self, shape: StepShape) -> list[StepShape]:
        """See `AttentionBackend.forms`."""
        return [shape]

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> StepShape | None:
        """See `AttentionBackend.plan`."""
        self._table = batch.page_table
        decodes, chunks = split_step(batch, shape)
        groups = []
        if decodes is not None:
            groups.append(self._cut(decodes, 1, 1, shape is not None))
        if chunks is not None:
            # A shape has room for more requests than most of its steps bring, so their mean length is no guide.
            typical = math.ceil(chunks.mean_q_len()) if shape is None else min(chunks.num_tokens, CAPTURED_CHUNK)
            groups.append(self._cut(chunks, typical, chunks.num_tokens, shape is not None))
        self._staging.begin(sum(group.size for group in groups))
        self._positions = self._put(np.concatenate([np.empty(0, np.int64), *(group.positions for group in groups)]))
        self._calls = {window: [] for window in self._windows}
        for group in groups:
            queries = self._put(group.queries)
            for window, pieces in zip(self._windows, group.pieces, strict=True):
                items, merges = (self._put(records.view(np.int32)) for records in (pieces.items, pieces.merges))
                self._calls[window].append(_Call(group.tile, group.tokens, queries, items, merges))
        self._staging.send()
        return shape

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.run`."""
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if q.stride()[1:] != (self._head_dim, 1) or out.stride()[1:] != (self._head_dim, 1):
            raise ValueError("the heads of a token must be contiguous")
        spec = self._layers[layer]
        kv = self._pool.layer(layer)
        heads, dim, table = self._heads, self._head_dim, self._table
        sinks = self._lse if spec.sinks is None else spec.sinks
        for call in self._calls[spec.window]:
            tile, items, merges = call.tile, len(call.items) // ITEM_FIELDS, len(call.merges) // MERGE_FIELDS
            launch = attend_few if tile.in_registers else attend
            launch(
                (self._kv_heads, items, 1),
                (
                    *(q, kv.k, kv.v, kv.k_scales, kv.v_scales, table, call.queries, self._positions, call.items),
                    *(sinks, out, self._partial, self._lse),
                ),
                (),
                (
                    *(heads, self._kv_heads, dim, self._page_size, *self._storage),
                    *(q.stride(0), out.stride(0), table.stride(0)),
                    *(spec.scale, spec.softcap or 0.0, spec.window or 0, spec.sinks is not None, self._precision),
                    *(tile.rows, tile.keys, self._block_d),
                ),
                warps=tile.warps,
                stages=tile.stages,
            )
            if merges:
                merge(
                    (heads, merges, call.tokens),
                    (self._partial, self._lse, call.queries, call.merges, sinks, out),
                    (),
                    (heads, dim, out.stride(0), spec.sinks is not None, MERGE_PIECES, self._block_d),
                    warps=4,
                )
        return out

    def _cut(self, group: RequestGroup, typical: int, longest: int, captured: bool) -> _Cut:
        """``typical``, ``longest``: query tokens of a request. ``captured``: as many records as the shape can need."""
        tile, tokens = self._tile(typical)
        tokens = min(tokens, longest)
        target = self._target(tile)
        bounds = Bounds.of(group.max_requests + 1, group.num_tokens, tokens, target) if captured else None
        # Padding tokens are one more request, without keys.
        padding = group.num_tokens - int(group.q_lens.sum())
        rows, q_lens, kv_lens = (
            np.append(array, last).astype(np.int64)
            for array, last in ((group.rows, 0), (group.q_lens, padding), (group.kv_lens, 0))
        )
        queries = np.arange(group.tokens.start, group.tokens.stop)
        pieces = [cut(rows, q_lens, kv_lens, window, tokens, target, bounds) for window in self._windows]
        return _Cut(tile, tokens, queries, ranges(kv_lens - q_lens, q_lens), pieces)

    def _put(self, array: npt.NDArray[np.integer]) -> Tensor:
        """Keeps what follows aligned: see `split`."""
        return self._staging.put(array, -(-len(array) // ALIGNMENT_INTS) * ALIGNMENT_INTS)

    def _tile(self, tokens: int) -> tuple[Tile, int]:
        """The tile for requests of about so many query tokens, and the number of whole query tokens in it."""
        rows = FIXED_ROWS if self._fixed else max(tokens * self._group, triton.next_power_of_2(self._group))
        tile = tile_for(rows, self._pool.layout, checked(self._layers))
        tile = tile._replace(rows=max(tile.rows, triton.next_power_of_2(self._group)))
        return tile, tile.rows // self._group

    def _target(self, tile: Tile) -> int:
        if self._fixed:
            return 1  # one piece is enough: none is split
        return math.ceil(self._processors * tile.per_sm / self._kv_heads)
