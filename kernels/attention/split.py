"""Cuts a step's attention into pieces of work of about equal length, for devices that run hundreds at once.

A tile is some consecutive query tokens of one request, with all the query heads of one key head. Long key ranges are
split further (flash-decoding; Dao et al., 2023): every piece yields a partial softmax and `merges` says how they are
put together. The numbers of pieces are bounded by the numbers of requests and tokens alone, so that a grid in a CUDA
graph can hold any step of its shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Int32, Int64, ranges

ALIGN = 64  # key ranges begin at multiples of this: a power of two, and of the keys a kernel reads at a time
MIN_KEYS = 256  # a piece with fewer costs more to merge than it saves

# Columns of `Pieces.items` and `Pieces.merges`. Queries are tokens of the step, keys are positions in the request.
ROW, FIRST, TOKENS, POSITION, START, STOP, SLOT, ITEM_FIELDS = 0, 1, 2, 3, 4, 5, 6, 8
MERGE_FIRST, MERGE_TOKENS, MERGE_SLOT, MERGE_COUNT, MERGE_FIELDS = 0, 1, 2, 3, 4


@dataclass(frozen=True, slots=True)
class Pieces:
    """What to compute, longest first.

    Args:
        items: int32 ``[N, ITEM_FIELDS]``: row of the page table; first query token; number of query tokens; position of
            the first; range of keys, ``START … STOP - 1``; first row of the partial results, or -1 where the piece is
            all of its tile. Keys of a range are visible to a query unless they lie after it or outside its window.
        merges: int32 ``[M, MERGE_FIELDS]``: first query token; number of query tokens; first row of the partial
            results, which follow one another, a row for each query token; number of pieces.

    Both may be filled up with zeros: pieces of no tokens.
    """

    items: Int32
    merges: Int32


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most `Pieces` of any step with so many requests and query tokens."""

    items: int
    merges: int

    @classmethod
    def of(cls, requests: int, tokens: int, tile: int, target: int) -> Bounds:
        """``tile`` and ``target``: as for `cut`."""
        tiles = (tokens + requests * (tile - 1)) // tile
        # A tile of length n * x, x the wanted length, is split into at most n + 1/2 pieces, and only if n >= 3/2.
        return cls(tiles + target, min(tiles, target * 2 // 3 + 1))

    @staticmethod
    def partial_rows(tile: int, target: int) -> int:
        """Rows of partial results that no step exceeds."""
        return tile * (target + target // 3 + 1)


def cut(
    rows: Int64,
    firsts: Int64,
    q_lens: Int64,
    kv_lens: Int64,
    window: int | None,
    tile: int,
    target: int,
    bounds: Bounds | None = None,
) -> Pieces:
    """Pieces of these requests.

    Args:
        rows: ``[R]`` rows of the page table.
        firsts: ``[R]`` first query tokens.
        q_lens, kv_lens: as in `AttentionBatch`; requests without keys are padding, and yield zeros.
        tile: query tokens of a tile, at most.
        target: pieces wanted for each key head: as many as it takes to fill the device.
        bounds: what to fill the result up to.
    """
    tiles = -(-q_lens // tile)
    request = np.repeat(np.arange(len(rows)), tiles)
    offset = ranges(np.zeros_like(tiles), tiles) * tile
    tokens = np.minimum(q_lens[request] - offset, tile)
    position = (kv_lens - q_lens)[request] + offset
    stop = np.maximum(position + tokens, 0)
    start = np.zeros_like(stop) if window is None else np.maximum(position - window + 1, 0) // ALIGN * ALIGN
    length = stop - start
    wanted = max(MIN_KEYS, -(-int(length.sum()) // target))
    size = -(-length // np.maximum((2 * length + wanted) // (2 * wanted), 1))
    size = np.maximum(-(-size // ALIGN) * ALIGN, ALIGN)
    count = np.maximum(-(-length // size), 1)

    split = count > 1
    slots = np.where(split, count * tokens, 0)
    slot = np.cumsum(slots) - slots
    of = np.repeat(np.arange(len(count)), count)  # the tile of each piece
    nth = ranges(np.zeros_like(count), count)
    items = np.zeros((len(of), ITEM_FIELDS), np.int32)
    items[:, ROW] = rows[request][of]
    items[:, FIRST] = (firsts[request] + offset)[of]
    items[:, TOKENS] = tokens[of]
    items[:, POSITION] = position[of]
    items[:, START] = start[of] + nth * size[of]
    items[:, STOP] = np.minimum(items[:, START] + size[of], stop[of])
    items[:, SLOT] = np.where(split[of], slot[of] + nth * tokens[of], -1)
    items = items[np.argsort(items[:, START] - items[:, STOP], kind="stable")]  # the last to start is the shortest
    merges = np.zeros((int(split.sum()), MERGE_FIELDS), np.int32)
    merges[:, MERGE_FIRST] = (firsts[request] + offset)[split]
    merges[:, MERGE_TOKENS] = tokens[split]
    merges[:, MERGE_SLOT] = slot[split]
    merges[:, MERGE_COUNT] = count[split]
    if bounds is None:
        return Pieces(items, merges)
    return Pieces(_filled_up(items, bounds.items), _filled_up(merges, bounds.merges))


def _filled_up(array: Int32, size: int) -> Int32:
    return np.concatenate([array, np.zeros((size - len(array), array.shape[1]), np.int32)])
