"""Bugs of other prefix caches, one test each. The docstrings say what happened there."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.radix import LeaseError, RadixTree

A = list(range(100, 112))  # three pages of four


def test_duplicate_prefixes_published_in_one_step(drive):
    """mini-sglang: two requests compute one prefix; the second's pages are freed while its row still names them."""
    d = drive()
    first, second = d.match([*A, 1]), d.match([*A, 2])
    assert d.compute(first, [*A, 1]) is None
    mine = d.tree.reserve(second, 4).tolist()
    replaced = d.compute(second, [*A, 2])
    canonical = first.pages[:3].tolist()
    assert replaced == (0, canonical)
    assert second.pages.tolist() == [*canonical, mine[3]], "the canonical pages are the ones to use from now on"
    assert d.tree.allocator.quarantined == 3, "a step in flight may still write the duplicates"
    spare = d.match([0])
    taken = d.tree.reserve(spare, d.tree.allocator.free)
    assert not set(taken.tolist()) & set(mine[:3])
    d.next_step()
    assert d.tree.allocator.quarantined == 0


def test_duplicates_in_the_middle_of_a_path(drive):
    """The same, where the duplicated stretch neither starts at the root nor ends where the lease does."""
    d = drive()
    shared = d.remember(A[:4])[0]
    first, second = d.match([*A, 1]), d.match([*A, 50, 51, 52, 53, 54])
    d.compute(first, A)
    replaced = d.compute(second, [*A, 50, 51, 52, 53, 54])
    assert replaced == (1, first.pages[1:3].tolist())
    assert second.pages[0] == shared and second.length == 16
    assert d.peek([*A, 50, 51, 52, 53]) == 16


def test_same_prompt_in_the_same_step_is_computed_once(drive):
    """SGLang under fcfs computes it once a request. Here pages are in the tree from the moment they are scheduled."""
    d = drive()
    first = d.match([*A, 1])
    d.compute(first, [*A, 1])
    second = d.match([*A, 2])
    assert second.hit == 12 and second.pages.tolist() == first.pages[:3].tolist()


def test_abort_during_prefill(drive):
    """mini-sglang: an aborted prefill is freed, then cached again by its late result: pages in tree and free list."""
    d = drive()
    lease = d.match([*A, 1, 2, 3])
    d.compute(lease, A[:6])
    d.tree.reserve(lease, 2)
    d.next_step()
    d.release(lease)
    assert d.tree.allocator.quarantined == 3, "the owned pages may be written by the step in flight"
    assert d.peek(A) == 4, "the page that was scheduled stays"
    with pytest.raises(LeaseError):
        d.compute(lease, A)
    with pytest.raises(LeaseError):
        d.release(lease, A)
    d.next_step()
    assert d.tree.flush() == 1
    assert d.tree.allocator.free == 32


def test_double_release(drive):
    """mini-sglang avoids it with a set of finished requests. Here it is an error and changes nothing."""
    d = drive()
    lease, other = d.match([*A, 1]), d.match([*A, 1])
    d.compute(lease, A)
    d.release(lease, A)
    before = d.tree.dump()
    for again in (
        lambda: d.tree.release(lease),
        lambda: d.tree.release(lease, np.array(A, np.int32)),
        lambda: d.tree.publish(lease, np.array(A, np.int32)),
        lambda: d.tree.reserve(lease, 1),
    ):
        with pytest.raises(LeaseError):
            again()
    assert d.tree.dump() == before
    d.release(other)


def test_lease_of_another_tree(drive):
    ours, theirs = drive(), drive()
    lease = theirs.match(A)
    with pytest.raises(LeaseError):
        ours.release(lease)
    theirs.release(lease)


def test_own_hit_is_never_evicted_for_oneself(drive):
    """vLLM #33775: an allocation evicted the hit it was made for, as that was the least recently used."""
    d = drive(num_pages=6)
    d.remember(A)
    d.remember([1, 2, 3, 4, 5, 6, 7, 8])
    lease = d.match([*A, *range(200, 208)])  # the oldest in the tree, and now our own
    path = lease.pages.tolist()
    assert d.tree.reserve(lease, 4) is None, "three pages are ours, only three are left"
    assert d.tree.reserve(lease, 3) is not None
    assert lease.pages.tolist()[:3] == path
    assert d.peek(A) == 12 and d.peek([1, 2, 3, 4]) == 0


def test_split_does_not_keep_a_stale_time(drive):
    """mini-sglang: a partial hit splits a node, and the half just hit keeps the old time: it goes first."""
    d = drive(num_pages=6)
    d.remember(A)
    d.remember([1, 2, 3, 4, 5, 6, 7, 8])
    d.release(d.match(A[:9]))  # the first two pages of A are hit, the third is not
    d.fill()
    lease = d.match([0])
    d.tree.reserve(lease, 2)
    assert d.peek(A) == 8, "the missed tail of A was the oldest, its head the youngest"
    assert d.peek([1, 2, 3, 4, 5, 6, 7, 8]) == 4
    d.tree.reserve(lease, 1)
    assert d.peek(A) == 8 and d.peek([1, 2, 3, 4]) == 0


def test_locks_do_not_reach_other_namespaces(drive):
    d = drive(num_pages=6)
    ann, bob = ("ann", ""), ("bob", "")
    d.remember(A, ann)
    d.remember(A, bob)
    lease = d.match([*A, 1], ann)
    assert lease.hit == 12
    other = d.match([0], bob)
    assert len(d.tree.reserve(other, 3)) == 3, "bob's copy was not locked by ann's match"
    assert d.peek(A, bob) == 0 and d.peek(A, ann) == 12
    assert d.tree.reserve(other, 1) is None


@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_page_boundaries(drive, page_size):
    """One token less than a page, a page, one more: of cached tokens, and of tokens looked up."""
    for cached in (page_size - 1, page_size, page_size + 1, 2 * page_size - 1, 2 * page_size, 2 * page_size + 1):
        if not cached:
            continue
        d = drive(page_size=page_size)
        tokens = list(range(cached))
        d.remember(tokens)
        assert d.tree.cached == -(-cached // page_size), "the last partial page is kept"
        for length in range(1, 3 * page_size):
            prompt = list(range(length))
            lease = d.match(prompt)
            assert lease.hit == min(cached, length - 1)
            assert lease.length == lease.hit // page_size * page_size
            assert (lease.copy is None) == (lease.hit % page_size == 0)
            d.release(lease)


def test_eviction_order_is_tails_before_heads(drive):
    """vLLM's tests name the order literally; so does this one. Least recent first, and of a prefix its end first."""
    d = drive(num_pages=8)
    a = d.remember(A)  # pages a0 a1 a2
    b = d.remember([*A[:4], 1, 2, 3, 4, 5, 6, 7, 8])  # a0 b1 b2
    c = d.remember([9, 9, 9, 9])  # c0
    assert b[0] == a[0]
    order = []
    lease = d.fill()
    for _ in range(6):
        order += d.tree.reserve(lease, 1).tolist()
        d.tree.check()
    assert order == [a[2], a[1], b[2], b[1], b[0], c[0]]
    assert not d.tree.num_nodes


def test_failed_reservation_changes_nothing(drive):
    d = drive(num_pages=6)
    d.remember(A)
    lease = d.match([*A[:8], 7, 7])
    before, pages = d.tree.dump(), lease.pages
    assert d.tree.reserve(lease, d.tree.available + 1) is None
    assert d.tree.dump() == before and lease.pages is pages
    assert d.tree.reserve(lease, d.tree.available) is not None


def test_copy_source_is_protected_until_published(drive):
    """The page that is to be copied must not be evicted, not even by the pages reserved for the copy."""
    d = drive(num_pages=4)
    source = d.remember(A[:4])[0]
    lease = d.match([*A[:3], 9])
    assert lease.copy == (source, 3) and lease.hit == 3
    assert d.tree.reserve(lease, 4) is None, "the source is the fourth page"
    assert source not in d.tree.reserve(lease, 3)
    d.tree.publish(lease, np.array([*A[:3]], np.int32))
    assert d.tree.reserve(lease, 1).tolist() == [source], "published: the copy is part of a planned step"


def test_copy_source_stays_locked_when_it_is_split(drive):
    """Two leases copy from one run; a third match splits the run between them. Every lock must come off again."""
    d = drive()
    d.remember(A)
    one = d.match([*A[:3], 9, 9])
    two = d.match(A[:10])  # splits the run that `one` copies from, and copies from its lower half
    assert one.copy is not None and two.copy is not None and two.hit == 9
    d.release(two)
    d.release(one)
    assert d.tree.evictable == d.tree.cached == 3


def test_a_page_in_flight_is_never_a_copy_source(drive):
    """Copies run before the step's writes: a page written by the same step would be copied empty."""
    d = drive()
    lease = d.match(A[:4])
    d.compute(lease, A[:4])
    early = d.match([*A[:3], 9])
    assert (early.hit, early.copy) == (0, None)
    assert d.match([*A[:4], 9]).hit == 4, "to read it is fine: a step writes before it reads"
    d.next_step()
    late = d.match([*A[:3], 9])
    assert late.copy == (int(lease.pages[0]), 3)


def test_in_flight_partial_page_is_never_a_copy_source(drive):
    d = drive()
    lease = d.match([1, 2])
    d.compute(lease, [1, 2])
    d.release(lease, [1, 2])
    assert d.match([1, 2, 3]).hit == 0
    d.next_step()
    assert d.match([1, 2, 3]).hit == 2


def test_generated_tokens_are_part_of_the_keys(drive):
    """SGLang #16521: generated tokens were once left out."""
    d = drive()
    lease = d.match(A[:6])
    for end in range(6, 13):
        d.compute(lease, A[:end])
    d.next_step()
    d.release(lease, A[:11])
    assert d.peek([*A, 1]) == 12
    assert d.tree.num_nodes == 1, "a lease extends the node it added"


def test_retracted_request_resumes_as_a_hit(drive):
    """SGLang releases what a retracted request computed; here resuming finds it, to the last token."""
    d = drive()
    lease = d.match(A)
    d.compute(lease, A[:10])
    d.next_step()
    d.release(lease, A[:10])
    d.next_step()
    assert d.match(A).hit == 10


def test_publishing_more_than_is_held(drive):
    """An error for a lease without enough pages, which stays valid."""
    d = drive()
    lease = d.match(A)
    d.tree.reserve(lease, 2)
    for publish in (d.tree.publish, d.tree.release):
        with pytest.raises(LeaseError):
            publish(lease, np.array(A, np.int32))
        d.tree.check([lease])
    d.release(lease, A[:8])
    assert d.peek(A) == 8


def test_namespaces_leave_nothing_behind(drive):
    d = drive()
    for salt in map(str, range(20)):
        d.remember(A[:5], ("ann", salt))
    assert len(d.tree.roots) == 16, "the pool holds two pages of each of sixteen"
    d.tree.flush()
    assert not d.tree.roots and not d.tree.structure.salts_in_use


def test_disabled_cache_remembers_nothing(drive):
    d = drive(enabled=False)
    pages = d.remember(A)
    lease = d.match(A)
    assert (lease.hit, lease.report.reason, len(pages)) == (0, "disabled", 3)
    d.tree.reserve(lease, 3)
    d.release(lease, A)
    assert d.tree.allocator.quarantined == 3
    d.next_step()
    assert d.tree.allocator.free == 32 and not d.tree.roots


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_conversation_is_found_again_in_one_node(page_size):
    """Turn after turn by one user: under LRU the node grows, and matching stays one comparison."""
    tree = RadixTree(256, page_size)
    history = np.arange(16, dtype=np.int32)
    for turn in range(4):
        tree.end_step(tree.begin_step())
        lease = tree.match(history, limit=len(history) - 1)
        assert lease.hit == (16 * turn if turn else 0) or lease.hit == len(history) - 1
        history = np.concatenate((history, np.arange(turn * 100, turn * 100 + 16, dtype=np.int32)))
        tree.reserve(lease, -(-len(history) // page_size) - len(lease.pages))
        tree.release(lease, history)
        tree.check()
    assert tree.peek(history) == len(history)
