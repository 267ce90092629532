"""The tree that a step's requests form: which of them read the same pages in the same columns of the page table.

Sharing is page identity, never a count of references: two requests share a column only if they have the same page
there and in every column before it. All nodes of one depth are found together, so the cost grows with the depth of the
tree and the columns compared, not with the number of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Int32, Int64, ranges

BLOCK = 64  # columns compared at first; four times as many while requests agree
MAX_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Nodes:
    """N nodes, parents before children: columns ``starts[i] … stops[i] - 1`` of the page table, the same pages for
    every member. ``members[indptr[i] : indptr[i + 1]]`` are indices into the requests, at least two."""

    starts: Int64  # [N]
    stops: Int64  # [N]
    parents: Int64  # [N], -1 at a root
    members: Int64
    indptr: Int64  # [N + 1]

    @property
    def counts(self) -> Int64:
        """Readers of each node."""
        return np.diff(self.indptr)


def find_nodes(table: Int32, rows: Int32, limits: Int64) -> Nodes:
    """Every run of pages that two or more requests have in the same columns.

    Args:
        table: ``[rows, columns]``, the page table.
        rows: ``[R]``, each request's row of it.
        limits: ``[R]``, columns of each request that all of its queries see in full; others are not considered.
    """
    starts, stops, parents, members, counts = [], [], [], [], []
    total = 0
    live = (limits > 0).nonzero()[0]
    group = np.zeros(len(live), np.int64)  # of each live member: members agree on every column before ``column``
    column, parent = np.zeros(1, np.int64), np.full(1, -1)
    while len(live) > 1:
        key = (group << 32) | table[rows[live], column[group]]
        order = key.argsort(kind="stable")
        key = key[order]
        ends = np.append((key[1:] != key[:-1]).nonzero()[0] + 1, len(key))
        size = ends.copy()
        size[1:] -= ends[:-1]
        big = size > 1
        if not big.any():
            break
        kept = order[big.repeat(size)]
        live, size = live[kept], size[big]
        first = size.cumsum() - size
        came_from = group[kept][first]
        group = np.arange(len(size)).repeat(size)
        start = column[came_from]
        stop = _agreement(table, rows[live], size, start + 1, np.minimum.reduceat(limits[live], first))
        starts.append(start)
        stops.append(stop)
        parents.append(parent[came_from])
        members.append(live)
        counts.append(size)
        parent = total + np.arange(len(size))
        total += len(size)
        deeper = limits[live] > stop[group]
        live, group, column = live[deeper], group[deeper], stop
    return Nodes(_join(starts), _join(stops), _join(parents), _join(members), indptr_of(_join(counts)))


def _agreement(table: Int32, rows: Int32, size: Int64, agreed: Int64, limits: Int64) -> Int64:
    """For each group of ``size`` consecutive ``rows`` that agree before column ``agreed``: the first column where two
    of them differ, at most its limit."""
    stops = limits.copy()
    open_groups = (agreed < limits).nonzero()[0]
    first = size.cumsum() - size
    at, width = int(agreed[open_groups].min(initial=2**31)), BLOCK
    while len(open_groups):
        end = min(at + width, int(limits[open_groups].max()))
        counts = size[open_groups]
        block = table[:, at:end][rows[ranges(first[open_groups], counts)]]
        leader = counts.cumsum() - counts
        differs = block != block[leader].repeat(counts, axis=0)
        column = differs.argmax(axis=1)  # the first difference, or 0 where there is none
        column[~differs[np.arange(len(column)), column]] = end - at
        mismatch = np.minimum.reduceat(column, leader) + at
        limit = limits[open_groups]
        stops[open_groups] = np.minimum(mismatch, limit)
        open_groups = open_groups[(mismatch == end) & (end < limit)]
        at, width = end, min(4 * width, MAX_BLOCK)
    return stops


def _join(arrays: list[Int64]) -> Int64:
    return np.concatenate([np.empty(0, np.int64), *arrays])


def indptr_of(counts: Int64) -> Int64:
    """``[N + 1]``: where each of N runs of ``counts`` elements begins, and where the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
