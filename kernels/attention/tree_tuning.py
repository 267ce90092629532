"""Times tree attention on the device at start: how deep its kernels prefetch, and what the choice of path is made by.

Whether more loads in flight or more programs at once is faster depends on the device's shared memory and on the head
size. The candidates compute the same in the same order, so the choice does not change a result.

What the two paths cost is measured on a few small forests, alone in a CUDA graph, and the constants of `TreeCosts` are
fitted to that. Both together take a few hundred milliseconds.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..kv_pool import KVPool
from .base import AttentionBackend, AttentionBatch, LayerSpec, StepShape
from .split import ITEM
from .tree_costs import TreeCosts
from .tree_gate import Forest
from .tree_plan import TreeLimits, TreePlan, plan_tree
from .tree_runner import DEEP, TreeRunner

logger = logging.getLogger(__name__)

KEYS = 1024  # read by each item, to choose the stages
LAUNCHES = 8  # timed at once
PRIOR = 0.15  # how far a constant may move from its default, in units of a point's relative error
WORST_FIT = 0.25  # median relative error from which on the defaults are kept


POINTS = (
    *(Forest(128, 0, 0, 1152), Forest(8, 0, 0, 64), Forest(32, 0, 0, 512)),
    *(Forest(8, 1, 2048, 64), Forest(8, 1, 8192, 256), Forest(32, 1, 2048, 256), Forest(32, 1, 8192, 64)),
    *(Forest(16, 4, 2048, 64), Forest(64, 2, 4096, 128), Forest(128, 4, 2048, 128)),
)


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
        for stages in dict.fromkeys((tile.stages, tile.stages if tile.in_registers or tile.wide else DEEP)):
            runner.tiles[nth] = tile._replace(stages=stages)
            try:
                times[stages] = milliseconds(lambda _, n=nth, i=items: runner.attend(n, 0, spec, q, q, i))  # type: ignore[misc]
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
    records, sizes = items.view(np.int32).reshape(count, -1), [count if i == nth else 0 for i in range(tiles)]
    merges = np.full((queries, 2), -1, np.int32)
    return TreePlan(records, sizes, slots % queries, merges, slots, merged_slots=0, keys_read=0, keys_flat=0)


def milliseconds(launch: Callable[[int], None]) -> float:
    """Device time of ``launch(0)``, ``launch(1)``, …, in a CUDA graph: launching them takes longer than they run. The
    least of three rounds."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(LAUNCHES):
                launch(i)
        finally:
            graph.capture_end()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    rounds = []
    for _ in range(3):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / LAUNCHES)
    return min(rounds)


def calibrate(
    costs: TreeCosts,
    runner: TreeRunner,
    flat: AttentionBackend,
    layers: list[LayerSpec],
    pool: KVPool,
    heads: int,
    table: Tensor,
    limits: TreeLimits,
) -> TreeCosts:
    """Costs fitted to both paths' times on this device; ``costs`` themselves where too little can be measured.

    Args:
        flat: the other path, which captures.
        layers: one spec a layer; those without a window take turns, so that none finds its keys in the cache.
        heads, table: as for `tune`.
        limits: what plans fit.
    """
    group = heads // pool.layout.kv_heads
    begun, restored = time.perf_counter(), table.clone()
    flat_rows, flat_ms, tree_rows, tree_ms = [], [], [], []
    plain = [i for i, spec in enumerate(layers) if spec.window is None]
    try:
        for point in POINTS:
            pages = point.table(pool.layout.page_size)
            n, columns = pages.shape
            if n >= len(table) or columns > table.shape[1] or pages.max() >= pool.num_pages - 1 or len(plain) < 2:
                continue
            host = np.zeros(table.shape, np.int32)
            host[:n, :columns] = pages
            table[:n, :columns] = torch.from_numpy(pages).to(table.device)
            requests = point.decodes()
            q_lens, kv_lens = (lengths.astype(np.int32) for lengths in (requests.q_lens, requests.kv_lens))
            batch = AttentionBatch(requests.rows, q_lens, kv_lens, n, pool.layout.page_size, table, host)
            plan = plan_tree(host, requests, n, group, batch.page_size, costs, limits, -np.inf)
            if plan is None or plan.keys_read != point.groups * point.prefix + n * point.tail:
                continue
            flat.plan(batch, StepShape(n, 0, 0))
            runner.load(plan, n)
            runner.advance(requests.kv_lens - 1)
            q = torch.zeros((n, heads, pool.layout.head_dim), dtype=pool.layout.dtype, device=table.device)
            ms = _both_paths(plan, runner, flat, q, {i: layers[i] for i in plain})
            flat_ms.append(ms[0])
            tree_ms.append(ms[1])
            flat_rows.append(flat_terms(costs, point))
            tree_rows.append(tree_terms(costs, point, group, plan))
    finally:
        table.copy_(restored)
    if len(tree_ms) < len(POINTS) // 2:
        return costs
    fitted, error = fit(costs, np.array(flat_rows), np.array(flat_ms), np.array(tree_rows), np.array(tree_ms))
    took = 1e3 * (time.perf_counter() - begun)
    good = error < WORST_FIT
    logger.info(
        "tree attention: measured %d forests in %.0f ms; the fitted costs are off by %.0f %% (median)%s",
        *(len(tree_ms), took, 100 * error, "" if good else ": keeping the built-in ones"),
    )
    return fitted if good else costs


def _both_paths(
    plan: TreePlan, runner: TreeRunner, flat: AttentionBackend, q: Tensor, layers: dict[int, LayerSpec]
) -> tuple[float, float]:
    """Milliseconds of a layer on the flat path and on the tree path, both planned before."""
    out, grid, indices = torch.empty_like(q), tuple(plan.sizes), list(layers)

    def run_flat(i: int) -> None:
        flat.run(indices[i % len(indices)], q, q, q, out)

    def run_tree(i: int) -> None:
        layer = indices[i % len(indices)]
        runner.run(layer, layers[layer], q, out, grid, len(q))

    return milliseconds(run_flat), milliseconds(run_tree)


def flat_terms(costs: TreeCosts, point: Forest) -> list[float]:
    """The flat path's time by the defaults: launches, keys that are read again, keys of one request."""
    again = costs.flat * point.requests * point.prefix
    return [costs.flat_layer, again, costs.flat_tail * point.requests * point.tail]


def tree_terms(costs: TreeCosts, point: Forest, group: int, plan: TreePlan) -> list[float]:
    """The tree path's: launches, keys read together, keys of one request, merging."""
    readers = point.requests // max(point.groups, 1)
    together = point.groups * point.prefix * max(float(costs.passes(group, readers)[readers]), 1.0)
    return [costs.tree_layer, together, float(point.requests * point.tail), costs.merging(plan.merged_slots, plan.most)]


def fit(
    costs: TreeCosts,
    flat_terms: npt.NDArray[np.float64],
    flat_times: npt.NDArray[np.float64],
    tree_terms: npt.NDArray[np.float64],
    tree_times: npt.NDArray[np.float64],
) -> tuple[TreeCosts, float]:
    """Constants for which the terms ``[points, terms]`` add up to the times, and the median relative error.

    Least squares of relative errors, with each constant drawn to its default; the unit is free.
    """
    unit = statistics.median([*(flat_times / flat_terms.sum(1)), *(tree_times / tree_terms.sum(1))])
    factors, errors = [], []
    for terms, times in ((flat_terms, flat_times), (tree_terms, tree_times)):
        count = terms.shape[1]
        rows = np.concatenate([unit * terms / times[:, None], PRIOR * np.eye(count)])
        found = np.linalg.lstsq(rows, np.concatenate([np.ones(len(times)), np.full(count, PRIOR)]), rcond=None)[0]
        found = np.clip(found, 0.25, 4.0)
        factors.append(found)
        errors.extend(abs(unit * terms @ found / times - 1.0))
    (flat_layer, again, alone), (tree_layer, together, tail, merging) = factors
    return costs.scaled(flat_layer, again, alone, tree_layer, together, tail, merging), statistics.median(errors)
