"""Upper bounds on the hit rate of a fleet: one shared cache, and Belady's offline optimum."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...radix.tree import RadixTree
from .traces import Arrival


def shared_cache_hit_rate(arrivals: Sequence[Arrival], kv_cache_tokens: int, page_size: int) -> float:
    """The fraction of prompt tokens that one tree of ``kv_cache_tokens`` tokens reuses, if each request ends before the
    next arrives. The yardstick for a fleet of the same total size."""
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
    size, never = arrivals[0].block_size, len(arrivals)
    capacity = max(1, kv_cache_tokens // size)
    prompts, blocks_of = _groups(arrivals)
    following = [np.empty(0, np.int64)] * len(prompts)  # for each group of each prompt, the request that uses it next
    uses = np.full(len(blocks_of), never)
    for number in range(len(prompts) - 1, -1, -1):
        following[number] = uses[prompts[number]]
        uses[prompts[number]] = number
    cached = np.zeros(len(blocks_of), np.int64)  # blocks of each group
    farthest: list[tuple[int, int]] = []  # (-next use, group); out of date where ``uses`` differs
    hits = total = 0
    for number, groups in enumerate(prompts):
        reused = int(cached[groups].sum())
        again = following[number] < never
        cached[groups] = np.where(again, blocks_of[groups], 0)
        uses[groups] = following[number]
        total += int(cached[groups].sum()) - reused
        for use, group in zip(following[number][again].tolist(), groups[again].tolist(), strict=True):
            heapq.heappush(farthest, (-use, group))
        while total > capacity:
            negative, group = farthest[0]
            evicted = min(int(cached[group]), total - capacity) if uses[group] == -negative else 0
            cached[group] -= evicted
            total -= evicted
            if total > capacity:
                heapq.heappop(farthest)
        hits += min(reused * size, arrivals[number].prompt_tokens)
    return hits / sum(each.prompt_tokens for each in arrivals)


def _groups(arrivals: Sequence[Arrival]) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Blocks that the same requests use, as one group: the groups of each prompt, and the blocks of each group. Of the
    agents' trace a prompt has 1,900 blocks and some tens of groups."""
    used_by = np.zeros(max(int(each.blocks.max()) for each in arrivals) + 1, np.uint64)  # digest of a block's requests
    mixing = np.random.default_rng(0).integers(0, 2**64, len(arrivals), np.uint64)
    for arrival, digest in zip(arrivals, mixing, strict=True):
        used_by[np.unique(arrival.blocks)] ^= digest
    _, group, counts = np.unique(used_by, return_inverse=True, return_counts=True)
    return [np.unique(group[each.blocks]) for each in arrivals], counts
