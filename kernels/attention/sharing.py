"""The runs of pages that several requests of a step read, for backends that attend over each run once.

Attention over a shared run is computed once for the queries of all its readers, and merged (Hydragen: Juravsky et al.,
2024; FastTree: Pan et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Int32, Int64
from .tree_nodes import find_nodes


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


def shared_runs(table: Int32, rows: Int32, limits: Int64, min_saved: int) -> SharedRuns:
    """Covers the start of every request with runs of pages it shares, outermost first.

    Args:
        table, rows, limits: see `tree_nodes.find_nodes`.
        min_saved: a run is taken if (members - 1) * columns, the page reads it saves, is at least this. Otherwise its
            columns are left to the runs that continue it.
    """
    nodes = find_nodes(table, rows, limits)
    runs: list[SharedRun] = []
    covered = np.zeros(len(rows), np.int64)
    starts: list[int] = []  # of each node and the columns before it that no run has taken
    taken: list[bool] = []
    ends = nodes.counts.cumsum().tolist()
    for start, stop, parent, end, count in zip(
        nodes.starts.tolist(), nodes.stops.tolist(), nodes.parents.tolist(), ends, nodes.counts.tolist(), strict=True
    ):
        starts.append(start if parent < 0 or taken[parent] else starts[parent])
        taken.append((count - 1) * (stop - starts[-1]) >= min_saved)
        if taken[-1]:
            members = nodes.members[end - count : end]
            runs.append(SharedRun(members, starts[-1], stop))
            covered[members] = stop
    return SharedRuns(runs, covered)
