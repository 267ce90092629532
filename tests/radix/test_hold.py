"""Holds: prefixes protected between requests."""

from __future__ import annotations

import random

import numpy as np
import pytest

from branchwise.radix import LeaseError, RadixTree

PAGES = pytest.mark.parametrize("page_size", [1, 4, 16])


def ids(n, start=2):
    return [(start + 7 * i) % 97 + 2 for i in range(n)]


def array(tokens):
    return np.array(tokens, np.int32)


@PAGES
@pytest.mark.parametrize("length", [1, 3, 4, 15, 16, 17, 40])
def test_a_held_prefix_outlives_pressure_to_the_token(drive, page_size, length):
    driver = drive(num_pages=64, page_size=page_size)
    driver.remember(ids(length))
    driver.remember(ids(length) + [1] * 20)  # somebody goes on from there
    hold = driver.tree.hold(array(ids(length)))
    driver.tree.check()
    assert hold.tokens == length
    driver.tree.flush()
    driver.tree.check()
    assert driver.peek(ids(length)) == length
    # and no page more than that: all others are free
    assert driver.tree.allocator.free + driver.tree.allocator.quarantined == 64 - -(-length // page_size)
    driver.tree.unhold(hold)
    driver.tree.check()
    driver.next_step()
    driver.tree.flush()
    driver.next_step()
    assert driver.tree.allocator.free == 64


def test_nothing_cached_is_nothing_held(drive):
    driver = drive()
    assert driver.tree.hold(array(ids(9))) is None
    driver.remember(ids(9))
    assert driver.tree.hold(array([99, 98, 97])) is None
    assert driver.tree.hold(array([])) is None
    assert driver.tree.hold(array(ids(9)), ("", "other")) is None
    driver.tree.check()
    off = drive(enabled=False)
    assert off.tree.hold(array(ids(9))) is None


def test_a_hold_is_shared_by_counting(drive):
    driver = drive(num_pages=16)
    driver.remember(ids(10))
    hold = driver.tree.hold(array(ids(10)))
    driver.tree.share(hold, 3)
    for _ in range(3):
        driver.tree.unhold(hold)
        driver.tree.check()
        assert driver.tree.evictable == 0
    driver.tree.unhold(hold)
    driver.tree.check()
    assert driver.tree.evictable == 3
    for end in (driver.tree.unhold, driver.tree.share):
        with pytest.raises(LeaseError):
            end(hold)


def test_a_node_does_not_grow_under_a_hold(drive):
    driver = drive()
    driver.remember(ids(8))
    hold = driver.tree.hold(array(ids(8)))
    driver.remember(ids(20))  # would extend the node in place
    assert len(hold.node.tokens) == 8
    driver.tree.flush()
    assert driver.peek(ids(20)) == 8
    driver.tree.unhold(hold)
    driver.tree.check()


def test_a_covered_partial_page_goes_with_its_hold(drive):
    driver = drive(page_size=4)
    driver.remember(ids(6))
    hold = driver.tree.hold(array(ids(6)))
    driver.remember(ids(12))  # the second page whole: the partial page stays, for it is held
    before = driver.tree.cached
    driver.tree.unhold(hold)
    driver.tree.check()
    assert driver.tree.cached == before - 1
    assert driver.peek(ids(12)) == 12


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "priority"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_anything_may_happen_around_holds(policy, page_size, mirror):
    rng = random.Random(7)
    tree = RadixTree(48, page_size, policy)
    mirror = mirror(page_size)
    tree.subscribe(mirror)
    holds, leases = [], []
    texts = [ids(rng.randrange(1, 30), rng.choice([2, 3])) for _ in range(30)]
    texts += [text[: rng.randrange(1, len(text) + 1)] + [1] * rng.randrange(9) for text in texts]
    for _ in range(3000):
        step = tree.begin_step()
        match rng.randrange(6):
            case 0:
                hold = tree.hold(array(rng.choice(texts)))
                if hold is not None:
                    holds.append(hold)
            case 1 if holds:
                hold = rng.choice(holds)
                tree.share(hold)
                holds.append(hold)
            case 2 if holds:
                tree.unhold(holds.pop(rng.randrange(len(holds))))
            case 3 | 4:
                text = array(rng.choice(texts))
                lease = tree.match(text, limit=len(text) - 1)
                if tree.reserve(lease, max(0, -(-len(text) // page_size) - len(lease.pages))) is None:
                    tree.release(lease)
                    if holds:
                        tree.unhold(holds.pop(0))
                else:
                    tree.publish(lease, text)
                    leases.append((lease, text))
            case 5 if leases:
                tree.release(*leases.pop(rng.randrange(len(leases))))
        tree.check()
        mirror.compare(tree)
        tree.end_step(step)
        for hold in {id(hold): hold for hold in holds}.values():
            path = np.concatenate([node.tokens for node in reversed(list(hold.node.upwards()))])
            assert tree.peek(path[: hold.tokens]) == hold.tokens
    for lease, text in leases:
        tree.release(lease, text)
    for hold in holds:
        tree.unhold(hold)
    tree.end_step(tree.begin_step())
    tree.flush()
    tree.check()
    assert tree.allocator.free == 48
