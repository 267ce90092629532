"""Shared runs, against the definition: the same pages at the same columns, within what all queries see."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.kernels.attention.base import AttentionBatch
from branchwise.kernels.attention.sharing import shared_runs


def runs_of(
    table: list[list[int]], limits: list[int], min_saved: int = 1
) -> tuple[list[tuple[list[int], int, int]], list[int]]:
    shared = shared_runs(np.array(table, np.int32), np.arange(len(table), dtype=np.int32), np.array(limits), min_saved)
    return sorted((run.members.tolist(), run.start, run.stop) for run in shared.runs), shared.covered.tolist()


def test_one_prefix() -> None:
    runs, covered = runs_of([[1, 2, 3, 9], [1, 2, 4, 9], [5, 2, 3, 9]], [3, 3, 3])
    assert runs == [([0, 1], 0, 2)]
    assert covered == [2, 2, 0]


def test_levels_of_a_tree() -> None:
    table = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [1, 2, 6, 8]]
    runs, covered = runs_of(table, [4] * 4)
    assert runs == [([0, 1], 2, 3), ([0, 1, 2, 3], 0, 2), ([2, 3], 2, 3)]
    assert covered == [3] * 4


def test_a_short_limit_ends_a_run_for_its_request_alone() -> None:
    runs, covered = runs_of([[1, 2, 3], [1, 2, 3], [1, 2, 3]], [3, 1, 3])
    assert runs == [([0, 1, 2], 0, 1), ([0, 2], 1, 3)]
    assert covered == [3, 1, 3]


def test_a_run_that_saves_too_little_is_left_to_the_deeper_one() -> None:
    table = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 9, 9, 9, 9, 9]]
    runs, covered = runs_of(table, [6] * 3, min_saved=5)
    assert runs == [([0, 1], 0, 5)]
    assert covered == [5, 5, 0]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_runs_tile_true_sharing(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 10))
    cell = st.integers(0, 2)
    table = np.array(
        data.draw(st.lists(st.lists(cell, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    )
    limits = np.array(data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    min_saved = data.draw(st.integers(1, 6))
    shared = shared_runs(table.astype(np.int32), np.arange(rows, dtype=np.int32), limits, min_saved)
    runs, covered = shared.runs, shared.covered
    depth = np.zeros(rows, int)
    for run in sorted(runs, key=lambda run: run.start):
        assert len(run.members) >= 2
        assert (len(run.members) - 1) * (run.stop - run.start) >= min_saved
        assert (limits[run.members] >= run.stop).all()
        assert (depth[run.members] == run.start).all()  # no gap, no overlap
        assert (table[run.members, : run.stop] == table[run.members[0], : run.stop]).all()
        depth[run.members] = run.stop
    assert (depth == covered).all()
    if min_saved == 1:  # then nothing shared is left: what follows is seen by one request alone
        for i in range(rows):
            for j in range(i):
                k = covered[i]
                if covered[j] == k < min(limits[i], limits[j]):
                    assert (table[i, : k + 1] != table[j, : k + 1]).any()
    some = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), np.int64)
    among = shared.among(some)
    depth = np.zeros(len(some), int)
    for run in among.runs:  # in this order: a run comes after those it continues
        assert len(run.members) >= 2
        assert (depth[run.members] == run.start).all()
        pages = table[some[run.members], : run.stop]
        assert (pages == pages[0]).all()
        depth[run.members] = run.stop
    assert (depth == among.covered).all() and (depth <= covered[some]).all()


def test_a_step_finds_its_runs_once() -> None:
    """Later calls get the same object. Only full pages count, not those that a query sees in part."""
    table = np.array([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 0], [9, 9, 9, 9]], np.int32)
    q_lens, kv_lens = np.array([1, 1, 6], np.int32), np.array([15, 13, 12], np.int32)
    rows = np.array([1, 0, 2], np.int32)
    batch = AttentionBatch(rows, q_lens, kv_lens, 2, 4, torch.from_numpy(table), table)
    shared = batch.shared_runs(4)
    assert batch.shared_runs(4) is shared
    found = sorted((run.members.tolist(), run.start, run.stop) for run in shared.runs)
    assert found == [([0, 1], 1, 3), ([0, 1, 2], 0, 1)]
    assert shared.covered.tolist() == [3, 3, 1]
    (run,) = batch.shared_runs(12).runs  # three pages: the run of all three requests saves two
    assert (run.members.tolist(), run.start, run.stop) == ([0, 1], 0, 3)
