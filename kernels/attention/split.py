"""Cuts a step's attention into pieces of about equal work, for devices that run hundreds at once.

A tile is some query tokens with all the query heads of one key head. Long key ranges are split further (flash-decoding;
Dao et al., 2023): each piece yields a partial softmax, and `Pieces.merges` says which partial results belong together.
The number of pieces is bounded by the numbers of requests and tokens alone, so that the grid of a CUDA graph can serve
every step of its shape.

Pieces name their query tokens by indices into a list of the step's query tokens on the device. `cut` makes tiles of
consecutive tokens of one request; the kernels accept any list, so a piece can also serve the queries of several
requests that read the same pages (`tree_plan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Int64, ranges

ALIGN = 64  # key ranges begin at multiples of this: a power of two, and a multiple of the keys a kernel reads at a time
MIN_KEYS = 256  # a piece with fewer costs more to merge than it saves

# Both records are int32 throughout: kernels read them as rows of integers, in this order. Their sizes are multiples of
# 16 bytes, which keeps all staged arrays aligned: `triton_launch` compiles a kernel for each combination of alignments.
ITEM = np.dtype(
    [
        ("row", np.int32),  # of the page table
        ("query", np.int32),  # index of the first query in the list
        ("num_queries", np.int32),  # 0: the record only fills up a captured grid
        ("start", np.int32),  # keys start … stop - 1, positions in the request
        ("stop", np.int32),
        ("full", np.int32),  # every query sees keys start … full - 1; the others are masked by the queries' positions
        ("partial", np.int32),  # first row of the partial results, one a query; -1: the piece is all of its tile
        ("unused", np.int32),
    ]
)
MERGE = np.dtype(
    [
        ("query", np.int32),
        ("num_queries", np.int32),
        ("partial", np.int32),  # first row of the partial results: num_queries rows a piece, piece after piece
        ("num_pieces", np.int32),
    ]
)
ITEM_FIELDS, MERGE_FIELDS = ITEM.itemsize // 4, MERGE.itemsize // 4
Records = npt.NDArray[Any]  # of `ITEM` or `MERGE`


@dataclass(frozen=True, slots=True)
class Pieces:
    """The work of a step. Either array may end with zeros: records without queries."""

    items: Records  # [N] `ITEM`, longest key range first
    merges: Records  # [M] `MERGE`


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most `Pieces` of any step with so many requests and query tokens."""

    items: int
    merges: int

    @classmethod
    def of(cls, requests: int, tokens: int, tile: int, target: int) -> Bounds:
        """``tile`` and ``target``: as for `cut`."""
        tiles = (tokens + requests * (tile - 1)) // tile
        # A tile of length n * x, x the target length, is split into at most n + 1/2 pieces, and only if n >= 3/2.
        return cls(tiles + target, min(tiles, target * 2 // 3 + 1))

    @staticmethod
    def partial_rows(tile: int, target: int) -> int:
        """Rows of partial results that no step exceeds."""
        return tile * (target + target // 3 + 1)


def cut(
    rows: Int64,
    q_lens: Int64,
    kv_lens: Int64,
    window: int | None,
    tile: int,
    target: int,
    bounds: Bounds | None = None,
) -> Pieces:
    """Pieces of these requests, whose queries are listed one request after the other.

    Args:
        rows: ``[R]`` rows of the page table.
        q_lens, kv_lens: ``[R]`` as in `AttentionBatch`. Requests without keys are padding; their queries get zeros.
        window: as in `LayerSpec`.
        tile: query tokens of a tile, at most.
        target: the number of pieces, for each key head, that fills the device.
        bounds: fill the result up to this size.
    """
    tiles = -(-q_lens // tile)
    request = np.repeat(np.arange(len(rows)), tiles)
    offset = ranges(np.zeros_like(tiles), tiles) * tile
    query = (np.cumsum(q_lens) - q_lens)[request] + offset
    tokens = np.minimum(q_lens[request] - offset, tile)
    position = (kv_lens - q_lens)[request] + offset  # of the tile's first query
    stop = np.maximum(position + tokens, 0)
    start = np.zeros_like(stop) if window is None else np.maximum(position - window + 1, 0) // ALIGN * ALIGN
    length = stop - start
    target_length = max(MIN_KEYS, -(-int(length.sum()) // target))
    size = -(-length // np.maximum((2 * length + target_length) // (2 * target_length), 1))
    size = np.maximum(-(-size // ALIGN) * ALIGN, ALIGN)
    count = np.maximum(-(-length // size), 1)

    split = count > 1
    partials = np.where(split, count * tokens, 0)
    partial = np.cumsum(partials) - partials
    of = np.repeat(np.arange(len(count)), count)  # the tile of each piece
    nth = ranges(np.zeros_like(count), count)
    items = np.zeros(len(of), ITEM)
    items["row"] = rows[request][of]
    items["query"] = query[of]
    items["num_queries"] = tokens[of]
    items["start"] = start[of] + nth * size[of]
    items["stop"] = np.minimum(items["start"] + size[of], stop[of])
    seen = position + 1 if window is None else np.zeros_like(position)
    items["full"] = np.clip(seen[of], items["start"], items["stop"])
    items["partial"] = np.where(split[of], partial[of] + nth * tokens[of], -1)
    items = items[np.argsort(items["start"] - items["stop"], kind="stable")]  # the shortest start last
    merges = np.zeros(int(split.sum()), MERGE)
    merges["query"] = query[split]
    merges["num_queries"] = tokens[split]
    merges["partial"] = partial[split]
    merges["num_pieces"] = count[split]
    if bounds is None:
        return Pieces(items, merges)
    return Pieces(_filled_up(items, bounds.items), _filled_up(merges, bounds.merges))


def _filled_up(records: Records, size: int) -> Records:
    return np.concatenate([records, np.zeros(size - len(records), records.dtype)])
