"""Events. The other tests check with `conftest.Mirror` that they are complete; these check what they say."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.radix import Event, PagesEntered, RadixTree

A = list(range(100, 112))  # three pages of four


class Log:
    """Records events, and checks the tree when the last one of an operation arrives."""

    def __init__(self, tree: RadixTree) -> None:
        self.tree = tree
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if not self.tree.structure.events.pending:
            self.tree.check()

    def told(self) -> list[tuple]:
        """Events since the last call: (+ or the reason, namespace, parent, tokens, pages)."""
        events, self.events = self.events, []
        return [(getattr(e, "reason", "+"), e.namespace, e.parent, e.tokens.tolist(), e.pages.tolist()) for e in events]


@pytest.fixture
def log(drive):
    d = drive(num_pages=8)
    log = Log(d.tree)
    d.tree.subscribe(log)
    return d, log


def test_pages_enter_when_they_are_published(log):
    d, log = log
    lease = d.match([*A, 1], ("ann", "salt"))
    d.compute(lease, A[:8])
    assert log.told() == [("+", ("ann", "salt"), -1, A[:8], [0, 1])]
    d.compute(lease, [*A, 1])
    assert log.told() == [("+", ("ann", "salt"), 1, A[8:], [2])], "the node grew: the parent is its last page"
    d.release(lease, [*A, 1])
    assert log.told() == [("+", ("ann", "salt"), 2, [1], [3])], "the partial page"


def test_a_split_is_no_event(log):
    d, log = log
    d.remember(A)
    log.told()
    d.remember([*A[:4], 7, 7, 7, 7])
    assert log.told() == [("+", ("", ""), 0, [7, 7, 7, 7], [3])]
    assert d.tree.num_nodes == 3


def test_pages_that_were_there_already_do_not_enter(log):
    d, log = log
    first, second = d.match(A), d.match(A)
    d.compute(first, A)
    log.told()
    d.compute(second, A)
    assert log.told() == []


def test_why_pages_leave(log):
    d, log = log
    d.remember(A[:6])
    log.told()
    d.remember(A)
    assert [event[0] for event in log.told()] == ["covered", "+"]
    d.tree.reserve(d.match([0]), 6)
    assert log.told() == [("evicted", ("", ""), 2, A[8:], [3])]
    kept = d.match(A[:5])
    assert d.tree.prune(np.array(A[:5], np.int32)) == 1
    assert log.told() == [("pruned", ("", ""), 0, A[4:8], [2])]
    d.release(kept)
    assert d.tree.flush() == 1
    assert log.told() == [("flushed", ("", ""), -1, A[:4], [0])]


def test_the_last_sharer_of_a_covered_page(log):
    d, log = log
    d.remember(A[:6])
    hold = d.tree.hold(np.array(A[:6], np.int32))
    d.remember(A)
    log.told()
    d.tree.unhold(hold)
    assert [(event[0], event[3]) for event in log.told()] == [("covered", A[4:6])]


def test_nobody_is_told_after_unsubscribing(log):
    d, log = log
    d.tree.structure.events.unsubscribe(log)
    d.remember(A)
    assert log.told() == []


def test_without_subscribers_no_event_is_made(monkeypatch):
    tree = RadixTree(8, 4)
    monkeypatch.setattr("branchwise.radix.structure.PagesEntered", None)
    monkeypatch.setattr("branchwise.radix.structure.PagesLeft", None)
    lease = tree.match(np.array(A, np.int32))
    tree.reserve(lease, 3)
    tree.release(lease, np.array(A, np.int32))
    assert tree.flush() == 3


def test_an_observer_that_fails_is_unsubscribed_and_nobody_else_notices(log, caplog):
    d, log = log

    def broken(event: Event) -> None:
        raise OSError("the router is gone")

    d.tree.subscribe(broken)
    d.remember(A)
    assert "the router is gone" in caplog.text and len(caplog.records) == 1
    assert len(log.told()) == 1 and d.peek(A) == 12
    d.tree.flush()
    assert len(log.told()) == 1 and len(caplog.records) == 1


def test_an_observer_may_change_the_tree(log):
    """The events that it causes are delivered after the present ones, to all observers in the same order."""
    d, log = log

    def forgetful(event: Event) -> None:
        if isinstance(event, PagesEntered):
            d.tree.flush()

    d.tree.subscribe(forgetful)
    lease = d.match(A)
    d.compute(lease, A[:8])
    d.release(lease)
    lease = d.match([9, 9, 9, 9])
    d.compute(lease, [9, 9, 9, 9])  # the flush that this causes removes A
    assert [event[0] for event in log.told()] == ["+", "+", "flushed"]


def test_only_pages_on_the_device_are_matched(drive):
    """A node that only the host has ends the match before it, is not copied from, and is no event."""
    d = drive(host_slots=8)
    d.remember(A)
    d.remember([*A[:8], 5, 5, 5, 5])
    structure = d.tree.structure
    d.tree.allocator.give_back(structure.evict(structure.device, 2))
    structure.events.deliver()
    d.check()
    assert structure.host.cached == 2 and d.mirror.left["evicted"] == 2
    assert d.peek(A) == 8 and d.tree.match(np.array(A, np.int32)).hit == 8
    assert d.peek([*A[:8], 5, 5, 7]) == 8, "nor copied from"
    assert d.tree.reach(np.array(A, np.int32))[:3] == (8, 4, 0)
    assert d.tree.reach(np.array([*A[:8], 5, 5, 7], np.int32))[:3] == (8, 2, 0)


@pytest.mark.parametrize(("slots", "left"), [(40, 3), (8, 0)])
def test_a_full_host_gives_up_what_was_loaded(drive, slots, left):
    d = drive(host_slots=slots)
    if slots == 8:
        d.remember([7] * 20)
    d.remember(A)
    structure = d.tree.structure
    d.tree.allocator.give_back(structure.evict(structure.device, d.tree.evictable))
    assert structure.host.slots.free == (37 if slots == 40 else 0)
    transfer = d.tree.moves.load(d.tree.reach(np.array(A, np.int32)), 8)
    d.tree.end_transfer(transfer, 3)
    assert d.peek(A) == 12 and structure.host.cached == left + (5 if slots == 8 else 0)
