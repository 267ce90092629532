"""Inspection without side effects, and removal of one prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest

from branchwise.radix import RadixTree

PAGES = pytest.mark.parametrize("page_size", [1, 4, 16])


def ids(n, start=2):
    return [(start + 7 * i) % 97 + 2 for i in range(n)]


def array(tokens):
    return np.array(tokens, np.int32)


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@PAGES
def test_an_inspection_says_what_a_match_would(drive, page_size):
    driver = drive(num_pages=128, page_size=page_size)
    texts = [ids(40), ids(23) + [1] * 9, ids(23, 5), [*ids(7), 1, 2, 3]]
    for text in texts:
        driver.remember(text)
    rng = random.Random(3)
    for _ in range(60):
        text = rng.choice(texts)[: rng.randrange(1, 41)] + [96] * rng.randrange(3)
        before = driver.tree.dump(), driver.tree.structure._clock
        seen = driver.tree.inspect(array(text), limit=len(text) - 1)
        assert (driver.tree.dump(), driver.tree.structure._clock) == before
        lease = driver.match(text)
        assert seen.report == lease.report
        assert seen.locked == 0
        assert len(seen.pages) == -(-lease.hit // page_size)
        again = driver.tree.inspect(array(text), limit=len(text) - 1)
        assert again.locked == again.report.hit_tokens == lease.hit
        driver.release(lease)


def test_an_inspection_of_nothing_leaves_nothing(drive):
    driver = drive()
    seen = driver.tree.inspect(array(ids(9)), ("somebody", "salt"))
    assert (seen.report.hit_tokens, seen.report.reason, len(seen.pages), seen.locked) == (0, "cold", 0, 0)
    assert not driver.tree.roots
    assert drive(enabled=False).tree.inspect(array(ids(9))).report.reason == "disabled"


@PAGES
def test_a_held_part_is_locked_to_the_token(drive, page_size):
    driver = drive(num_pages=64, page_size=page_size)
    driver.remember(ids(40))
    hold = driver.tree.hold(array(ids(21)))
    assert driver.tree.inspect(array(ids(40))).locked == -(-21 // page_size) * page_size
    assert driver.tree.inspect(array(ids(21))).locked == 21
    driver.tree.unhold(hold)
    assert driver.tree.inspect(array(ids(40))).locked == 0


@PAGES
def test_a_prompt_goes_with_all_that_follows_it_and_no_neighbour(drive, page_size):
    driver = drive(num_pages=128, page_size=page_size)
    shared, mine, other = ids(20), ids(20) + [90] * 20, ids(20) + [91] * 20
    for text in (mine, mine + ids(9, 50), other):
        driver.remember(text)
    total = driver.tree.cached
    assert driver.tree.prune(array([*mine, 1])) == 0, "a prompt that is not here takes nothing with it"
    gone = driver.tree.prune(array(mine))
    driver.tree.check()
    assert gone == total - driver.tree.cached > 0
    assert driver.peek(mine) == driver.peek(shared) == 20
    assert driver.peek(other) == 40
    assert driver.tree.inspect(array(mine)).report.reason in ("diverged", "evicted")
    driver.tree.prune(array(shared))
    driver.tree.check()
    assert not driver.tree.num_nodes
    assert not driver.tree.roots


def test_what_is_leased_or_held_survives(drive):
    driver = drive(num_pages=64)
    driver.remember(ids(32))
    driver.remember(ids(16) + [1] * 16)
    hold = driver.tree.hold(array(ids(14)))
    lease = driver.match(ids(24), limit=24)
    driver.tree.prune(array(ids(4)))
    driver.tree.check()
    assert driver.peek(ids(32)) == 24
    driver.release(lease)
    driver.tree.prune(array(ids(4)))
    driver.tree.check()
    assert driver.peek(ids(32)) == 16  # the page of the fourteenth token, whole
    driver.tree.unhold(hold)
    driver.tree.prune(array([]))
    driver.tree.check()
    assert driver.tree.allocator.free + driver.tree.allocator.quarantined == 64


@pytest.mark.parametrize("page_size", [1, 4])
def test_pruning_keeps_the_books_and_the_neighbours(page_size, mirror):
    rng = random.Random(11)
    tree = RadixTree(96, page_size)
    mirror = mirror(page_size)
    tree.subscribe(mirror)
    texts = [ids(rng.randrange(1, 30), rng.choice([2, 3])) for _ in range(20)]
    texts += [text[: rng.randrange(1, len(text) + 1)] + [1] * rng.randrange(9) for text in texts]
    holds = []
    for _ in range(1500):
        step = tree.begin_step()
        text = array(rng.choice(texts))
        match rng.randrange(5):
            case 0 | 1:
                lease = tree.match(text, limit=len(text) - 1)
                if tree.reserve(lease, max(0, -(-len(text) // page_size) - len(lease.pages))) is None:
                    tree.release(lease)
                    tree.unhold(holds.pop(0)) if holds else None
                else:
                    tree.publish(lease, text)
                    tree.end_step(step)
                    tree.release(lease, text)
            case 2:
                hold = tree.hold(text[: rng.randrange(len(text)) + 1])
                holds += [hold] if hold is not None else []
            case 3 if holds:
                tree.unhold(holds.pop(rng.randrange(len(holds))))
            case 4:
                prefix = text[: rng.randrange(1, len(text) + 1)]
                kept = {i: tree.peek(array(other)) for i, other in enumerate(texts)}
                tree.prune(prefix)
                for i, other in enumerate(texts):
                    parts = common(other, prefix.tolist())
                    if parts < len(prefix) and parts < kept[i]:
                        # it went another way while it was still here: no page of it is lost that reaches further
                        assert tree.peek(array(other)) >= kept[i] - page_size + 1
        tree.end_step(step)
        tree.check()
        mirror.compare(tree)
    for hold in holds:
        tree.unhold(hold)
    tree.prune(array([]))
    tree.check()
    assert tree.allocator.free == 96


def test_the_hottest_prefixes_are_those_that_matches_used_most(drive):
    driver = drive(num_pages=64, page_size=4)
    warm, hot, cold = ids(12), ids(8, 50), ids(16, 70)
    for text in (warm, hot, cold):
        driver.remember(text)
    for text, times in ((warm, 2), (hot, 5), ([*hot, 9, 9, 9, 9, 9], 3)):
        for _ in range(times):
            driver.remember([*text, 1])
    before = driver.tree.dump(), driver.tree.structure._clock
    found = [tokens.tolist() for _, tokens in driver.tree.hottest(10)]
    assert (driver.tree.dump(), driver.tree.structure._clock) == before
    assert found == [[*hot, 9, 9, 9, 9], warm], "the longer includes the shorter; nothing has used the cold one"
    assert [tokens.tolist() for _, tokens in driver.tree.hottest(1)] == [hot]
    assert driver.tree.hottest(3, ("nobody", "")) == []
    other = ("ann", "salt")
    for last in range(12):
        driver.remember([*warm, last], other)
    first, second = ((name, tokens.tolist()) for name, tokens in driver.tree.hottest(2))
    assert (first, second) == ((other, warm), (("", ""), hot)), "of all namespaces"
    assert [name for name, _ in driver.tree.hottest(9, other)] == [other]
