"""Policies, copies, partial pages, the dump, the check and the imports of the room."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from branchwise.radix import InvariantError, Lease, RadixTree
from branchwise.radix.node import common_tokens, page_key

A = list(range(100, 112))


def test_importing_the_room_imports_no_torch():
    code = "import sys, branchwise.radix; sys.exit(any(m.split('.')[0] in ('torch', 'triton') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


def test_keys_sort_as_tokens_do():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 2**31, 3).astype(np.int32) for _ in range(200)] + [np.array([1, 2], np.int32)]
    assert sorted(map(page_key, rows)) == [page_key(np.array(r, np.int32)) for r in sorted(map(tuple, rows))]


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2], [1, 258], 1),
        ([5], [6], 0),
        ([256], [257], 0),
        ([], [1], 0),
    ],
)
def test_common_tokens(a, b, common):
    assert common_tokens(page_key(np.array(a, np.int32)), page_key(np.array(b, np.int32))) == common


def last_standing(d, prompts: list[list[int]], lease: Lease | None = None) -> list[list[int]]:
    """The prompts in the order in which reservation after reservation evicts them."""
    lease, gone = lease or d.fill(), []
    while len(gone) < len(prompts):
        d.tree.reserve(lease, 1)
        gone += [p for p in prompts if p not in gone and d.peek(p) < len(p)]
    return gone


@pytest.mark.parametrize(("policy", "order"), [("lru", "cab"), ("lfu", "cba"), ("fifo", "abc"), ("priority", "bac")])
def test_policies(drive, policy, order):
    d = drive(policy=policy)
    prompts = {name: [number] * 4 for number, name in enumerate("abc", start=1)}
    for name, priority in (("a", 1), ("b", 0), ("c", 2)):
        d.remember(prompts[name], priority=priority)
    for name in "aacab":  # uses: a 3, c 1, b 1, in this order of last use: c a b
        d.release(d.match([*prompts[name], 9]))
    assert last_standing(d, list(prompts.values())) == [prompts[name] for name in order]


@pytest.mark.parametrize(("policy", "first"), [("lfu", "b"), ("fifo", "a"), ("lru", "b")])
def test_a_split_keeps_the_past(drive, policy, first):
    """Of A the first page was used five times, the rest three times; of B everything four times."""
    d = drive(policy=policy)
    b = [1] * 12
    d.remember(A)
    d.remember(b)
    for prompt in [A] * 3 + [b] * 4 + [A[:4]] * 2:
        d.release(d.match([*prompt, 9]))
    lease = d.fill()
    d.tree.reserve(lease, 2)
    assert d.peek(A) == 4 and d.peek(b) == 12, "the lower half of A was less often and less recently used, and older"
    assert last_standing(d, [A[:4], b], lease)[0] == (A[:4] if first == "a" else b)


def test_a_hit_lifts_the_priority_of_what_it_uses(drive):
    d = drive(policy="priority")
    low, high = [1] * 4, [2] * 4
    d.remember(low)
    d.remember(high, priority=1)
    d.release(d.match([*low, 9], priority=2))
    assert last_standing(d, [low, high]) == [high, low]


def test_unknown_policy():
    with pytest.raises(ValueError, match="lru, lfu, fifo, priority"):
        RadixTree(4, policy="random")


def test_a_long_leaf_loses_only_what_is_needed(drive):
    d = drive(num_pages=8)
    d.remember(list(range(32)))
    lease = d.match([100])
    assert d.tree.reserve(lease, 3).tolist() == [5, 6, 7]
    assert d.peek(list(range(32))) == 20 and d.tree.num_nodes == 1
    assert d.tree.evicted_total == 3 and d.tree.cached == 5


def test_reserving_for_several_leases_takes_as_much_as_for_one_after_the_other(drive):
    both = [drive(num_pages=8), drive(num_pages=8)]
    leases = []
    for d in both:
        d.remember(list(range(20)))
        leases.append([d.match([100 + i]) for i in range(6)])
        assert d.tree.reserve_each(leases[-1] * 2) is None, "twelve pages of eight"
        assert not any(len(lease.pages) for lease in leases[-1])
    together, one_by_one = both
    found = together.tree.reserve_each(leases[0]).tolist()
    assert set(found) == {int(one_by_one.tree.reserve(lease, 1)[0]) for lease in leases[1]}
    assert [lease.pages.tolist() for lease in leases[0]] == [[page] for page in found]
    for d in both:
        d.check()
        assert d.tree.evicted_total == 3 and d.tree.cached == 2


def test_the_best_page_to_copy_is_found_among_many(drive):
    d = drive(num_pages=64, page_size=8)
    rng = np.random.default_rng(0)
    cached = [rng.integers(0, 2, 8).tolist() for _ in range(30)]
    for tokens in cached:
        d.remember(tokens)
    for _ in range(200):
        wanted = rng.integers(0, 2, 8).tolist()
        best = max(next((i for i in range(7) if wanted[i] != tokens[i]), 7) for tokens in cached)
        lease = d.match(wanted)
        assert lease.hit == best and lease.report.reason == ("hit" if best == 7 else "diverged" if best else "cold")
        d.release(lease)


def test_a_longer_partial_page_takes_the_place_of_a_shorter_one(drive):
    d = drive()
    d.remember([1, 2])
    d.remember([1, 2, 3])
    assert d.tree.cached == 1 and d.peek([1, 2, 3, 4]) == 3
    d.remember([1, 2])
    assert d.tree.cached == 1, "covered by the longer one"
    d.remember([1, 2, 3, 4])
    assert d.tree.cached == 1 and d.tree.num_nodes == 1, "a page took the place of its beginning"
    d.remember([1, 2, 3])
    assert d.tree.cached == 1, "covered by the page"


def test_a_partial_page_somebody_copies_from_stays(drive):
    d = drive()
    page = d.remember([1, 2])[0]
    reader = d.match([1, 2, 9])
    d.remember([1, 2, 3])
    assert reader.copy == (page, 2) and d.tree.cached == 2
    d.release(reader)
    assert d.tree.evictable == 2


def test_lfu_and_fifo_do_not_hide_new_pages_behind_an_old_node(drive):
    for policy, nodes in (("lru", 1), ("lfu", 2), ("fifo", 2), ("priority", 1)):
        d = drive(policy=policy)
        d.remember(A[:4])
        d.remember(A[:8])
        assert d.tree.num_nodes == nodes


def test_peek_changes_nothing(drive):
    d = drive()
    d.remember(A)
    before = d.tree.dump()
    assert [d.peek(A[:n]) for n in range(13)] == list(range(13))
    assert d.peek(A, ("nobody", "")) == 0
    assert d.tree.dump() == before


def test_flush_leaves_what_is_leased(drive):
    d = drive()
    d.remember(A)
    d.remember([1, 2, 3, 4, 5])
    lease = d.match([*A[:8], 7])
    assert d.tree.flush() == 3 and d.tree.cached == 2
    d.release(lease)
    assert d.tree.flush() == 2 and d.tree.flush() == 0
    assert d.tree.allocator.free == 32


def test_arrays_read_from_a_lease_are_never_modified(drive):
    d = drive()
    lease, twin = d.match(A), d.match(A)
    d.compute(twin, A)
    d.tree.reserve(lease, 3)
    seen = lease.pages
    before = seen.tolist()
    d.compute(lease, A)
    assert seen.tolist() == before and lease.pages.tolist() == twin.pages.tolist()


def test_dump(drive):
    d = drive()
    d.remember([*A, 1])
    d.remember([*A[:4], 1, 2], ("ann", "salt"))
    lease = d.match([*A[:8], 7])
    dump = json.loads(json.dumps(d.tree.dump(preview=3)))
    first, second = dump["namespaces"]
    assert (first["owner"], second["owner"], second["salt"]) == ("", "ann", "salt")
    (head,) = first["children"]
    assert head.items() >= {"tokens": 8, "pages": 2, "preview": A[:3], "leases": 1, "hits": 1, "stub": False}.items()
    (tail,) = head["children"]
    assert (tail["tokens"], tail["children"][0]["stub"], tail["leases"]) == (4, True, 0)
    assert dump["totals"].items() >= {"cached": 6, "evictable": 4, "nodes": 5, "leases": 1, "free": 26}.items()
    d.release(lease)


def test_dump_is_bounded_in_nodes_and_depth(drive):
    d = drive(num_pages=256, page_size=1, policy="fifo")
    for end in range(1, 151):
        d.remember(list(range(end)))
    assert d.tree.num_nodes == 150
    for max_nodes, shown in ((1000, 100), (7, 7), (0, 0)):
        node = d.tree.dump(max_nodes=max_nodes)["namespaces"][0]
        depth = 0
        while node["children"]:
            (node,) = node["children"]
            depth += 1
        assert depth == shown and node["omitted"] == 1


def test_dump_is_bounded_in_namespaces(drive):
    d = drive()
    for salt in "abcde":
        d.remember([1, 2, 3], ("", salt))
    for max_nodes, shown in ((5, 5), (3, 3), (0, 1)):
        dump = d.tree.dump(max_nodes=max_nodes)
        assert len(dump["namespaces"]) == shown and dump["omitted"] == 5 - shown


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (lambda t, n: setattr(n, "locks", 1), "locks"),
        (lambda t, n: setattr(n, "last_access", 99), "index"),
        (lambda t, n: n.pages.__setitem__(0, 31), "slots lost"),
        (lambda t, n: n.tokens.__setitem__(0, 9), "first page"),
        (lambda t, n: setattr(t.structure.device, "evictable", 9), "evictable"),
        (lambda t, n: setattr(t.structure.device, "cached", 9), "cached"),
        (lambda t, n: setattr(t.structure, "num_nodes", 9), "num_nodes"),
        (lambda t, n: t.structure.device.leaves.remove(n), "index"),
        (lambda t, n: t.allocator.allocate(1), "slots lost"),
        (lambda t, n: t.structure.salts_in_use.clear(), "salts"),
        (lambda t, n: setattr(n, "tokens", n.tokens[:3]), "copies of"),
        (lambda t, n: setattr(n, "below", [1, 0, 0]), "miscounts"),
        (lambda t, n: n.parent.children.order.clear(), "unsorted"),
        (lambda t, n: t.match(np.array(A, np.int32)), "leases are live"),
    ],
)
def test_check_sees_what_is_wrong(drive, harm, complaint):
    d = drive()
    d.remember(A)
    d.tree.check([])
    (root,) = d.tree.roots.values()
    harm(d.tree, next(iter(root.children.values())))
    with pytest.raises(InvariantError, match=complaint):
        d.tree.check([])
