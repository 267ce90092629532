"""Tree attention against FlashInfer, one layer in a CUDA graph: `python -m tests.benchmarks.bench_tree_attention`.

B requests in groups of up to 32 that share a prefix, each with a tail of its own; 32 query and 8 key heads of 128
channels, bfloat16, pages of 16. Layers take turns, so that no layer finds its keys in the L2 cache. ``--page 1`` and
``--window 4096`` measure other pages and a sliding window. Beside each time stand the errors of both paths against
float64 on the same inputs, FlashInfer's and ours as a multiple of it. Without a GPU only the host's part is measured:
planning anew, the check that a plan still holds, and both in the steps of BranchBench's workloads (`simulate_gpu`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from branchwise.kernels.attention.base import AttentionBackend, AttentionBatch, LayerSpec, StepShape
from branchwise.kernels.attention.tree_backend import TreeAttention
from branchwise.kernels.attention.tree_costs import TreeCosts
from branchwise.kernels.attention.tree_plan import TreeLimits, TreeRequests, plan_tree
from branchwise.kernels.kv_pool import KVPool
from branchwise.runtime.executor.graphs import StepGraphs, largest_shape
from branchwise.runtime.step import StepPlan

from . import simulate_gpu

HEADS, KV_HEADS, DIM, PAGE, LAYERS, PER_GROUP = 32, 8, 128, 16, 2, 32
BUDGET, COLUMNS_OF_TABLE = 8192, 1024  # of the simulated workloads: query tokens of a step, columns of the page table
CHECKED = 4  # requests whose results are compared with float64
BATCHES, PREFIXES, TAILS = (8, 32, 128, 256), (512, 2048, 8192, 32768), (64, 256, 1024)
CONTROLS = [(1, 0, 2048), (4, 0, 1024), (4, 2048, 256), (32, 0, 1024), (128, 0, 1152), (256, 0, 512)]
COLUMNS = f"{'B':>4} {'prefix':>6} {'tail':>5} {'flat us':>8} {'tree us':>8} {'flat/tree':>9} {'gate':>5}"


class Forest:
    """``batch`` requests in groups that share ``prefix`` tokens, with ``tail`` tokens of their own each."""

    def __init__(self, batch: int, prefix: int, tail: int, page: int = PAGE) -> None:
        rng = np.random.default_rng(0)
        groups = max(1, batch // PER_GROUP)
        self.page = page
        shared, own = prefix // page, -(-tail // page) + 1
        self.pages = groups * shared + batch * own + 1
        pages = rng.permutation(self.pages - 1).astype(np.int32)
        prefixes = pages[: groups * shared].reshape(groups, shared)
        tails = pages[groups * shared :].reshape(batch, own)
        # Tables of one width: kernels are compiled for it.
        columns = max(shared + own, (max(PREFIXES) + max(TAILS)) // page + 1)
        self.table = np.full((batch + 1, columns), self.pages - 1, np.int32)
        self.table[:-1, : shared + own] = np.concatenate([np.repeat(prefixes, batch // groups, axis=0), tails], axis=1)
        self.rows = rng.permutation(batch).astype(np.int32)
        self.kv_lens = np.full(batch, prefix + tail, np.int32)

    def requests(self) -> TreeRequests:
        n = len(self.rows)
        return TreeRequests(self.rows, np.arange(n), np.ones(n, np.int64), self.kv_lens.astype(np.int64))

    def batch(self, device_table: torch.Tensor) -> AttentionBatch:
        none = np.empty(0, np.int32)
        ones, n = np.ones(len(self.rows), np.int32), len(self.rows)
        return AttentionBatch(self.rows, ones, self.kv_lens, n, self.page, device_table, self.table, (none, none))


def milliseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """Median of a call on the host."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def cpu_milliseconds(call: Callable[[], object], repeats: int = 100) -> float:
    """Median of this thread's CPU time, which other work on the machine disturbs less than the time of day."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1e3


def errors(forest: Forest, pool: KVPool, q: torch.Tensor, spec: LayerSpec, *outs: torch.Tensor) -> list[float]:
    """Root mean square error of each result against float64, over a few requests of the first layer."""
    kv, group = pool.layer(0), HEADS // KV_HEADS
    sums = [0.0] * len(outs)
    for i in np.linspace(0, len(forest.rows) - 1, CHECKED).astype(int).tolist():
        length = int(forest.kv_lens[i])
        start = 0 if spec.window is None else max(0, length - spec.window)
        pages = torch.from_numpy(forest.table[forest.rows[i]].astype(np.int64)).to(q.device)
        k, v = (
            x[pages].flatten(0, 1)[start:length].double().repeat_interleave(group, 1).transpose(0, 1)
            for x in (kv.k, kv.v)
        )
        scores = (k @ q[i].double()[:, :, None]).squeeze(2) * spec.scale
        exact = (scores.softmax(-1)[:, None] @ v).squeeze(1)
        for nth, out in enumerate(outs):
            sums[nth] += float((out[i].double() - exact).square().mean())
    return [(total / CHECKED) ** 0.5 for total in sums]


def host_part() -> None:
    print("planning on the host, ms of CPU time; then a step whose composition is the last one's")
    limits = TreeLimits((8192,) * 3, 1 << 16, (132, 33, 16), (128, 256, 256))
    for batch, prefix, tail in ((256, 2048, 256), (256, 8192, 128), (1024, 2048, 256), (256, 0, 1024)):
        forest = Forest(batch, prefix, tail)
        plan = cpu_milliseconds(
            lambda f=forest: plan_tree(  # type: ignore[misc]
                f.table, f.requests(), len(f.rows), HEADS // KV_HEADS, PAGE, TreeCosts(), limits
            )
        )
        print(f"  {batch:4} requests, {prefix:5} + {tail:4} tokens: {plan:6.3f}, {steady(forest):6.3f}")
    print("steps of BranchBench at scale 1: ms of CPU time of all steps (mean), of those planned anew (mean, p95)")
    for workload in ("best_of_n", "agents", "chat", "no_sharing", "tree_of_thought", "fewshot"):
        times, anew = workload_times(workload)
        p95 = float(np.quantile(times[anew], 0.95))
        print(f"  {workload:16} {times.mean():6.3f}  {anew.mean():4.0%} anew: {times[anew].mean():6.3f}, {p95:6.3f}")


class NoAttention:
    """A flat backend that does nothing, for what tree attention itself costs the host."""

    captures, joint, saved_keys = True, False, 0

    def forms(self, shape: StepShape) -> list[StepShape]:
        return [shape]

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> StepShape | None:
        return shape

    def run(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError


def idle_tree(table: torch.Tensor, max_tokens: int) -> TreeAttention:
    """Tree attention over pages that no step reads: for planning alone."""
    pool = KVPool(torch.zeros(1, 2, 1, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16))
    return TreeAttention(pool, [LayerSpec(DIM**-0.5)], HEADS, table, NoAttention(), max_tokens, TreeCosts())


def steady(forest: Forest) -> float:
    """A step whose composition is the last one's."""
    table = torch.from_numpy(forest.table)
    tree, batch = idle_tree(table, len(forest.rows)), forest.batch(table)
    tree.plan(batch, StepShape(len(forest.rows), 0, 0))
    return cpu_milliseconds(lambda: tree.plan(batch, StepShape(len(forest.rows), 0, 0)))


def workload_times(workload: str) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of `TreeAttention.plan` in each step of a simulated workload, and which steps were planned anew."""
    host = np.zeros((simulate_gpu.ROWS + 1, COLUMNS_OF_TABLE), np.int32)
    table = torch.from_numpy(host)
    tree = idle_tree(table, largest_shape(simulate_gpu.ROWS))
    graphs = StepGraphs(*(lambda _: None,) * 3, simulate_gpu.ROWS, BUDGET, table.device, tree.forms, tree.joint)  # type: ignore[arg-type]
    times, anew = [], []

    def on_step(plan: StepPlan) -> None:
        host[plan.table_rows, plan.table_cols] = plan.table_pages
        batch = AttentionBatch(
            *(plan.rows, plan.q_lens, plan.kv_lens, plan.num_decodes, PAGE, table, host),
            written=(plan.table_rows, plan.table_cols),
        )
        shape, before = graphs.shape_for(plan), tree._members
        start = time.thread_time()
        tree.plan(batch, shape)
        times.append(1e3 * (time.thread_time() - start))
        anew.append(tree._members is not before)

    asyncio.run(simulate_gpu.Simulation(simulate_gpu.FORMATS["bf16"], on_step=on_step).run(workload))
    return np.array(times), np.array(anew)


def graph_us(backend: AttentionBackend, q: torch.Tensor, out: torch.Tensor) -> float:
    """Microseconds of one layer, median over replays of a graph of eight."""

    def run() -> None:
        for layer in range(8):
            backend.run(layer % LAYERS, q, q, q, out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(14)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events[2:])
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3 / 8


def cell(batch: int, prefix: int, tail: int, page: int = PAGE, window: int | None = None) -> dict[str, float]:
    """Flat and tree times and errors of one forest, the gate's choice, and the host's time while nothing changes."""
    from branchwise.kernels import triton_ops
    from branchwise.kernels.attention.flashinfer_backend import FlashInferAttention

    forest, specs = Forest(batch, prefix, tail, page), [LayerSpec(DIM**-0.5, window)] * LAYERS
    data = torch.randn(LAYERS, 2, forest.pages, page, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    pool, table = KVPool(data), torch.from_numpy(forest.table).cuda()
    q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    out, expected = torch.empty_like(q), torch.empty_like(q)
    flat = FlashInferAttention(pool, specs, HEADS, table, triton_ops, batch)
    tree = TreeAttention(pool, specs, HEADS, table, flat, max(batch, 64), TreeCosts())
    steps = forest.batch(table)
    flat.plan(steps, StepShape(batch, 0, 0))
    flat_us = graph_us(flat, q, expected)
    chosen = tree.plan(steps, StepShape(batch, 0, 0))
    host_ms = milliseconds(lambda: tree.plan(steps, StepShape(batch, 0, 0)))
    tree.plan(steps, StepShape(batch, 0, 0, tree=True))
    tree_us = graph_us(tree, q, out)
    torch.testing.assert_close(out, expected, atol=4e-3, rtol=2e-2)
    flat.plan(steps, StepShape(batch, 0, 0))
    flat.run(0, q, q, q, expected)
    tree.plan(steps, StepShape(batch, 0, 0, tree=True))
    tree.run(0, q, q, q, out)
    flat_error, tree_error = errors(forest, pool, q, specs[0], expected, out)
    return {
        "batch": batch,
        "prefix": prefix,
        "tail": tail,
        "flat_us": flat_us,
        "tree_us": tree_us,
        "gate": bool(chosen is not None and chosen.tree),
        "host_ms": host_ms,
        "flat_error": flat_error,
        "tree_error": tree_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--page", type=int, default=PAGE, help="tokens of a page")
    parser.add_argument("--window", type=int, help="of a sliding window, in tokens")
    arguments = parser.parse_args()
    host_part()
    if not torch.cuda.is_available():
        return
    from branchwise.kernels.attention import flashinfer_backend

    flashinfer_backend.kernels = lambda *_: ["fa2"]  # decodes use no other, and compiling fa3 takes a minute
    cells = [(b, p, t) for b in BATCHES for p in PREFIXES for t in TAILS]
    print(COLUMNS)
    found = []
    for batch, prefix, tail in [*CONTROLS, *cells]:
        f = cell(batch, prefix, tail, arguments.page, arguments.window)
        found.append(f)
        ratio, gate = f["flat_us"] / f["tree_us"], "tree" if f["gate"] else "flat"
        times = f"{f['flat_us']:8.1f} {f['tree_us']:8.1f} {ratio:9.2f}"
        error = f"error {f['flat_error']:.1e} x {f['tree_error'] / f['flat_error']:.2f}"
        print(f"{batch:4} {prefix:6} {tail:5} {times} {gate:>5}  host {f['host_ms']:.3f} ms, {error}", flush=True)
        torch.cuda.empty_cache()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
