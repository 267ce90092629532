"""Runs a `TreePlan`: the launches of one layer over buffers whose addresses CUDA graphs can rely on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from ..arrays import Int64
from ..kv_pool import KVLayout, KVPool
from ..staging import Staging
from .base import LayerSpec
from .register_kernel import attend_few, register_tile
from .split import ITEM_FIELDS
from .tree_plan import TreeLimits, TreePlan
from .triton_kernels import attend, merge_slots
from .wide_kernel import KEYS, WARPS, attend_wide

# With 4 stages or fewer Triton waits for all loads at the top of each block: page numbers, which the addresses of keys
# depend on, take one of the stages. With 5 the next block's keys are in flight, in half as many programs.
DEEP = 5
# Query heads that one program of the merge takes. In steps of many query tokens, most of which belong to chunks and
# have nothing to merge, it takes as many as have so many channels.
MERGE_HEADS, MANY_TOKENS, MERGE_CHANNELS = 8, 448, 4096


class TreeTile(NamedTuple):
    """Sizes of a program of `attend`."""

    rows: int  # query tokens times the query heads of a key head, padded
    keys: int  # read at a time
    warps: int
    stages: int
    # Of a tile that `attend_few` runs, not `attend`: programs that a multiprocessor should have.
    in_registers: int = 0
    wide: bool = False  # whether `attend_wide` runs it


def tree_tiles(layout: KVLayout, group: int, in_registers: bool = True, wide: bool = False) -> tuple[TreeTile, ...]:
    """Tiles of ascending size. Larger ones spill registers (checked for sm_90 in the tests).

    The narrow tile is bound by memory bandwidth; programs of one warp, many on a multiprocessor, come closest to it. On
    an H200, 128 requests of 1,152 tokens with heads of 128: 143 µs where 4 warps take 166. The others are bound by
    arithmetic: with 5 stages, 8 groups of 32 requests on 8k tokens take 94 µs with 128 rows (365 TFLOP/s) and 110 with
    64, which leave fewer rows empty where fewer requests share a node. `attend_wide` takes 82 µs for these in bfloat16
    and 89 in fp8, where `attend` takes 96 and 188. It also reads what the tile of 64 rows would: launching that takes 3
    µs a layer even for nothing, and 16 nodes of 256 keys in fp8 take it 34 µs, `attend_wide` 12.

    Args:
        in_registers: whether layers allow `attend_few`.
        wide: whether device, pages and layers allow `attend_wide`.
    """
    head_dim, itemsize, quantized = layout.head_dim, layout.dtype.itemsize, layout.quantized
    least = triton.next_power_of_2(group)
    tiles: tuple[TreeTile, ...]
    if itemsize > 2:  # float32 is multiplied without tensor cores: for tests
        tiles = TreeTile(16, 32, 4, 2), TreeTile(32, 32, 4, 2)
    elif quantized and head_dim > 128:
        tiles = TreeTile(16, 64, 4, 3), TreeTile(32, 32, 8, 2)
    elif quantized:
        keys = 128 if layout.k_format.name == layout.v_format.name == "fp8" else 64  # 8 groups of 32: 219 and 242 µs
        tiles = TreeTile(16, 64, head_dim // 64, 3), TreeTile(64, 64, 4, 3), TreeTile(128, keys, 8, 3)
    elif head_dim > 128:
        tiles = TreeTile(16, 32, 4, 3), TreeTile(128, 32, 8, 2)
    else:
        tiles = TreeTile(16, 32, 1, 3), TreeTile(64, 64, 4, 5), TreeTile(128, 64, 8, 5)
    if wide:
        tiles = tiles[0], TreeTile(128, KEYS, WARPS, 1, wide=True)
    found = register_tile(least, layout) if in_registers else None
    if found is not None:
        tiles = TreeTile(found.rows, found.keys, 1, 1, found.programs), *tiles[1:]
    elif least > tiles[0].rows:
        narrow = tiles[0]._replace(rows=least, warps=max(tiles[0].warps, least // 16))
        tiles = (narrow, *(tile for tile in tiles[1:] if tile.rows > least))
    return tiles


class TreeRunner:
    """Holds one plan and one layer's partial results on the device.

    Args:
        pool: keys and values.
        heads: query heads, a multiple of the pool's key heads.
        table: int32 ``[rows, columns]``, the page table on the device.
        tiles: see `tree_tiles`.
        limits: what plans fit.
        max_tokens: the most query tokens of a plan.
    """

    def __init__(
        self,
        pool: KVPool,
        heads: int,
        table: Tensor,
        tiles: tuple[TreeTile, ...],
        limits: TreeLimits,
        max_tokens: int,
    ) -> None:
        layout, device = pool.layout, pool.device
        self.pool, self._table, self._limits, self._max_tokens = pool, table, limits, max_tokens
        self.tiles = list(tiles)  # `tree_tuning` replaces them by others that compute the same
        self._heads, self._head_dim = heads, layout.head_dim
        self._block_d = triton.next_power_of_2(layout.head_dim)
        self._shape = (heads, layout.kv_heads, layout.head_dim, layout.page_size)
        self._precision = "ieee" if layout.dtype == torch.float32 else "tf32"
        self._storage = pool.layer(0).strides, layout.k_format.name, layout.v_format.name
        ints = sum(limits.items) * ITEM_FIELDS + 2 * limits.slots + 2 * max_tokens
        self._staged_plan = Staging(ints, torch.int32, device)
        self._staged_items = list(limits.items)  # of each tile, those that are staged: at first undefined, all of them
        self._staged_positions = Staging(max_tokens, torch.int32, device)
        self._partial = torch.empty((limits.slots, heads, layout.head_dim), dtype=torch.float32, device=device)
        self._lse = torch.empty((limits.slots, heads), dtype=torch.float32, device=device)
        # Of captured steps, for the widest tile, which mostly takes as long as the others together.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(self, plan: TreePlan, padded: int) -> None:
        """Sends a plan. Of the query tokens that it does not have, `run` sets those before ``padded`` to 0."""
        staging, limits, merges = self._staged_plan, self._limits, plan.merges
        if len(merges) < padded:
            merges = np.concatenate([merges, np.zeros((padded - len(merges), 2), np.int32)])
        elif len(merges) > padded:
            merges = merges.copy()
            others = merges[padded:, 1]
            others[others == 0] = -1
        staging.begin()
        self._items, at = [], 0
        for nth, (size, most) in enumerate(zip(plan.sizes, limits.items, strict=True)):
            records = plan.records[at : at + size].ravel()
            # Records without queries replace those of the plan before.
            filled = self._staged_items[nth] * ITEM_FIELDS
            self._items.append(staging.put(records, most * ITEM_FIELDS, filled=filled))
            self._staged_items[nth], at = size, at + size
        self._queries = staging.put(plan.queries, limits.slots, filled=0)
        self._slots = staging.put(plan.slots, limits.slots, filled=0)
        self._merges = staging.put(merges.ravel(), 2 * self._max_tokens, filled=0)
        staging.send()

    def advance(self, positions: Int64) -> None:
        """Sends the positions in their requests of the query tokens of the step."""
        self._staged_positions.begin()
        self._positions = self._staged_positions.put(positions, self._max_tokens, filled=0)
        self._staged_positions.send()

    def run(self, layer: int, spec: LayerSpec, q: Tensor, out: Tensor, grid: tuple[int, ...], num_tokens: int) -> None:
        """Attends for the plan's query tokens.

        Args:
            q, out: ``[T, heads, head_dim]``; the heads of a token are contiguous.
            grid: items to launch for each tile; those beyond the plan's exit at once.
            num_tokens: query tokens to merge, the first ones.
        """
        side = self._side if self._side and grid[-1] and torch.cuda.is_current_stream_capturing() else None
        widest = len(self.tiles) - 1
        if side:
            side.wait_stream(torch.cuda.current_stream())
        for nth in range(widest):
            self.attend(nth, layer, spec, q, out, grid[nth])
        with torch.cuda.stream(side) if side else nullcontext():
            self.attend(widest, layer, spec, q, out, grid[widest])
        if side:
            torch.cuda.current_stream().wait_stream(side)
        if not num_tokens:
            return
        heads = MERGE_HEADS if num_tokens <= MANY_TOKENS else max(MERGE_HEADS, MERGE_CHANNELS // self._block_d)
        merge_slots(
            (num_tokens, triton.cdiv(self._heads, heads), 1),
            (self._partial, self._lse, self._merges, self._slots, self._sinks(spec), out),
            (),
            (self._heads, self._head_dim, out.stride(0), spec.sinks is not None, heads, self._block_d),
            warps=4,
        )

    def _sinks(self, spec: LayerSpec) -> Tensor:
        """The layer's sinks; any tensor where it has none, which kernels then do not read."""
        return self._lse if spec.sinks is None else spec.sinks

    def attend(self, nth: int, layer: int, spec: LayerSpec, q: Tensor, out: Tensor, items: int) -> None:
        """Launches the first ``items`` items of one tile."""
        if not items:
            return
        tile, kv, table = self.tiles[nth], self.pool.layer(layer), self._table
        kv_heads = self._shape[1]
        launch = attend_few if tile.in_registers else attend_wide if tile.wide else attend
        launch(
            (kv_heads, items, 1),
            (
                *(q, kv.k, kv.v, kv.k_scales, kv.v_scales, table, self._queries, self._positions, self._items[nth]),
                *(self._sinks(spec), out, self._partial, self._lse),
            ),
            (),
            (
                *(*self._shape, *self._storage, q.stride(0), out.stride(0), table.stride(0)),
                *(spec.scale, spec.softcap or 0.0, spec.window or 0, spec.sinks is not None, self._precision),
                *(tile.rows, tile.keys, self._block_d),
            ),
            warps=tile.warps,
            stages=tile.stages,
        )
