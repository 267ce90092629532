"""FP8 matrix products on a GPU, in a CUDA graph: `python -m tests.benchmarks.bench_fp8_linear [--sweep 12]`.

Microseconds of the four products of a layer of Llama 3.1 8B: bfloat16; `torch._scaled_mm` with tensor-wise and
row-wise scales; ours; with scales of blocks, torch's and our kernel. Several copies of a weight take turns, so that
none is found in the L2 cache. ``--sweep N`` also tries the kernel's tiles, compiled by N processes, and prints the
fastest of each product.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from branchwise.kernels import ops, triton_ops
from branchwise.kernels.quantize import BLOCK, QuantizedRows, Quantizer, in_blocks, quantize_weight
from branchwise.kernels.triton_fp8 import Tile, fp8_linear_in_tiles, pick_tile

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 16, 64, 96, 128, 160, 192, 256, 2048)
SWEPT = (16, 64, 128, 256)
DISTINCT = 160 << 20  # bytes of weights that take turns: three times the L2 cache of an H200
SHARED_MEMORY = 227 << 10


def microseconds(call: Callable[[int], object], copies: int) -> float:
    """Of one call, median over replays of a graph; ``call`` gets the number of the weight's copy."""
    rounds = max(8, copies)
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(rounds):
            call(i % copies)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events[2:])
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3 / rounds


class Product:
    """A product's operands in every format."""

    def __init__(self, outputs: int, inputs: int, plain: bool = True) -> None:
        torch.manual_seed(0)
        weight = torch.randn(outputs, inputs, device="cuda", dtype=BF16)
        self.copies = max(1, DISTINCT // (outputs * inputs))
        self.values, self.scale = quantize_weight(weight, E4M3)
        self.weights = [self.values.clone() for _ in range(self.copies)]
        self.plain = [weight.clone() for _ in range(max(1, self.copies // 2))] if plain else []
        self.blocks = torch.rand(outputs // BLOCK, inputs // BLOCK, device="cuda") + 0.5

    def x(self, tokens: int) -> Tensor:
        return torch.randn(tokens, self.values.shape[1], device="cuda", dtype=BF16)


def kernel(rows: QuantizedRows, weight: Tensor, scale: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    tile = pick_tile(len(rows.values), outputs, inputs, in_blocks(weight, scale))
    return fp8_linear_in_tiles(rows, weight, scale, None, BF16, tile)


def row(product: Product, tokens: int) -> dict[str, float]:
    x, one = product.x(tokens), torch.ones((), device="cuda")
    rows = triton_ops.quantize(x, Quantizer(E4M3))
    groups = triton_ops.quantize(x, Quantizer(E4M3, group=BLOCK))
    for r, scale in ((rows, product.scale), (groups, product.blocks)):
        expected = ops.fp8_linear(r, product.values, scale, None, torch.float32)
        got = kernel(r, product.values, scale).float()
        assert float((got - expected).norm()) < 4e-3 * float(expected.norm()), "the product is wrong"

    def scaled(i: int, a: Tensor, b: Tensor) -> Tensor:
        return torch._scaled_mm(rows.values, product.weights[i].t(), a, b, out_dtype=BF16, use_fast_accum=True)

    def block(i: int) -> Tensor:
        scales = groups.scales, product.blocks.t()
        return torch._scaled_mm(groups.values, product.weights[i].t(), *scales, out_dtype=BF16)

    def ours(i: int) -> Tensor:
        return triton_ops.fp8_linear(rows, product.weights[i], product.scale, None, BF16)

    return {
        "bf16": microseconds(lambda i: F.linear(x, product.plain[i]), len(product.plain)),
        "tensor": microseconds(lambda i: scaled(i, one, one), product.copies),
        "row": microseconds(lambda i: scaled(i, rows.scales, product.scale.t()), product.copies),
        "ours": microseconds(ours, product.copies),
        "block": microseconds(block, product.copies) if supported(block) else math.nan,
        "kernel, blocks": microseconds(lambda i: kernel(groups, product.weights[i], product.blocks), product.copies),
    }


def supported(call: Callable[[int], object]) -> bool:
    try:
        call(0)
    except (RuntimeError, ValueError) as error:
        print(str(error).strip().splitlines()[0][:150])
        return False
    return True


def tiles(outputs: int, tokens: int, blocks: bool) -> list[Tile]:
    """The tiles worth trying."""
    columns = [min(max(tokens, 16), 128)] + ([64, 256] if tokens == 256 else [])
    splits = [1, 2] if outputs > 8192 else [1, 2, 4] if outputs > 4096 else [1, 2, 4, 8]
    return [
        Tile(n, t, k, s, warps, stages)
        for (n, k, warps), t, s, stages in itertools.product(
            ((64, 128, 4), (64, 256, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8)), columns, splits, (3, 5)
        )
        if (n + t) * k * stages <= SHARED_MEMORY and n * t <= 128 * 32 * warps and (k == BLOCK or not blocks)
    ]


def time_tiles(
    name: str, tokens: int, chosen: list[Tile], blocks: bool, compile_only: bool
) -> list[tuple[float, Tile]]:
    product = Product(*SHAPES[name], plain=False)
    rows = triton_ops.quantize(product.x(tokens), Quantizer(E4M3, BLOCK if blocks else 0))
    scale = product.blocks if blocks else product.scale
    found = []
    for tile in chosen:

        def call(i: int, tile: Tile = tile) -> Tensor:
            return fp8_linear_in_tiles(rows, product.weights[i], scale, None, BF16, tile)

        try:
            if compile_only:
                call(0)
            else:
                found.append((microseconds(call, product.copies), tile))
        except Exception as error:  # out of shared memory or registers: another tile
            print(f"  {name} {tokens} {tile}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()
    return sorted(found)


def sweep(processes: int, blocks: bool) -> dict[str, list[list[object]]]:
    cases = [(name, tokens, tiles(SHAPES[name][0], tokens, blocks)) for name in SHAPES for tokens in SWEPT]
    parts = [(name, tokens, some[i::4], blocks, True) for name, tokens, some in cases for i in range(4)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(time_tiles, parts, chunksize=1)
    best: dict[str, list[list[object]]] = {}
    for name, tokens, some in cases:
        found = time_tiles(name, tokens, some, blocks, False)
        best[f"{name} {tokens}"] = [[us, *tile] for us, tile in found]
        print(f"{name:8} {tokens:4}  " + "   ".join(f"{us:.1f} {tuple(tile)}" for us, tile in found[:4]), flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--sweep", type=int, default=0, metavar="N", help="try the kernel's tiles; compile in N processes"
    )
    parser.add_argument("--blocks", action="store_true", help="try them with scales of blocks")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    figures: dict[str, object] = {"tiles": sweep(args.sweep, args.blocks)} if args.sweep else {}
    columns: list[str] = []
    for name, shape in SHAPES.items():
        product = Product(*shape)
        for tokens in TOKENS:
            found = row(product, tokens)
            if not columns:
                columns = list(found)
                print(f"{'product':8} {'tokens':>6} " + " ".join(f"{column:>12}" for column in columns))
            print(f"{name:8} {tokens:6} " + " ".join(f"{found[column]:12.1f}" for column in columns), flush=True)
            figures[f"{name} {tokens}"] = found
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
