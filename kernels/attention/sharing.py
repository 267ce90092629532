"""Which requests of a step read the same pages: found in the page table, so it holds whatever put them there.

Two requests that have the same page at the same column have the same tokens there. That is identity, not a count of
references: unrelated requests can never look alike. After Hydragen (Juravsky et al., 2024) and FastTree (Pan et al.,
2025): attention over a shared run of pages is computed once for the queries of all its readers, and merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Int32, Int64


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Columns ``start … stop - 1`` of the page table, the same pages for every member."""

    members: Int64  # indices into the requests, ascending, at least two
    start: int
    stop: int


def shared_runs(table: Int32, limits: Int64, worth: int) -> tuple[list[SharedRun], Int64]:
    """Covers the start of every request with runs of pages it shares, outermost first.

    Args:
        table: ``[R, columns]``, the pages of each request.
        limits: ``[R]``, columns of each that all of its queries see in full; nothing beyond is considered.
        worth: a run is taken if (members - 1) * columns, the page reads it saves, is at least this.

    Returns:
        The runs, and ``[R]`` how many columns of each request they cover, without gaps, from the first.
    """
    runs: list[SharedRun] = []
    covered = np.zeros(len(limits), np.int64)
    # Members agree on columns before ``column``; those from ``start`` on are not in a run yet.
    open_groups = [(np.flatnonzero(limits > 0), 0, 0)]
    while open_groups:
        members, start, column = open_groups.pop()
        if len(members) < 2 or (len(members) - 1) * (int(limits[members].max()) - start) < worth:
            continue
        pages = table[members, column]
        order = np.argsort(pages, kind="stable")
        for group in np.split(members[order], np.flatnonzero(np.diff(pages[order])) + 1):
            if len(group) < 2:
                continue
            end = int(limits[group].min())
            same = (table[group[1:], column:end] == table[group[0], column:end]).all(axis=0)
            stop = end if same.all() else column + int(same.argmin())
            taken = (len(group) - 1) * (stop - start) >= worth
            if taken:
                runs.append(SharedRun(group, start, stop))
                covered[group] = stop
            open_groups.append((group[limits[group] > stop], stop if taken else start, stop))
    return runs, covered
