"""One attention layer over each storage format of keys and values, on a GPU.

python tests/benchmarks/bench_kv_formats.py [--formats auto,fp8,int4,nvfp4] [--sweep]

Decodes without sharing read every key once (device memory); groups that share a prefix read it once for 32 requests
(arithmetic). ``--sweep`` times other tiles than those that are used; ``--compile`` only fills Triton's cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from branchwise.kernels import triton_ops
from branchwise.kernels.attention import tree_backend, triton_backend
from branchwise.kernels.attention.base import AttentionBackend, AttentionBatch, LayerSpec
from branchwise.kernels.attention.dequantized_chunks import DequantizedChunks
from branchwise.kernels.attention.flashinfer_backend import FlashInferAttention
from branchwise.kernels.attention.register_kernel import register_tile
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.attention.tree_backend import TreeAttention
from branchwise.kernels.attention.tree_costs import TreeCosts
from branchwise.kernels.attention.tree_plan import TreeLimits
from branchwise.kernels.attention.tree_runner import TreeRunner, TreeTile
from branchwise.kernels.attention.tree_tuning import milliseconds
from branchwise.kernels.attention.triton_backend import TritonAttention
from branchwise.kernels.kv_pool import KVLayout, KVPool

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
DEVICE = torch.device("cuda")
SPEC = LayerSpec(DIM**-0.5)
# (name, requests, tokens of each, of which so many are shared in groups of 32)
CASES = [
    ("250 x 8k", 250, 8192, 0),
    ("32 x 32k", 32, 32768, 0),
    ("128 x 1152", 128, 1152, 0),
    ("8 x 32 x 8k", 256, 8320, 8192),
]
NARROW = [(16, 32, 1, 3), (16, 32, 1, 5), (16, 64, 2, 5), (16, 64, 4, 4)]
IN_REGISTERS = [(8, 16, 1, 1, 16), (8, 32, 1, 1, 16)]
WORKERS = (8, 16, 24, 32)  # programs a multiprocessor, for the tiles in registers
WIDE = [(64, 64, 4, 5), (128, 64, 8, 4), (128, 64, 8, 5), (128, 64, 4, 5), (128, 128, 8, 3), (128, 32, 8, 5)]


def filled(choice: str, pages: int) -> KVPool:
    """A pool of random keys and values."""
    pool = KVPool.allocate(KVLayout.of(choice, 1, PAGE, KV_HEADS, DIM, torch.bfloat16), pages, DEVICE)
    for slots in torch.arange(pages * PAGE, device=DEVICE).split(1 << 16):
        k, v = torch.randn((2, len(slots), KV_HEADS, DIM), device=DEVICE, dtype=torch.bfloat16)
        pool.layer(0).write(slots, k, v)
    return pool


def make_step(requests: int, tokens: int, shared: int, q_len: int = 1) -> AttentionBatch:
    columns, prefix = tokens // PAGE, shared // PAGE
    own = np.arange(requests * (columns - prefix)).reshape(requests, -1)
    groups = requests * (columns - prefix) + np.arange(-(-requests // 32) * prefix).reshape(-(-requests // 32), prefix)
    table = np.concatenate([np.repeat(groups, 32, axis=0)[:requests], own], axis=1).astype(np.int32)
    table = np.random.default_rng(0).permutation(int(table.max()) + 1).astype(np.int32)[table]
    table = np.concatenate([table, np.full((1, columns), table.max() + 1, np.int32)])
    lengths = np.full(requests, tokens, np.int32)
    q_lens = np.full(requests, q_len, np.int32)
    decodes = requests if q_len == 1 else 0
    rows = np.arange(requests, dtype=np.int32)
    return AttentionBatch(rows, q_lens, lengths, decodes, PAGE, torch.from_numpy(table).to(DEVICE), table)


def launches(run: Callable[..., object], *args: object) -> Callable[[int], None]:
    """``run(*args)`` in the form that ``milliseconds`` times."""

    def launch(_: int) -> None:
        run(*args)

    return launch


def limits_of(tree: TreeAttention, workers: int) -> TreeLimits:
    """For so many programs of the narrow tile a multiprocessor."""
    tree._workers = (workers * tree_backend._processors(tree._runner.pool) // KV_HEADS, *tree._workers[1:])
    return replace(tree._limits, workers=tree._workers, items=tree._items(256))


def bench(case: tuple[str, int, int, int], choice: str, sweep: bool, base: dict[str, float], small: bool) -> None:
    """Times one case and prints a line. ``base``: the first format's times."""
    name, requests, tokens, shared = case
    if small:
        requests = 32 if shared else 2
    step = make_step(requests, tokens, shared)
    pool = filled(choice, int(step.host_page_table.max()) + 1)
    q = torch.randn((requests, HEADS, DIM), device=DEVICE, dtype=torch.bfloat16)
    flat = TritonAttention(pool, [SPEC], HEADS)
    tree = TreeAttention(pool, [SPEC], HEADS, step.page_table, flat, max(requests, 64), TreeCosts())
    tiles = list(tree._runner.tiles)
    # Room for the largest plan.
    tree._runner = TreeRunner(pool, HEADS, step.page_table, tuple(tiles), limits_of(tree, max(WORKERS)), requests)
    nth = len(tiles) - 1 if shared else 0
    candidates = [tiles[nth]]
    if sweep:
        narrow = IN_REGISTERS if tiles[0].in_registers else NARROW
        # A smaller tile would leave out queries of the plan's items.
        least = tiles[nth].rows
        candidates += [TreeTile(*tile) for tile in (WIDE if shared else narrow) if tile[0] >= least]
    out = torch.empty_like(q)
    times: dict[TreeTile | str, float] = {}

    def load(workers: int) -> tuple[int, ...]:
        """Plans for so many programs of the narrow tile a multiprocessor."""
        limits, tree._members = limits_of(tree, workers), None
        plan = tree._plan_members(step, tree._find_members(step, requests), limits, True)
        assert plan is not None
        tree._runner.load(plan, requests)
        tree._runner.advance(np.full(requests, tokens - 1))
        nonlocal keys
        keys = plan.keys_read
        return tuple(plan.sizes)

    keys = 0
    if sweep and not shared and tiles[0].in_registers:
        for workers in WORKERS:
            grid = load(workers)
            for each in IN_REGISTERS:
                tree._runner.tiles[nth] = TreeTile(*each)
                times[f"{each[1]} keys, {workers} workers"] = milliseconds(
                    launches(tree._runner.run, 0, SPEC, q, out, grid, requests)
                )
    grid = load(tiles[0].in_registers or tree_backend.WORKERS[0])
    for tile in dict.fromkeys(candidates):
        tree._runner.tiles[nth] = tile
        try:
            times[tile] = milliseconds(launches(tree._runner.run, 0, SPEC, q, out, grid, requests))
        except Exception as error:  # a tile that does not fit
            print(f"    {choice} {tuple(tile)}: {str(error)[:60]}")
    if not shared:
        flat.plan(step)
        times["flat"] = milliseconds(launches(flat.run, 0, q, q, q, out))
    base.setdefault(name, min(times.values()))
    best = min(times, key=times.__getitem__)
    gb = keys * pool.layout.token_bytes / 1e6
    used, flat_us = times[tiles[nth]], 1e3 * times.get("flat", 0.0)
    print(
        f"{name:<12} {choice:<6} tree {1e3 * used:6.0f} us = {used / base[name]:.2f} x, {gb / used:,.0f} GB/s; "
        f"flat {flat_us:6.0f} us; best {1e3 * times[best]:6.0f} us = {times[best] / base[name]:.2f} x, {best}",
        flush=True,
    )
    if sweep:
        print(
            "    ",
            {(x if isinstance(x, str) else tuple(x)): round(1e3 * ms) for x, ms in times.items()},
            flush=True,
        )


def bench_chunk(choice: str, sweep: bool) -> None:
    """A chunk of 2,048 tokens whose last is token 8,192: by each kernel that can, and FlashInfer over a copy."""
    step = make_step(1, 8192, 0, 2048)
    pool = filled(choice, int(step.host_page_table.max()) + 1)
    q = torch.randn((2048, HEADS, DIM), device=DEVICE, dtype=torch.bfloat16)
    flat = TritonAttention(pool, [SPEC], HEADS)
    backends: dict[str, AttentionBackend] = {"used": flat}
    if pool.layout.quantized and sweep:
        triton_backend.register_tile = lambda *_: None  # type: ignore[assignment]
        backends["triton"] = TritonAttention(pool, [SPEC], HEADS)

        def make_long(copy: KVPool, table: Tensor) -> FlashInferAttention:
            long = FlashInferAttention(copy, [SPEC], HEADS, table, triton_ops, 1, captured=(1, 1, 1))
            long._fa3.result()
            return long

        backends["copied"] = DequantizedChunks(pool, flat, make_long, 1, 8192 // PAGE)
    for name, backend in backends.items():
        backend.plan(step)
        triton_backend.register_tile = register_tile
        ms = milliseconds(launches(backend.run, 0, q, q, q, torch.empty_like(q)))
        flop = 4 * HEADS * DIM * 2048 * (8192 - 1024)
        print(f"chunk 2k on 6k {choice:<6} {name:<6} {1e3 * ms:6.0f} us, {flop / ms / 1e9:,.0f} TFLOP/s", flush=True)


def check(choice: str) -> None:
    """Decodes and a chunk against the torch specification in float32, on the device."""
    for requests, q_len in ((32, 1), (2, 300)):
        step = make_step(requests, 1024, 512, q_len)
        pool = filled(choice, int(step.host_page_table.max()) + 1)
        q = torch.randn((requests * q_len, HEADS, DIM), device=DEVICE, dtype=torch.bfloat16)
        oracle = TorchAttention(pool, [SPEC], HEADS, share=False)
        oracle.plan(step)
        k, v = pool.layer(0).read(torch.from_numpy(step.query_slots() // PAGE).to(DEVICE))
        at = torch.from_numpy(step.query_slots() % PAGE).to(DEVICE)
        own = torch.arange(len(at), device=DEVICE)
        want = oracle.run(0, q, k[own, at].to(q.dtype), v[own, at].to(q.dtype)).float()
        flat = TritonAttention(pool, [SPEC], HEADS)
        tree = TreeAttention(pool, [SPEC], HEADS, step.page_table, flat, max(requests, 64), TreeCosts())
        for name, backend in (("flat", flat), ("tree", tree)):
            backend.plan(step)
            got = backend.run(0, q, q, q).float()
            print(
                f"{choice:<6} {name} q {q_len}: largest error {(got - want).abs().max():.2e} of {want.abs().max():.2f}"
            )
            torch.testing.assert_close(got, want, atol=6e-3, rtol=2e-2)


def bench_write(choice: str) -> None:
    pool = filled(choice, 1024)
    for tokens in (256, 8192):
        qkv = torch.randn((tokens, HEADS + 2 * KV_HEADS, DIM), device=DEVICE, dtype=torch.bfloat16)
        cos = torch.randn((tokens, DIM // 2), device=DEVICE)
        slots = torch.randperm(1024 * PAGE, device=DEVICE)[:tokens]
        ms = milliseconds(launches(triton_ops.rope_write, qkv, HEADS, cos, cos, pool.layer(0), slots))
        print(f"write {tokens:>5} tokens {choice:<6} {1e3 * ms:7.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="auto,fp8,int4,nvfp4,k16v8")
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
    parser.add_argument("--compile", action="store_true", help="few requests, to fill Triton's cache")
    parser.add_argument("--no-check", action="store_true", help="compare nothing with the specification before")
    parser.add_argument("--cases", default=",".join(["chunk", *(case[0] for case in CASES)]))
    args = parser.parse_args()
    base: dict[str, float] = {}
    tree_backend.tune = lambda *_: None  # type: ignore[assignment]  # tiles are chosen here
    formats = args.formats.split(",")
    for choice in () if args.no_check else formats:
        bench_write(choice)
    for choice in () if args.no_check or args.compile else formats:
        check(choice)
    wanted = args.cases.split(",")
    for choice in formats if "chunk" in wanted else ():
        bench_chunk(choice, args.sweep)
    for case, choice in product([case for case in CASES if case[0] in wanted], formats):
        bench(case, choice, args.sweep, base, args.compile)


if __name__ == "__main__":
    main()
