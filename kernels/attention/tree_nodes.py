"""The tree that a step's requests form: which of them read the same pages in the same columns of the page table.

Sharing is page identity, never a count of references: two requests share a column only if they have the same page
there. A page's keys and values depend on every token before it, so those requests have the same tokens in all columns
before; of a long table a few columns are compared first. All nodes of one depth are found together: the cost grows with
the depth of the tree and the columns compared, not with the number of nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import Int32, Int64, ranges

BLOCK = 256  # columns that are compared at once
STRIDE = 32  # of more columns, one in so many is compared first


class Nodes(NamedTuple):
    """N nodes, parents before children: columns ``starts[i] … stops[i] - 1`` of the page table, the same pages for
    every member. The first ``counts[0]`` members, at least two indices of requests, are node 0's, and so on."""

    starts: Int64  # [N]
    stops: Int64  # [N]
    parents: Int64  # [N], -1 at a root
    members: Int64
    counts: Int64  # [N]

    @property
    def firsts(self) -> Int64:
        """``[N]``: where each node's members begin."""
        return self.counts.cumsum() - self.counts


def find_nodes(table: Int32, rows: Int32, limits: Int64) -> Nodes:
    """Every run of pages that two or more requests have in the same columns.

    Args:
        table: ``[rows, columns]``, the page table.
        rows: ``[R]``, each request's row of it.
        limits: ``[R]``, columns of each request that all of its queries see in full; others are not considered.
    """
    found: list[Nodes] = []  # of each depth
    total = 0
    live = limits.nonzero()[0]
    group = np.zeros(len(live), np.int64)  # of each live member: members agree on every column before ``column``
    column, parent = np.zeros(1, np.int64), np.array([-1])
    while len(live) > 1:
        key = (group << 32) | table[rows[live], column[group]]
        order = key.argsort(kind="stable")
        key = key[order]
        differs = np.ones(len(key) + 1, np.bool_)
        np.not_equal(key[1:], key[:-1], out=differs[1:-1])
        bounds = differs.nonzero()[0]
        if len(bounds) > len(key):
            break
        size = bounds[1:] - bounds[:-1]
        big = size > 1
        if not big.all():
            order, size = order[big.repeat(size)], size[big]
        live = live[order]
        ends = size.cumsum()
        first = ends - size
        came_from = group[order[first]]
        group = np.arange(len(size)).repeat(size)
        start, own_limits = column[came_from], limits[live]
        stop = _agreement(table, rows[live], first, ends, start + 1, np.minimum.reduceat(own_limits, first))
        found.append(Nodes(start, stop, parent[came_from], live, size))
        parent = np.arange(total, total + len(size))
        total += len(size)
        deeper = (own_limits > stop[group]).nonzero()[0]
        live, group, column = live[deeper], group[deeper], stop
    if len(found) == 1:
        return found[0]
    none = np.empty(0, np.int64)
    return Nodes(*map(np.concatenate, zip(*found, strict=True))) if found else Nodes(none, none, none, none, none)


def _agreement(table: Int32, rows: Int32, first: Int64, ends: Int64, agreed: Int64, limits: Int64) -> Int64:
    """For each group ``rows[first : ends]`` that agrees before column ``agreed``: the first column where two of its
    rows differ, at most the group's limit."""
    at, width, most = int(agreed.min()), BLOCK, int(limits.max())
    stops, unknown = limits.copy(), np.arange(len(limits))  # groups that agree on every column compared so far
    if most - at > BLOCK:
        same = _first_difference(table[:, at + STRIDE - 1 : most : STRIDE], rows, first, ends)
        at += STRIDE * int(np.minimum(same, (limits - at) // STRIDE).min())  # beyond its limit a row has no pages
        width = 2 * STRIDE
    while at < most and len(unknown):
        end = min(at + width, most)
        mismatch = _first_difference(table[:, at:end], rows, first, ends) + at
        stops[unknown] = np.minimum(mismatch, limits)
        at, width = end, 4 * width
        if end < most:
            kept = ((mismatch == end) & (end < limits)).nonzero()[0]
            size = (ends - first)[kept]
            rows, unknown, limits = rows[ranges(first[kept], size)], unknown[kept], limits[kept]
            ends = size.cumsum()
            first = ends - size
    return stops


def _first_difference(table: Int32, rows: Int32, first: Int64, ends: Int64) -> Int64:
    """For each group ``rows[first : ends]``: the first column where two of its rows differ; the number of columns where
    none do."""
    block, columns = table[rows], table.shape[1]
    differs = np.ones((len(rows) - 1, columns + 1), np.bool_)
    np.not_equal(block[1:], block[:-1], out=differs[:, :-1])
    found = np.empty(len(rows), np.int64)  # where each row differs from the next
    differs.argmax(axis=1, out=found[:-1])
    found[ends - 1] = columns
    return np.minimum.reduceat(found, first)
