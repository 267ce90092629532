"""The tree alone: match and insert of a long prompt, eviction of a leaf, memory per cached token.

    python tests/benchmarks/bench_tree.py [--nodes 100000] [--prompt 32768] [--json FILE]

Times are wall-clock medians (and 99th percentiles) in one thread; nothing is asserted.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from branchwise.radix import RadixTree

Int32 = npt.NDArray[np.int32]
VOCAB = 128_000


def insert(tree: RadixTree, tokens: Int32) -> None:
    """One request, from arrival to its end."""
    lease = tree.match(tokens, limit=len(tokens) - 1)
    if tree.reserve(lease, -(-len(tokens) // tree.page_size) - len(lease.pages)) is None:
        raise SystemExit("the pool is too small for this benchmark")
    tree.publish(lease, tokens)
    tree.release(lease, tokens)


def a_step(tree: RadixTree) -> None:
    """What was published is written: a step has come and gone."""
    tree.end_step(tree.begin_step())


def grow(tree: RadixTree, nodes: int, rng: np.random.Generator, shortest: int, longest: int) -> list[Int32]:
    """Fills the tree with prompts that branch off earlier ones, at a page border, until it has that many nodes.

    Every run of new tokens is ``shortest`` to ``longest`` long (log-uniformly); a third start a tree of their own.
    """
    prompts: list[Int32] = []
    while tree.num_nodes < nodes:
        n = int(np.exp(rng.uniform(np.log(shortest), np.log(longest + 1)))) // tree.page_size * tree.page_size
        tokens = rng.integers(0, VOCAB, max(n, tree.page_size), dtype=np.int32)
        if prompts and rng.random() > 1 / 3:
            base = prompts[int(rng.integers(len(prompts)))]
            kept = int(rng.integers(len(base) // tree.page_size + 1)) * tree.page_size
            tokens = np.concatenate((base[:kept], tokens))[: 16 * longest]
        insert(tree, tokens)
        if len(prompts) < 4096:
            prompts.append(tokens)
        else:
            prompts[int(rng.integers(len(prompts)))] = tokens
    a_step(tree)
    return prompts


def microseconds(samples: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(samples) * 1e6, [50, 99])
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1)}


def bench_match(tree: RadixTree, prompt: Int32, rounds: int) -> dict[str, float]:
    """A whole long prompt that is cached; the lease's release is not timed."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        lease = tree.match(prompt, limit=len(prompt) - 1)
        samples.append(time.perf_counter() - start)
        if lease.hit != len(prompt) - 1:
            raise SystemExit(f"{lease.hit} of {len(prompt) - 1} tokens hit")
        tree.release(lease)
    return microseconds(samples)


def bench_insert(tree: RadixTree, length: int, rounds: int, rng: np.random.Generator) -> dict[str, float]:
    """match + reserve + publish + release of a long prompt that is new; in a full pool this includes its evictions."""
    samples = []
    for _ in range(rounds):
        prompt = rng.integers(0, VOCAB, length, dtype=np.int32)
        start = time.perf_counter()
        insert(tree, prompt)
        samples.append(time.perf_counter() - start)
        a_step(tree)
    return microseconds(samples)


def bench_evict(tree: RadixTree, rounds: int) -> dict[str, float]:
    """One reserved page in a full pool, where every leaf is one page: each reservation evicts one of many leaves."""
    lease = tree.match(np.empty(0, np.int32))
    if tree.allocator.free:
        tree.reserve(lease, tree.allocator.free)
    samples = []
    for _ in range(rounds):
        nodes = tree.num_nodes
        start = time.perf_counter()
        tree.reserve(lease, 1)
        samples.append(time.perf_counter() - start)
        if tree.num_nodes != nodes - 1:
            raise SystemExit("expected one leaf to go")
    tree.release(lease)
    return microseconds(samples)


def bench_memory(nodes: int, shortest: int, longest: int, page_size: int) -> dict[str, float]:
    """Bytes the tree allocates per cached token, beyond the 4 the token id itself takes."""
    rng = np.random.default_rng(1)
    pages = 2 * nodes * longest // page_size
    gc.collect()
    tracemalloc.start()
    tree = RadixTree(pages, page_size)
    pool = tracemalloc.get_traced_memory()[0]  # what the pool costs, cached or not; counted below by its used share
    prompts = grow(tree, nodes, rng, shortest, longest)
    del prompts
    gc.collect()
    used = tracemalloc.get_traced_memory()[0] - pool
    tracemalloc.stop()
    tokens = tree.cached * page_size
    return {
        "nodes": tree.num_nodes,
        "tokens_per_node": round(tokens / tree.num_nodes, 1),
        "bytes_per_token": round(used / tokens - 4 + pool / (pages * page_size), 2),
        "bytes_per_node": round((used - 4 * tokens) / tree.num_nodes, 1),
    }


def run(nodes: int, length: int, page_size: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tree = RadixTree(64 * nodes // page_size * 16 + 64 * length // page_size, page_size)
    results: dict[str, Any] = {}
    prompts = grow(tree, nodes, rng, page_size, 1024)
    long = rng.integers(0, VOCAB, length, dtype=np.int32)
    branching = np.concatenate((max(prompts, key=len), long))[:length]
    for name, prompt in (("match, one node", long), ("match, below a deep path", branching)):
        insert(tree, prompt)
        a_step(tree)
        results[name] = bench_match(tree, prompt, rounds)
    chain = long.copy()
    chain[0] += 1
    for end in range(length // 16, length + 1, length // 16):  # a conversation of 16 turns, others leaving after each
        insert(tree, chain[:end])
        insert(tree, np.concatenate((chain[:end], rng.integers(0, VOCAB, page_size, dtype=np.int32))))
        a_step(tree)
    results["match, 16 nodes"] = bench_match(tree, chain, rounds)
    results["insert"] = bench_insert(tree, length, min(rounds, 200), rng)
    results["nodes"] = tree.num_nodes
    del tree
    full = RadixTree(nodes, page_size)
    for _ in range(nodes):
        insert(full, rng.integers(0, VOCAB, page_size, dtype=np.int32))
    a_step(full)
    results["evict one of many leaves"] = bench_evict(full, min(rounds, nodes // 4))
    results["insert, evicting small leaves"] = bench_insert(
        full, length, min(rounds, nodes // (length // page_size) // 4), rng
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--prompt", type=int, default=32_768, help="tokens")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--memory-nodes", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()

    results = run(args.nodes, args.prompt, args.page_size, args.rounds)
    print(f"{args.prompt} tokens, {results.pop('nodes')} nodes, page size {args.page_size}, {platform.machine()}")
    print(f"\n{'':34}{'p50 µs':>10}{'p99 µs':>10}")
    for name, times in results.items():
        print(f"{name:34}{times['p50_us']:10.1f}{times['p99_us']:10.1f}")
    memory = {
        f"nodes of {low}..{high} tokens": bench_memory(args.memory_nodes, low, high, args.page_size)
        for low, high in ((64, 2048), (args.page_size, args.page_size))
    }
    print(f"\n{'memory beyond the token ids':34}{'B/token':>10}{'B/node':>10}{'tokens/node':>14}")
    for name, row in memory.items():
        print(f"{name:34}{row['bytes_per_token']:10.2f}{row['bytes_per_node']:10.0f}{row['tokens_per_node']:14.1f}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "times": results, "memory": memory}))


if __name__ == "__main__":
    main()
