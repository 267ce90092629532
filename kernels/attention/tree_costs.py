"""What the flat path and the tree path are expected to take on a device: the choice between them is made by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TreeCosts:
    """Times on the device, in units of reading one token's keys and values in one layer from device memory.

    The defaults were measured on an H200 with 4 query heads a key head (`tests/benchmarks/bench_tree_attention.py`);
    `tree_tuning` fits them to other devices at start.

    Attributes:
        tiles: query rows (query tokens times the query heads of a key head) that a kernel takes at a time, ascending.
        per_key: one pass over a key that is in the L2 cache, for each tile. The first pass costs at least 1.
        flat: the same for a backend that reads keys once for each request.
        flat_tail: what that backend takes for a key that only one request reads.
        partial: writing and merging one query token's partial result.
        in_turn: merging one more partial result of the same query token, while no other token is waited for.
        flat_layer, tree_layer: the launches of one layer and their latency.
        margin: the saving from which on steps change from the flat path to the tree; back they change at none.
    """

    tiles: tuple[int, ...] = (16, 64, 128)
    per_key: tuple[float, ...] = (0.45, 0.87, 1.48)
    flat: float = 0.45
    flat_tail: float = 1.0
    partial: float = 5.0
    in_turn: float = 260.0
    flat_layer: float = 9000.0
    tree_layer: float = 11000.0
    margin: float = 4000.0

    def for_bytes(self, ratio: float) -> TreeCosts:
        """The same costs where a token has ``ratio`` times fewer bytes: reading it, the unit, takes that much less."""
        scaled = {
            name: getattr(self, name) * ratio for name in ("partial", "in_turn", "flat_layer", "tree_layer", "margin")
        }
        per_key = tuple(cost * ratio for cost in self.per_key)
        return replace(self, per_key=per_key, flat=min(self.flat * ratio, 1.0), **scaled)

    def for_tiles(self, tiles: tuple[int, ...]) -> TreeCosts:
        """The same costs for other tiles: each costs what the smallest known one costs that is no smaller."""
        known = np.minimum(np.searchsorted(self.tiles, tiles), len(self.tiles) - 1)
        return replace(self, tiles=tiles, per_key=tuple(self.per_key[i] for i in known))

    def scaled(
        self,
        flat_layer: float,
        again: float,
        alone: float,
        tree_layer: float,
        together: float,
        tail: float,
        merging: float,
    ) -> TreeCosts:
        """The costs with each term multiplied by a factor, in units of one key of a tail (``tail``)."""
        return replace(
            self,
            flat_layer=self.flat_layer * flat_layer / tail,
            flat=self.flat * again / tail,
            flat_tail=self.flat_tail * alone / tail,
            tree_layer=self.tree_layer * tree_layer / tail,
            per_key=(self.per_key[0], *(cost * together / tail for cost in self.per_key[1:])),
            partial=self.partial * merging / tail,
            in_turn=self.in_turn * merging / tail,
        )

    def passes(self, group: int, most: int) -> Float64:
        """By the number of query tokens that read a key together, up to ``most``: cost of the passes over it."""
        return tile_table(self, group, most)[1]

    def merging(self, slots: int, most: int) -> float:
        """Of ``slots`` partial results, at most ``most`` of them one token's."""
        return self.partial * slots + self.in_turn * most


@lru_cache(maxsize=64)
def tile_table(costs: TreeCosts, group: int, most: int) -> tuple[npt.NDArray[np.int64], Float64]:
    """By the number of query tokens that read a key together, up to ``most``: the index of the smallest tile that holds
    them, or of the largest there is, and the cost of the passes over one key."""
    rows = np.arange(most + 1) * group
    tile = np.minimum(np.searchsorted(costs.tiles, rows), len(costs.tiles) - 1)
    per_key, largest = np.array(costs.per_key), costs.tiles[-1]
    whole, rest = rows // largest, rows % largest
    rest_tile = np.minimum(np.searchsorted(costs.tiles, rest), len(costs.tiles) - 1)
    return tile, whole * per_key[-1] + np.where(rest > 0, per_key[rest_tile], 0.0)
