"""Finds the requests of a step that read the same pages, by comparing rows of the page table.

Two requests that have the same page at the same column have the same tokens there. This is identity, not a count of
references: unrelated requests can never look alike. After Hydragen (Juravsky et al., 2024) and FastTree (Pan et al.,
2025): attention over a shared run of pages is computed once for the queries of all its readers, and merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Int32, Int64


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Columns ``start … stop - 1`` of the page table: the same pages for every member."""

    members: Int64  # indices of requests, ascending, at least two
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SharedRuns:
    """The shared runs of R requests. They cover the first ``covered[i]`` columns of request i without gaps."""

    runs: list[SharedRun]  # a run comes after those it continues
    covered: Int64  # [R]

    def among(self, requests: Int64) -> SharedRuns:
        """The runs as shared by ``requests`` alone (ascending indices). Members become indices into ``requests``."""
        if len(requests) == len(self.covered):
            return self
        index = np.full(len(self.covered), -1)
        index[requests] = np.arange(len(requests))
        runs, covered = [], np.zeros(len(requests), np.int64)
        for run in self.runs:
            members = index[run.members]
            members = members[members >= 0]
            if len(members) > 1:  # and so are those of the run that this one continues
                runs.append(SharedRun(members, run.start, run.stop))
                covered[members] = run.stop
        return SharedRuns(runs, covered)


def shared_runs(table: Int32, limits: Int64, min_saved: int) -> SharedRuns:
    """Covers the start of every request with runs of pages it shares, outermost first.

    Args:
        table: ``[R, columns]``, the pages of each request.
        limits: ``[R]``, columns of each that all of its queries see in full; nothing beyond is considered.
        min_saved: a run is taken if (members - 1) * columns, the page reads it saves, is at least this.
    """
    runs: list[SharedRun] = []
    covered = np.zeros(len(limits), np.int64)
    # Members agree on columns before ``column``; those from ``start`` on are not in a run yet.
    open_groups = [(np.flatnonzero(limits > 0), 0, 0)]
    while open_groups:
        members, start, column = open_groups.pop()
        if len(members) < 2 or (len(members) - 1) * (int(limits[members].max()) - start) < min_saved:
            continue
        pages = table[members, column]
        order = np.argsort(pages, kind="stable")
        for group in np.split(members[order], np.flatnonzero(np.diff(pages[order])) + 1):
            if len(group) < 2:
                continue
            end = int(limits[group].min())
            same = (table[group[1:], column:end] == table[group[0], column:end]).all(axis=0)
            stop = end if same.all() else column + int(same.argmin())
            taken = (len(group) - 1) * (stop - start) >= min_saved
            if taken:
                runs.append(SharedRun(group, start, stop))
                covered[group] = stop
            open_groups.append((group[limits[group] > stop], stop if taken else start, stop))
    return SharedRuns(runs, covered)
