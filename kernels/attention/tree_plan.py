"""Plans tree attention: which requests read which keys together, in items of about equal work.

Reading a node of the tree (`tree_nodes`) once for all of its readers saves reads but costs each of them one more
partial result. So a node is shared only where that pays; otherwise its columns are left to the nodes below it, and in
the end to each request's own *tail* (FastTree: Pan et al., 2025; PAT: Yi et al., 2025). Tails are open-ended: the
kernel ends them at the query's position, so a plan stays valid while its requests decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..arrays import Int32, Int64, ranges
from .split import ALIGN, ITEM, ITEM_FIELDS, Records
from .tree_costs import Float64, TreeCosts, tile_table
from .tree_nodes import Nodes, find_nodes

OPEN = 2**31 - 1  # the end of a tail: wherever its queries are
MIN_CUT = 256  # keys: a tile of a chunk is not cut shorter, as a program takes 5 µs beside the 17 ns of each key


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """Limits of a plan.

    Attributes:
        items: the most items of each tile.
        slots: the most partial results of query tokens.
        workers: programs for one key head that fill the device, for each tile.
        min_keys: no range is cut into shorter ones, for each tile.
    """

    items: tuple[int, ...]
    slots: int
    workers: tuple[int, ...]
    min_keys: tuple[int, ...]


class TreeRequests(NamedTuple):
    """R requests of a step that are planned together.

    ``rows``: of the page table; ``queries``: first query token of each; ``q_lens``, ``kv_lens``: as in
    `AttentionBatch`. All are ``[R]``.
    """

    rows: Int32
    queries: Int64
    q_lens: Int64
    kv_lens: Int64


@dataclass(slots=True)
class TreePlan:
    """Every key that one of T query tokens sees is in exactly one of the items that list the token.

    The slots of an item follow one another.

    Attributes:
        records: int32 ``[items, ITEM_FIELDS]``, the items tile by tile, the longest of each first. ``query`` is the
            first slot of the item.
        sizes: items of each tile.
        queries: int32 ``[slots]``, the query token of each slot.
        merges: int32 ``[T, 2]``, where each query token's slots begin in ``slots``, and how many there are; -1 where
            the token's one item writes the output itself. Tokens that belong to none of the requests have 0.
        slots: int32 ``[slots]``, each query token's slots in the order of their keys.
        merged_slots: partial results that are written and merged.
        keys_read: keys that the items read, each node's once.
        keys_flat: keys that would be read with nothing shared.
        gain: the expected saving in a layer over the flat backend, in the units of `TreeCosts`.
    """

    records: Int32
    sizes: list[int]
    queries: Int32
    merges: Int32
    slots: Int32
    merged_slots: int
    keys_read: int
    keys_flat: int
    gain: float = 0.0

    @property
    def items(self) -> list[Records]:
        """The `split.ITEM` records of each tile."""
        return np.split(self.records.view(ITEM)[:, 0], np.cumsum(self.sizes[:-1]))

    @property
    def most(self) -> int:
        """The most partial results that one query token has to merge."""
        return max(int(self.merges[:, 1].max(initial=0)), 0)


def plan_tree(
    table: Int32,
    requests: TreeRequests,
    num_tokens: int,
    group: int,
    page_size: int,
    costs: TreeCosts,
    limits: TreeLimits,
    least_gain: float = 0.0,
) -> TreePlan | None:
    """Plans the requests together; None where too little is gained, or the plan does not fit.

    Args:
        table: int32 ``[rows, columns]``, the page table.
        num_tokens: query tokens of the step.
        group: query heads of a key head.
        least_gain: the expected saving in a layer from which on to plan, in the units of ``costs``; -inf: always.
    """
    per_tile = max(costs.tiles[-1] // group, 1)
    tile_of, passes = tile_table(costs, group, 1 << num_tokens.bit_length())
    requests, full = _full_tiles(requests, per_tile)
    q_lens, kv_lens = requests.q_lens, requests.kv_lens
    sharing = len(q_lens) - full
    nodes = find_nodes(table, requests.rows[:sharing], (kv_lens - q_lens)[:sharing] // page_size)
    nodes, covered, tokens = choose(nodes, q_lens, page_size, costs, passes)
    segments = _segments(nodes, covered, tokens, requests, page_size, passes)
    gain = _gain(nodes.counts, segments, costs)
    if gain < least_gain:
        return None
    keys = int(segments.lengths.sum()), int(kv_lens.sum())
    segments = _apart(segments, per_tile, passes)
    for coarseness in (1, 2, 4, 8):
        plan = _cut(segments, full, num_tokens, keys, per_tile, tile_of, limits, coarseness)
        if plan is not None:
            plan.gain = gain - costs.merging(plan.merged_slots, plan.most)
            return plan if plan.gain >= least_gain else None
    return None


def _full_tiles(requests: TreeRequests, per_tile: int) -> tuple[TreeRequests, int]:
    """The requests with those query tokens of chunks that fill tiles of ``per_tile`` as requests of their own, the last
    ones, and how many these are. They gain nothing by sharing: full tiles multiply for longer than they read."""
    rest = requests.q_lens % per_tile
    full = requests.q_lens - rest
    others, tiles = rest.nonzero()[0], full.nonzero()[0]
    if not len(tiles):
        return requests, 0
    index, count = np.concatenate([others, tiles]), len(others)
    rows, queries, q_lens, kv_lens = requests.rows[index], requests.queries[index], rest[index], requests.kv_lens[index]
    queries[:count] += full[others]
    kv_lens[count:] -= rest[tiles]
    q_lens[count:] = full[tiles]
    return TreeRequests(rows, queries, q_lens, kv_lens), len(tiles)


def choose(
    nodes: Nodes, q_lens: Int64, page_size: int, costs: TreeCosts, passes: Float64
) -> tuple[Nodes, Int64, Int64]:
    """The nodes worth sharing, extended upwards over the columns of those that are not.

    Returns:
        The chosen nodes (``parents`` are still indices into the given ones); int64 ``[R]``, how many columns of each
        request they cover; int64 ``[N]``, the query tokens of each node.
    """
    count = len(nodes.starts)
    covered = np.zeros(len(q_lens), np.int64)
    if not count:
        return nodes, covered, nodes.starts
    of_members, firsts = q_lens[nodes.members], nodes.firsts
    tokens = np.add.reduceat(of_members, firsts)
    shared = passes[tokens]
    # Passes over a node's columns if its children, and its members without a child, read them instead.
    below = alone = np.add.reduceat(passes[of_members], firsts)
    child = (nodes.parents >= 0).nonzero()[0]
    if len(child):
        below = alone + np.bincount(nodes.parents[child], (shared - alone)[child], count)
    saved = (np.maximum(below, 1.0) - np.maximum(shared, 1.0)) * page_size  # by each column
    starts, taken = nodes.starts.tolist(), [False] * count
    least = (tokens * costs.partial).tolist()
    each = zip(nodes.parents.tolist(), nodes.stops.tolist(), saved.tolist(), least, strict=True)
    for i, (parent, stop, saving, cost) in enumerate(each):  # parents come first
        if parent >= 0 and not taken[parent]:
            starts[i] = starts[parent]
        taken[i] = saving > 0.0 and (stop - starts[i]) * saving >= cost
    first, stops, parents, members, counts = np.array(starts), nodes.stops, nodes.parents, nodes.members, nodes.counts
    if not all(taken):
        kept = np.array(taken).nonzero()[0]
        members = members[ranges(firsts[kept], counts[kept])]
        first, stops, parents, counts, tokens = first[kept], stops[kept], parents[kept], counts[kept], tokens[kept]
    covered[members] = stops.repeat(counts)
    return Nodes(first, stops, parents, members, counts), covered, tokens


class _Segments(NamedTuple):
    """The chosen nodes, then every request's tail: ``counts`` query tokens each, which see keys ``starts … stops - 1``.

    A query token's segments are in the order of their keys.
    """

    rows: Int64
    starts: Int64
    stops: Int64
    lengths: Int64  # keys now
    counts: Int64
    work: Float64  # of reading them, in keys
    queries: Int64  # of all segments


def _segments(
    nodes: Nodes, covered: Int64, tokens: Int64, requests: TreeRequests, page_size: int, passes: Float64
) -> _Segments:
    count, everyone = len(nodes.starts), np.arange(len(requests.rows))
    # Any member's row of the page table leads to a node's pages.
    of = np.concatenate([nodes.members[nodes.firsts], everyone])
    starts = np.concatenate([nodes.starts, covered]) * page_size
    stops = np.concatenate([nodes.stops * page_size, requests.kv_lens])
    lengths = stops - starts
    stops[count:] = OPEN
    counts = np.concatenate([tokens, requests.q_lens])
    queries = requests.queries[np.concatenate([nodes.members, everyone])]
    if len(requests.rows) < int(requests.q_lens.sum()):
        queries = ranges(queries, requests.q_lens[np.concatenate([nodes.members, everyone])])
    return _Segments(requests.rows[of], starts, stops, lengths, counts, passes[counts] * lengths, queries)


def _apart(segments: _Segments, per_tile: int, passes: Float64) -> _Segments:
    """Of segments with more query tokens than fill tiles, those left over are segments of their own: a smaller tile,
    which takes longer for each key, is then cut finer."""
    rows, starts, stops, lengths, counts, _, queries = segments
    rest = counts % per_tile
    several = (rest > 0) & (counts > per_tile)
    if not several.any():
        return segments
    index = np.arange(len(counts)).repeat(1 + several)
    last = np.append(index[1:] != index[:-1], True)
    counts = np.where(several[index], np.where(last, rest[index], (counts - rest)[index]), counts[index])
    lengths = lengths[index]
    return _Segments(rows[index], starts[index], stops[index], lengths, counts, passes[counts] * lengths, queries)


def _gain(readers: Int64, segments: _Segments, costs: TreeCosts) -> float:
    """The expected saving of the tree path, before the cost of merging. ``readers``: requests of each node."""
    count = len(readers)
    shared, tails = segments.lengths[:count], segments.lengths[count:]
    alone = np.maximum(readers * costs.flat, 1.0) * shared
    saved = float((alone - np.maximum(segments.work[:count], shared)).sum())
    return saved + (costs.flat_tail - 1.0) * int(tails.sum()) - (costs.tree_layer - costs.flat_layer)


def _cut(
    segments: _Segments,
    full: int,
    num_tokens: int,
    total_keys: tuple[int, int],
    per_tile: int,
    tile_of: Int64,
    limits: TreeLimits,
    coarseness: int,
) -> TreePlan | None:
    """Items of about equal work, enough to fill the device; None if they exceed the limits.

    ``full``: see `_full_tiles`; ``total_keys``: the plan's ``keys_read`` and ``keys_flat``; ``per_tile``: query tokens
    that fit the largest tile; ``tile_of``: see `tree_costs.tile_table`.
    """
    rows, starts, stops, lengths, counts, work, tokens = segments
    parts = -(counts // -per_tile)
    # All parts of a segment are cut alike and are neighbours, so that they read the same keys at the same time.
    of_tile = tile_of[counts]
    target = np.bincount(of_tile, work, len(limits.workers)) / limits.workers * coarseness
    pieces = np.rint(work / np.maximum(parts * target[of_tile], 1.0)).astype(np.int64)
    pieces = np.maximum(np.minimum(pieces, lengths // np.array(limits.min_keys)[of_tile]), 1)
    keys = lengths // (pieces * -ALIGN) * -ALIGN
    pieces = -(lengths // -keys)

    number = parts * pieces  # of items
    of = np.arange(len(number)).repeat(number)  # the segment of each item
    size, left = keys[of], lengths[of]
    if len(of) == len(number):
        first = offset = np.zeros(len(of), np.int64)
        count = counts
    else:
        nth, of_parts = np.arange(len(of)) - (number.cumsum() - number)[of], parts[of]
        piece = nth // of_parts
        first, offset = (nth - piece * of_parts) * per_tile, piece * size
        count = np.minimum(counts[of] - first, per_tile)
        # Of a chunk's tail, a part does not see the last keys: those of the queries behind it.
        left = left - offset - np.where(stops[of] == OPEN, counts[of] - first - count, 0)
        if left.min() <= 0:
            seen = left > 0
            of, size, left, first, offset, count = (x[seen] for x in (of, size, left, first, offset, count))
    if full:
        fields = of, size, left, first, offset, count
        of, size, left, first, offset, count = _end_together(fields, len(number) - full, tile_of[count], limits)
    slot = count.cumsum() - count
    queries = tokens[ranges((counts.cumsum() - counts)[of] + first, count)]
    if len(queries) > limits.slots:
        return None
    of_tile = tile_of[count]
    sizes = np.bincount(of_tile, minlength=len(limits.items)).tolist()
    if any(map(int.__gt__, sizes, limits.items)):
        return None
    per_token = np.bincount(queries, minlength=num_tokens)
    single = per_token == 1
    alone = single[queries]
    start = starts[of] + offset
    items = np.zeros((len(of), ITEM_FIELDS), np.int32)  # the fields of `ITEM`, in its order
    items[:, 0] = rows[of]
    items[:, 1] = slot
    items[:, 2] = count
    items[:, 3] = start
    items[:, 4] = items[:, 5] = np.where(left <= size, stops[of], start + size)
    items[:, 6] = np.where(alone[slot], -1, slot)
    order = ((of_tile << 32) - np.minimum(left, size)).argsort(kind="stable")  # the last to start is the shortest
    merges = np.empty((num_tokens, 2), np.int32)
    merges[:, 0] = per_token.cumsum() - per_token
    merges[:, 1] = np.where(single, -1, per_token)
    return TreePlan(
        records=items.take(order, 0),
        sizes=sizes,
        queries=queries.astype(np.int32),
        merges=merges,
        slots=queries.argsort(kind="stable").astype(np.int32),
        merged_slots=len(queries) - int(np.count_nonzero(alone)),
        keys_read=total_keys[0],
        keys_flat=total_keys[1],
    )


def _end_together(fields: tuple[Int64, ...], begin: int, of_tile: Int64, limits: TreeLimits) -> tuple[Int64, ...]:
    """Cuts some full tiles of chunks, so that the last programs of the widest tile do not run alone (Stream-K: Osama et
    al., 2023): of the tiles one after the other, each worker's share is as many keys, and a tile in which a share ends
    is cut there.

    Args:
        fields: of each item, as in `_cut`: segment, keys, keys from its first on, first query, first key, queries.
        begin: the first segment of full tiles.
        of_tile: each item's tile.
    """
    of, size, left, first, offset, count = fields
    keys, wide, workers = np.minimum(left, size), of_tile == len(limits.items) - 1, limits.workers[-1]
    whole = np.sort(keys[wide])
    share = int(whole.sum()) // workers + 1
    # Uncut, the longest of each wave of programs ends it.
    if len(whole) <= workers or int(whole[::-workers].sum()) - share < MIN_CUT:
        return fields
    tiles = (of >= begin).nonzero()[0]
    ends = keys[tiles].cumsum()
    at = np.arange(share, int(ends[-1]), share)
    nth = ends.searchsorted(at)
    cut = tiles[nth]
    head = (at - ends[nth] + keys[cut]) // ALIGN * ALIGN
    cuts = (head >= MIN_CUT) & (keys[cut] - head >= MIN_CUT)
    cuts[1:] &= nth[1:] > nth[:-1]
    cut, head = cut[cuts], head[cuts]
    again = np.concatenate([np.arange(len(of)), cut])
    of, size, left, first, offset, count = (x[again] for x in (of, keys, left, first, offset, count))
    size[cut], size[len(keys) :] = head, keys[cut] - head
    left[len(keys) :] -= head
    offset[len(keys) :] += head
    return of, size, left, first, offset, count
