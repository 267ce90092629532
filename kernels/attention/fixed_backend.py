"""Attention whose result for a token does not depend on the rest of its step: same shapes, same order, to the bit.

Queries are attended in tiles that are aligned to positions, over all keys up to the tile's end: a query token meets the
same shapes whether its prompt is computed at once, in chunks or after a cached prefix, alone or in a batch. In plain
torch, one tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kv_pool import KVPool
from .base import AttentionBatch, LayerSpec, StepShape

QUERIES = 16  # query tokens of a tile
KEYS = 64  # a tile's keys are a multiple of this: whole vectors for any softmax kernel


@dataclass(slots=True)
class _Tile:
    """The query tokens of one request at positions ``first … first + QUERIES - 1``; not all need be in the step."""

    tokens: slice  # of the step's query tokens
    rows: slice  # their places in the tile
    first: int  # position of the tile's first row, a multiple of QUERIES
    keys: int  # keys that the tile reads, a multiple of KEYS


@dataclass(slots=True)
class _Request:
    place: tuple[Tensor, Tensor]  # pages and offsets, int64 [keys of its last tile]
    length: int  # keys that it has; the others are read as zeros
    tiles: list[_Tile]


class FixedAttention:
    """See `AttentionBackend`. All arithmetic is in float32.

    Args:
        pool: keys and values.
        layers: one spec a layer.
        num_heads: query heads, a multiple of kv_heads.
    """

    captures = False
    joint = False
    saved_keys = 0

    def __init__(self, pool: KVPool, layers: list[LayerSpec], num_heads: int) -> None:
        self._pool, self._layers = pool, layers
        self._kv_heads, self._dim = pool.layout.kv_heads, pool.layout.head_dim
        self._group = num_heads // self._kv_heads
        self._requests: list[_Request] = []

    def forms(self, shape: StepShape) -> list[StepShape]:
        """See `AttentionBackend.forms`."""
        return []

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> None:
        """See `AttentionBackend.plan`."""
        if shape is not None:
            raise ValueError("the fixed backend does not support padded steps")
        self._requests, begin = [], 0
        for row, q_len, kv_len in zip(batch.rows, batch.q_lens.tolist(), batch.kv_lens.tolist(), strict=True):
            self._requests.append(self._plan_request(batch, int(row), begin, kv_len - q_len, kv_len))
            begin += q_len

    def _plan_request(self, batch: AttentionBatch, row: int, begin: int, start: int, stop: int) -> _Request:
        """``begin``: the query token of position ``start``."""
        tiles = []
        for first in range(start // QUERIES * QUERIES, stop, QUERIES):
            low, high = max(start, first), min(stop, first + QUERIES)
            tokens = slice(begin + low - start, begin + high - start)
            keys = -(-(first + QUERIES) // KEYS) * KEYS
            tiles.append(_Tile(tokens, slice(low - first, high - first), first, keys))
        positions = np.minimum(np.arange(tiles[-1].keys), stop - 1)  # beyond the end: any slot, read as zero
        pages = batch.host_page_table[row, positions // batch.page_size].astype(np.int64)
        offsets = (positions % batch.page_size).astype(np.int64)
        place = (torch.from_numpy(x).to(self._pool.device) for x in (pages, offsets))
        return _Request((next(place), next(place)), stop, tiles)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.run`."""
        kv, spec = self._pool.layer(layer), self._layers[layer]
        result = torch.empty_like(q) if out is None else out
        for request in self._requests:
            keys, values = (self._padded(x, request) for x in kv.read(request.place))
            for tile in request.tiles:
                found = self._attend(spec, tile, q[tile.tokens].float(), keys, values)
                result[tile.tokens] = found[tile.rows].to(q.dtype)
        return result

    def _padded(self, read: Tensor, request: _Request) -> Tensor:
        """float32 ``[kv_heads, keys, D]``, 0 beyond the request's end."""
        read = read.float()
        read[request.length :] = 0.0
        return read.transpose(0, 1).contiguous()

    def _attend(self, spec: LayerSpec, tile: _Tile, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``[QUERIES, heads, D]``. Rows that are not in the step attend with queries of 0."""
        kv_heads, group, dim = self._kv_heads, self._group, self._dim
        padded = q.new_zeros(QUERIES, kv_heads, group, dim)
        padded[tile.rows] = q.view(-1, kv_heads, group, dim)
        folded = padded.permute(1, 2, 0, 3).reshape(kv_heads, group * QUERIES, dim)
        scores = torch.bmm(folded, keys[:, : tile.keys].contiguous().transpose(1, 2)).mul_(spec.scale)
        if spec.softcap is not None:
            scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        hidden = _hidden(tile, spec.window, q.device)
        scores = scores.view(kv_heads, group, QUERIES, tile.keys).masked_fill_(hidden, float("-inf"))
        probs = torch.softmax(scores, dim=-1)
        if spec.sinks is not None:
            lse = torch.logsumexp(scores, dim=-1, keepdim=True)
            probs.mul_(torch.sigmoid(lse - spec.sinks.view(kv_heads, group, 1, 1)))
        out = torch.bmm(probs.view(kv_heads, group * QUERIES, tile.keys), values[:, : tile.keys].contiguous())
        return out.view(kv_heads, group, QUERIES, dim).permute(2, 0, 1, 3).reshape(QUERIES, -1, dim)


def _hidden(tile: _Tile, window: int | None, device: torch.device) -> Tensor:
    """bool ``[QUERIES, keys]``: the keys that a query does not see."""
    positions = torch.arange(tile.first, tile.first + QUERIES, device=device)[:, None]
    keys = torch.arange(tile.keys, device=device)
    hidden = keys > positions
    return hidden if window is None else hidden | (keys <= positions - window)
