"""Picks how deep tree attention's kernels prefetch, by timing them on the device at start.

Whether more loads in flight or more programs at once is faster depends on the device's shared memory and on the head
size. The candidates compute the same in the same order, so the choice does not change a result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..kv_pool import KVPool
from .base import LayerSpec
from .split import ITEM
from .tree_plan import TreePlan
from .tree_runner import DEEP, TreeRunner

logger = logging.getLogger(__name__)

KEYS = 1024  # read by each item
LAUNCHES = 8  # timed at once


def tune(runner: TreeRunner, pool: KVPool, heads: int, table: Tensor, workers: tuple[int, ...]) -> None:
    """Replaces ``runner.tiles``. Does nothing where the pool is too small for work that fills the device.

    Args:
        heads: query heads.
        table: the page table, which belongs to no request yet: it is overwritten, and restored.
        workers: items that fill the device, for each tile.
    """
    layout = pool.layout
    columns = KEYS // layout.page_size
    rows = min(len(table) - 1, pool.num_pages // max(columns, 1), max(workers))
    if not columns or table.shape[1] < columns or rows < 2:
        return
    group, spec = heads // layout.kv_heads, LayerSpec(layout.head_dim**-0.5)
    restored = table.clone()
    pages = torch.arange(rows * columns, dtype=torch.int32, device=table.device)
    table[:rows, :columns] = pages.view(rows, columns)
    tokens = max(tile.rows // group for tile in runner.tiles)
    q = torch.zeros((tokens, heads, layout.head_dim), dtype=layout.dtype, device=table.device)
    for nth, tile in enumerate(runner.tiles):
        items = workers[nth]
        runner.load(_plan(nth, len(runner.tiles), items, rows, tile.rows // group), 0)
        runner.advance(np.full(tokens, KEYS - 1))
        times = {}
        for stages in dict.fromkeys((tile.stages, DEEP)):
            runner.tiles[nth] = tile._replace(stages=stages)
            try:
                times[stages] = milliseconds(lambda n=nth, i=items: runner.attend(n, 0, spec, q, q, i))  # type: ignore[misc]
            except OutOfResources:
                continue
        runner.tiles[nth] = tile._replace(stages=min(times, key=times.__getitem__, default=tile.stages))
        measured = ", ".join(f"{1e3 * ms:.0f} µs with {stages}" for stages, ms in times.items())
        logger.info(
            "tree attention: %d stages for tiles of %d rows (%s)", runner.tiles[nth].stages, tile.rows, measured
        )
    table.copy_(restored)


def _plan(nth: int, tiles: int, count: int, rows: int, queries: int) -> TreePlan:
    """``count`` items of tile ``nth``, each with all ``queries``; they read the table's ``rows`` in turn."""
    items = np.zeros(count, ITEM)
    items["row"], items["num_queries"] = np.arange(count) % rows, queries
    items["stop"] = items["full"] = KEYS
    items["query"] = items["partial"] = np.arange(count) * queries
    slots = np.arange(count * queries, dtype=np.int32)
    none, merges = np.zeros(0, ITEM), np.full((queries, 2), -1, np.int32)
    by_tile = tuple(items if i == nth else none for i in range(tiles))
    return TreePlan(by_tile, slots % queries, merges, slots, merged_slots=0, keys_read=0, keys_flat=0)


def milliseconds(launch: Callable[[], None]) -> float:
    """Device time of a launch, the least of three rounds."""
    launch()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rounds = []
    for _ in range(3):
        start.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / LAUNCHES)
    return min(rounds)
