"""The tree that a step's requests form: which of them read the same pages in the same columns of the page table.

Sharing is page identity, never a count of references: two requests share a column only if they have the same page
there and in every column before it. All nodes of one depth are found together, so the cost grows with the depth of the
tree and the columns compared, not with the number of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Int32, Int64, ranges

BLOCK = 128  # columns compared at first; four times as many while requests agree
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
        return self.indptr[1:] - self.indptr[:-1]


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
        differs = np.ones(len(key) + 1, np.bool_)
        np.not_equal(key[1:], key[:-1], out=differs[1:-1])
        bounds = differs.nonzero()[0]
        size = bounds[1:] - bounds[:-1]
        big = size > 1
        if not big.any():
            break
        kept = order[big.repeat(size)]
        live, size = live[kept], size[big]
        ends = size.cumsum()
        first = ends - size
        came_from = group[kept[first]]
        group = np.arange(len(size)).repeat(size)
        start = column[came_from]
        own_limits = limits[live]
        stop = _agreement(table, rows[live], first, ends, start + 1, np.minimum.reduceat(own_limits, first))
        starts.append(start)
        stops.append(stop)
        parents.append(parent[came_from])
        members.append(live)
        counts.append(size)
        parent = np.arange(total, total + len(size))
        total += len(size)
        deeper = (own_limits > stop[group]).nonzero()[0]
        live, group, column = live[deeper], group[deeper], stop
    return Nodes(_join(starts), _join(stops), _join(parents), _join(members), indptr_of(_join(counts)))


def _agreement(table: Int32, rows: Int32, first: Int64, ends: Int64, agreed: Int64, limits: Int64) -> Int64:
    """For each group ``rows[first : ends]`` that agrees before column ``agreed``: the first column where two of its
    rows differ, at most the group's limit."""
    stops = limits.copy()
    unknown = (agreed < limits).nonzero()[0]  # groups that agree on every column compared so far
    at, width = int(agreed[unknown].min(initial=2**31)), BLOCK
    while len(unknown):
        if len(unknown) < len(ends):
            size = (ends - first)[unknown]
            of_unknown = rows[ranges(first[unknown], size)]
            last = size.cumsum() - 1
            leader = last + 1 - size
        else:
            of_unknown, leader, last = rows, first, ends - 1
        limit = limits[unknown]
        end = min(at + width, int(limit.max()))
        block = table[:, at:end][of_unknown]
        # Of each row: the first column that differs from the next row's, or the end where none does.
        differs = np.ones((len(block), end - at + 1), np.bool_)
        np.not_equal(block[1:], block[:-1], out=differs[:-1, :-1])
        differs[last, :-1] = False
        mismatch = np.minimum.reduceat(differs.argmax(axis=1), leader) + at
        stops[unknown] = np.minimum(mismatch, limit)
        unknown = unknown[(mismatch == end) & (end < limit)]
        at, width = end, min(4 * width, MAX_BLOCK)
    return stops


def _join(arrays: list[Int64]) -> Int64:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


def indptr_of(counts: Int64) -> Int64:
    """``[N + 1]``: where each of N runs of ``counts`` elements begins, and where the last ends."""
    indptr = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=indptr[1:])
    return indptr
