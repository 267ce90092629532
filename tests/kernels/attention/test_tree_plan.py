"""Plans of tree attention against the definition: every query token reads every key it sees exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.kernels.attention.tree_costs import TreeCosts
from branchwise.kernels.attention.tree_nodes import find_nodes
from branchwise.kernels.attention.tree_plan import (
    OPEN,
    TreeLimits,
    TreePlan,
    TreeRequests,
    plan_tree,
)

EVERYTHING_SHARED = TreeCosts(per_key=(0.5, 0.5, 0.5), flat=1.0, partial=0.0, tree_layer=-1e12)
ROOMY = TreeLimits(items=(4096,) * 3, slots=1 << 16, workers=(8, 8, 8), min_keys=(256,) * 3)


def tree_table(paths: list[list[tuple[int, int]]], page_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A page table and its lengths in tokens. A path lists (name of a run, tokens): equal names are equal pages, if all
    columns before them are equal too. Beyond its length a row has what others have there."""
    pages: dict[object, int] = {}
    columns = max(sum(-(-tokens // page_size) for _, tokens in path) for path in paths) + 1
    table = np.zeros((len(paths), columns), np.int32)
    for row, path in enumerate(paths):
        at, before = 0, -1
        for name, tokens in path:
            for _ in range(-(-tokens // page_size)):
                table[row, at] = before = pages.setdefault((before, name), len(pages) + 1)
                at += 1
    longest = (table > 0).sum(1).argmax()
    np.copyto(table, table[longest], where=table == 0)
    return table, np.array([sum(tokens for _, tokens in path) for path in paths], np.int64)


def requests_of(kv_lens: np.ndarray, q_lens: np.ndarray | None = None) -> TreeRequests:
    q_lens = np.ones(len(kv_lens), np.int64) if q_lens is None else q_lens
    return TreeRequests(np.arange(len(kv_lens), dtype=np.int32), np.cumsum(q_lens) - q_lens, q_lens, kv_lens)


def check_coverage(plan: TreePlan, table: np.ndarray, requests: TreeRequests, page_size: int) -> None:
    row_of = np.repeat(requests.rows, requests.q_lens)
    positions = np.concatenate([np.arange(k - q, k) for k, q in zip(requests.kv_lens, requests.q_lens, strict=True)])
    covered: list[list[tuple[int, int]]] = [[] for _ in row_of]
    slots_used: list[list[int]] = [[] for _ in row_of]
    for item in np.concatenate(plan.items):
        for i in range(item["num_queries"]):
            slot = int(item["query"]) + i
            query = int(plan.queries[slot])
            stop = min(int(item["stop"]), int(positions[query]) + 1)
            start = int(item["start"])
            columns = slice(start // page_size, -(-stop // page_size))
            assert (table[item["row"], columns] == table[row_of[query], columns]).all()
            covered[query].append((start, stop))
            if item["partial"] >= 0:
                assert item["partial"] == item["query"]
                slots_used[query].append(slot)
    for query, ranges in enumerate(covered):
        at = 0
        for start, stop in sorted(ranges):
            assert start == at or start >= stop  # nothing is left of a tail whose item begins beyond the query
            at = max(at, stop)
        assert at == positions[query] + 1
        first, count = plan.merges[query]
        if len(ranges) == 1:
            assert count == -1 and not slots_used[query]
        else:
            assert sorted(slots_used[query]) == plan.slots[first : first + count].tolist()


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[list[tuple[int, int]]], int]:
    page_size = draw(st.sampled_from([1, 4, 16]))
    paths = []
    for row in range(draw(st.integers(1, 12))):
        depth = draw(st.integers(0, 3))
        path = [(draw(st.integers(0, 1)), page_size * draw(st.integers(1, 6))) for _ in range(depth)]
        paths.append([*path, (100 + row, draw(st.integers(1, 70)))])
    return paths, page_size


@settings(max_examples=300, deadline=None)
@given(forests(), st.data())
def test_every_key_is_read_once(forest: tuple[list[list[tuple[int, int]]], int], data: st.DataObject) -> None:
    paths, page_size = forest
    table, kv_lens = tree_table(paths, page_size)
    longest = data.draw(st.sampled_from([1, 9, 70]))
    q_lens = np.array([data.draw(st.integers(1, min(int(kv_len), longest))) for kv_len in kv_lens], np.int64)
    requests = requests_of(kv_lens, q_lens)
    group = data.draw(st.sampled_from([1, 4, 7]))
    costs = TreeCosts(partial=data.draw(st.sampled_from([0.0, 2.0, 1e9])))
    limits = TreeLimits(
        (4096,) * 3, 1 << 16, (data.draw(st.integers(1, 40)),) * 3, (data.draw(st.integers(64, 256)),) * 3
    )
    plan = plan_tree(table, requests, int(q_lens.sum()), group, page_size, costs, limits, -np.inf)
    assert plan is not None
    check_coverage(plan, table, requests, page_size)
    assert all(len(items) == 0 or items["num_queries"].min() > 0 for items in plan.items)
    for items, rows in zip(plan.items, costs.tiles, strict=True):
        assert all(items["num_queries"] * group <= max(rows, group))


@settings(max_examples=200, deadline=None)
@given(forests(), st.sampled_from([1, 40, 200]))
def test_nodes_are_all_that_is_shared(forest: tuple[list[list[tuple[int, int]]], int], times: int) -> None:
    """``times``: of the tokens of each run; of rows with many pages not all columns are compared."""
    paths, page_size = forest
    table, kv_lens = tree_table([[(name, times * tokens) for name, tokens in path] for path in paths], page_size)
    limits = (kv_lens - 1) // page_size
    nodes = find_nodes(table, np.arange(len(paths), dtype=np.int32), limits)
    depth = np.zeros(len(paths), np.int64)
    for start, stop, first, count in zip(nodes.starts, nodes.stops, nodes.firsts, nodes.counts, strict=True):
        members = nodes.members[first : first + count]
        assert len(members) > 1 and start < stop <= limits[members].min()
        assert (depth[members] == start).all()
        assert (table[members, :stop] == table[members[0], :stop]).all()
        depth[members] = stop
    for i in range(len(paths)):
        for j in range(i):
            end = min(limits[i], limits[j])
            same = np.cumprod(table[i, :end] == table[j, :end]).sum()
            assert min(depth[i], depth[j]) >= same


def test_what_a_row_has_beyond_its_limit_is_not_shared() -> None:
    """A row keeps the pages of the request that had it before, which another may have in the same columns."""
    table, _ = tree_table([[(0, 1), (1, 399)], [(0, 1), (2, 9)], [(3, 400)], [(3, 400)]], page_size=1)
    nodes = find_nodes(table, np.arange(4, dtype=np.int32), np.array([400, 10, 400, 400]))
    assert nodes.stops.tolist() == [1, 400] and nodes.members.tolist() == [0, 1, 2, 3]


def test_a_plan_serves_requests_that_grow() -> None:
    table, kv_lens = tree_table([[(0, 256), (i, 70)] for i in range(1, 9)], 16)
    table = np.pad(table, ((0, 0), (0, 20)), constant_values=9999)
    plan = plan_tree(table, requests_of(kv_lens), 8, 4, 16, EVERYTHING_SHARED, ROOMY)
    assert plan is not None
    for growth in range(100):
        check_coverage(plan, table, requests_of(kv_lens + growth), 16)


def test_levels_are_read_once_each() -> None:
    paths = [[(0, 512), (1 + i // 4, 256), (100 + i, 64)] for i in range(16)]
    table, kv_lens = tree_table(paths, 16)
    plan = plan_tree(table, requests_of(kv_lens), 16, 4, 16, EVERYTHING_SHARED, ROOMY)
    assert plan is not None
    assert plan.keys_read == 512 + 4 * 256 + 16 * 64
    assert plan.keys_flat == 16 * (512 + 256 + 64)


def test_a_node_too_short_to_pay_is_read_by_those_below_it() -> None:
    """16 tokens shared by all cost each of 32 requests a partial result; two longer runs below take them along."""
    paths = [[(0, 16), (1 + i // 16, 4096), (100 + i, 64)] for i in range(32)]
    table, kv_lens = tree_table(paths, 16)
    plan = plan_tree(table, requests_of(kv_lens), 32, 4, 16, TreeCosts(), ROOMY)
    assert plan is not None
    assert plan.keys_read == 2 * (16 + 4096) + 32 * 64
    check_coverage(plan, table, requests_of(kv_lens), 16)


@pytest.mark.parametrize(
    ("paths", "tree"),
    [
        ([[(i, 1024)] for i in range(128)], False),  # nothing shared
        ([[(0, 64), (1 + i, 1024)] for i in range(32)], False),  # a short prefix
        ([[(0, 512), (1 + i, 64)] for i in range(4)], False),  # few requests
        ([[(0, 512), (1 + i, 1024)] for i in range(32)], False),  # little to gain: within the margin
        ([[(0, 8192), (1 + i, 64)] for i in range(32)], True),
        ([[(i // 32, 8192), (100 + i, 128)] for i in range(256)], True),
    ],
)
def test_the_gate(paths: list[list[tuple[int, int]]], tree: bool) -> None:
    table, kv_lens = tree_table(paths, 16)
    costs = TreeCosts()
    plan = plan_tree(table, requests_of(kv_lens), len(paths), 4, 16, costs, ROOMY, costs.margin)
    assert (plan is not None) == tree


@pytest.mark.parametrize(("batch", "tree"), [(4, False), (32, False), (128, True)])
def test_many_requests_that_share_nothing_take_the_faster_kernel(batch: int, tree: bool) -> None:
    table, kv_lens = tree_table([[(i, 1152)] for i in range(batch)], 16)
    costs = TreeCosts(flat_tail=1.06)
    plan = plan_tree(table, requests_of(kv_lens), batch, 4, 16, costs, ROOMY, costs.margin)
    assert (plan is not None) == tree
    assert plan is None or (plan.merges[:, 1] == -1).all()


def test_full_tiles_of_chunks_are_not_shared_and_end_together() -> None:
    """12 chunks of 70 tokens on one prefix have 24 full tiles: 16 processors would take as long as for 32."""
    q_lens = np.array([1] * 20 + [70] * 12, np.int64)
    table, kv_lens = tree_table([[(0, 2048), (i, 40 + q)] for i, q in enumerate(q_lens.tolist(), 1)], 16)
    limits, requests = TreeLimits((256,) * 3, 8192, (132, 33, 16), (128, 256, 256)), requests_of(kv_lens, q_lens)
    plan = plan_tree(table, requests, int(q_lens.sum()), 4, 16, TreeCosts(), limits, -np.inf)
    assert plan is not None
    check_coverage(plan, table, requests, 16)
    items = plan.items[2]
    busy = [0] * 16
    for length in (np.minimum(items["stop"], kv_lens[items["row"]]) - items["start"]).tolist():
        busy[busy.index(min(busy))] += length
    assert max(busy) < 0.95 * 2 * 2048
    shared = 20 + 12 * 6  # decodes, and what is left of the chunks: two partial results each
    assert 2 * shared < len(plan.queries) <= 24 * 32 + 16 * 32 + 2 * shared


def test_what_is_left_of_a_node_is_cut_by_its_own_tile() -> None:
    """33 decodes on one prefix fill one tile and leave a token, beside chunks whose tiles are not cut."""
    q_lens = np.array([1] * 33 + [64] * 12, np.int64)
    table, kv_lens = tree_table([[(0, 2048), (i, 40 + q)] for i, q in enumerate(q_lens.tolist(), 1)], 16)
    limits, requests = TreeLimits((256,) * 3, 8192, (132, 33, 16), (128, 256, 256)), requests_of(kv_lens, q_lens)
    plan = plan_tree(table, requests, int(q_lens.sum()), 4, 16, TreeCosts(), limits, -np.inf)
    assert plan is not None
    check_coverage(plan, table, requests, 16)
    left_over = plan.items[0][plan.items[0]["start"] < 2048]
    assert len(left_over) > 1 and (left_over["stop"] - left_over["start"]).max() <= 256
    assert plan.keys_read == 2048 + 33 * 41 + 12 * (2048 + 104)


def test_limits_make_items_coarser_and_then_give_up() -> None:
    table, kv_lens = tree_table([[(0, 8192), (1 + i, 64)] for i in range(32)], 16)

    def plan(wide_items: int) -> TreePlan | None:
        limits = TreeLimits((64, 64, wide_items), 1 << 16, (8, 32, 32), (256,) * 3)
        return plan_tree(table, requests_of(kv_lens), 32, 4, 16, TreeCosts(), limits)

    fine, coarse = plan(64), plan(16)
    assert fine is not None and coarse is not None
    assert len(fine.items[2]) == 32 and len(coarse.items[2]) == 16
    assert plan(1) is None


def test_tails_are_open() -> None:
    table, kv_lens = tree_table([[(0, 256), (i, 70)] for i in range(1, 3)], 16)
    plan = plan_tree(table, requests_of(kv_lens), 2, 4, 16, TreeCosts(), ROOMY, -np.inf)
    assert plan is not None
    assert sorted(set(np.concatenate(plan.items)["stop"].tolist()))[-1] == OPEN


def test_no_requests() -> None:
    plan = plan_tree(
        np.zeros((1, 4), np.int32), requests_of(np.empty(0, np.int64)), 0, 4, 16, TreeCosts(), ROOMY, -np.inf
    )
    assert plan is not None and not len(plan.queries) and all(len(items) == 0 for items in plan.items)
