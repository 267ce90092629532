"""Why a match ended: every reason."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from branchwise.radix.explain import EvictionRecord

A = list(range(100, 112))


def report(lease) -> tuple[int, str, int | None]:
    return tuple(lease.report)


def test_hit_and_cold(drive):
    d = drive()
    assert report(d.match(A)) == (0, "cold", None)
    d.remember(A)
    assert report(d.match(A)) == (11, "hit", None)
    assert report(d.match(A[:9])) == (8, "hit", None)
    assert report(d.match(A[:1])) == (0, "cold", None), "one token: nothing may be reused"
    assert report(d.match([*A, 1, 2])) == (12, "cold", None), "nothing was ever cached beyond"
    assert report(d.match([7, 7, 7, 7, 7])) == (0, "cold", None)


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7, 8, 11])
def test_diverged_names_the_token(drive, at):
    d = drive()
    d.remember(A)
    assert report(d.match([*A[:at], 7, 7, 7, 7])) == (at, "diverged", at)


def test_diverged_among_children_and_partial_pages(drive):
    d = drive()
    d.remember([*A[:4], 1, 2, 3, 4])
    d.remember([*A[:4], 1, 2, 9])
    assert report(d.match([*A[:4], 1, 5, 5])) == (5, "diverged", 5)
    assert report(d.match([*A[:4], 1, 2, 9, 9, 9])) == (7, "cold", None), "the partial page ends there, nothing differs"
    assert report(d.match([*A[:4], 8, 8])) == (4, "diverged", 4)


def test_evicted_leaf(drive):
    d = drive(num_pages=4)
    d.remember(A)
    lease = d.fill()
    d.tree.reserve(lease, 1)
    assert report(d.match(A)) == (8, "evicted", None)
    assert report(d.match([*A[:8], 7, 7, 7, 7, 7])) == (8, "cold", None), "another page was never there"
    assert report(d.match(A[:11])) == (8, "cold", None), "less than the page that went: nobody can tell"
    d.release(lease)
    d.next_step()
    d.remember(A)
    assert report(d.match(A)) == (11, "hit", None)


def test_a_page_in_a_lower_tier(drive):
    d = drive(num_pages=4, host_slots=4)
    d.remember(A)
    d.tree.reserve(d.fill(), 1)  # the last page moves to the host
    assert report(d.match(A)) == (8, "tier", None)
    assert report(d.match([*A[:4], *A[8:]])) == (4, "diverged", 4), "that page is another's: it follows all of the node"


def test_a_partial_page_in_a_lower_tier(drive):
    d = drive(num_pages=6, host_slots=4)
    d.remember(A[:10])
    d.tree.reserve(d.fill(), 1)  # the last page, of two tokens, moves to the host
    for prompt in (A, A[:10], [*A[:9], 7, 7, 7]):
        assert report(d.match(prompt)) == (8, "tier", None)
    assert report(d.match([*A[:8], 7, 7])) == (8, "cold", None), "the host has no more of this one"


def test_the_device_and_a_lower_tier_have_parts_of_a_page(drive):
    d = drive(num_pages=6, host_slots=4)
    d.remember(A[:11])
    lease = d.fill()
    d.tree.reserve(lease, 1)
    d.release(lease)
    d.next_step()
    d.remember([*A[:9], 7])
    assert report(d.match(A)) == (9, "tier", None)
    assert report(d.match([*A[:9], 8, 8])) == (9, "diverged", 9), "it has no more of this one than the device"


def test_evicted_root_and_partial_page(drive):
    d = drive(num_pages=4)
    d.remember(A[:6])
    lease = d.fill()
    d.tree.reserve(lease, 1)
    stopped = d.match(A)
    assert report(stopped) == (4, "evicted", None), "the partial page was evicted"
    d.release(stopped)
    d.tree.reserve(lease, 1)
    assert not any(root.children for root in d.tree.roots.values())
    assert report(d.match(A)) == (0, "evicted", None), "the namespace's root went with its last page"


def test_evicted_is_remembered_below_a_split(drive):
    """The lower half of a split keeps the serial under which its end is remembered."""
    d = drive(num_pages=6)
    d.remember(A[:8])
    d.remember([*A[:8], 1, 1, 1, 1])
    d.remember([*A[:8], 2, 2, 2, 2])
    d.release(d.match([*A[:4], 3]))  # splits the first two pages
    lease = d.fill()
    d.tree.reserve(lease, 1)
    assert report(d.match([*A[:8], 1, 1, 1, 1])) == (8, "evicted", None)


def test_an_old_eviction_says_nothing_about_another_place(drive):
    """A node that lost its tail and grew again ends elsewhere: evictions after its old end no longer apply to it."""
    d = drive(num_pages=4)
    zeros = [0] * 12
    d.remember(zeros)
    lease = d.fill()
    d.tree.reserve(lease, 1)  # the third page of zeros goes
    d.release(lease)
    d.next_step()
    d.remember([*zeros[:8], 5, 5, 5, 5])
    assert report(d.match([*zeros[:8], 5, 5, 5, 5, 0, 0, 0, 0, 0])) == (12, "cold", None)


def test_a_shortened_node_forgets_what_followed_its_old_end(drive):
    d = drive(num_pages=6)
    d.remember([*A[:8], 5, 5, 5, 5])
    d.remember([*A[:8], 6, 6, 6, 6])
    d.release(d.match([*A[:8], 0]))
    lease = d.fill()
    d.tree.reserve(lease, 3)  # both children, then the second page
    assert d.peek(A) == 4
    assert report(d.match([*A[:4], 5, 5, 5, 5, 5])) == (4, "cold", None)
    assert report(d.match(A)) == (4, "evicted", None)


def test_a_grown_node_forgets_what_followed_its_old_end(drive):
    d = drive(num_pages=5)
    d.remember([*A[:4], 5, 5, 5, 5])
    d.release(d.match([*A[:4], 0]))
    lease = d.fill()
    d.tree.reserve(lease, 1)
    stopped = d.match([*A[:4], 5, 5, 5, 5, 5])
    assert report(stopped) == (4, "evicted", None)
    d.release(stopped)
    d.release(lease)
    d.next_step()
    d.remember(A[:8])
    assert d.tree.num_nodes == 1
    assert report(d.match([*A[:8], 5, 5, 5, 5, 5])) == (8, "cold", None)


def test_namespace_of_the_same_owner_only(drive):
    d = drive()
    d.remember(A, ("ann", "one"))
    assert report(d.match(A, ("ann", "two"))) == (0, "namespace", None)
    assert report(d.match([9, 9, 9, 9], ("ann", "two"))) == (0, "namespace", None), "whatever the prompt: no oracle"
    d.remember([7] * 8, ("ann", "three"))
    assert report(d.match(A, ("ann", "three"))) == (0, "cold", None), "a salt in use hears nothing of the others"
    assert report(d.match(A, ("bob", "one"))) == (0, "cold", None), "never a word about another owner"
    d.tree.flush()
    assert d.match(A, ("ann", "two")).report.reason == "cold"


def test_a_page_in_flight_that_cannot_be_copied_is_no_divergence(drive):
    d = drive()
    d.compute(d.match(A), A)
    assert report(d.match([*A[:6], 9, 9])) == (4, "cold", None)


def test_reasons_are_counted(drive):
    d = drive()
    d.remember(A)
    for tokens in (A, [*A[:5], 1, 1], [1, 2, 3, 4, 5]):
        d.release(d.match(tokens))
    assert d.tree.reasons == {
        "hit": 1,
        "tier": 0,
        "evicted": 0,
        "diverged": 1,
        "namespace": 0,
        "cold": 2,
        "disabled": 0,
    }


def test_a_hit_never_looks_in_the_eviction_record(drive, monkeypatch):
    d = drive()
    d.remember(A)
    looked: list[object] = []
    monkeypatch.setattr(EvictionRecord, "evicted", lambda *key: bool(looked.append(key)))
    for length in range(2, 13):
        assert d.match(A[:length]).report.reason == "hit"
    assert not looked
    d.match([1, 2, 3])
    assert looked


def places(record: EvictionRecord, keys: Iterable[int]) -> list[bool]:
    return [record.evicted(1, bytes([key] * 4), 0) for key in keys]


def test_eviction_record_is_bounded_and_forgets_the_oldest():
    record = EvictionRecord(3)
    for key in (1, 2, 3, 1, 4):
        record.note(1, bytes([key] * 4))
    assert len(record) == 3
    assert places(record, (1, 2, 3, 4)) == [True, False, True, True]
    assert not record.evicted(2, bytes([1] * 4), 0), "another place"
