"""How much of a trace any fleet could reuse: one shared cache, and a cache that knows the future."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from ...radix.tree import RadixTree
from .traces import Arrival


def shared_cache_hit_rate(arrivals: Sequence[Arrival], kv_cache_tokens: int, page_size: int) -> float:
    """The share of prompt tokens that one tree of ``kv_cache_tokens`` tokens reuses, if each request ends before the
    next arrives: what a fleet of this size reaches at most with LRU caches that evict independently."""
    tree = RadixTree(kv_cache_tokens // page_size, page_size)
    hits = 0
    for arrival in arrivals:
        tokens = arrival.tokens()
        length = len(tokens) + arrival.output_tokens
        step = tree.begin_step()
        lease = tree.match(tokens, limit=len(tokens) - 1)
        hits += lease.hit
        if tree.reserve(lease, -(-length // page_size) - len(lease.pages)) is None:
            tree.release(lease)
        else:
            outputs = np.zeros(arrival.output_tokens, np.int32)  # they take room like a replica's
            outputs[:] = -1 - np.arange(arrival.output_tokens) - hits % 1000
            tree.release(lease, np.concatenate((tokens, outputs[:-1])))
        tree.end_step(step)
    return hits / sum(each.prompt_tokens for each in arrivals)


def offline_hit_rate(arrivals: Sequence[Arrival], kv_cache_tokens: int) -> float:
    """An upper bound for every cache of this size: Belady's rule on the trace's blocks, evicting the block whose next
    use is farthest, with no regard to prefixes, and without room for outputs."""
    size = arrivals[0].block_size
    capacity = max(1, kv_cache_tokens // size)
    uses: dict[int, list[int]] = {}
    for number in range(len(arrivals) - 1, -1, -1):
        for block in arrivals[number].blocks.tolist():
            uses.setdefault(block, []).append(number)
    cached: set[int] = set()
    farthest: list[tuple[int, int]] = []  # (-next use, block); out of date where the next use differs
    hits, never = 0, len(arrivals)
    for number, arrival in enumerate(arrivals):
        reused = 0
        for block in arrival.blocks.tolist():
            reused += block in cached
            queue = uses[block]
            while queue and queue[-1] <= number:
                queue.pop()
            following = queue[-1] if queue else never
            if following == never:
                cached.discard(block)
                continue
            cached.add(block)
            heapq.heappush(farthest, (-following, block))
        while len(cached) > capacity:
            negative, block = heapq.heappop(farthest)
            queue = uses[block]
            if block in cached and queue and queue[-1] == -negative:
                cached.discard(block)
        hits += min(reused * size, arrival.prompt_tokens)
    return hits / sum(each.prompt_tokens for each in arrivals)
