"""Nodes that requests have divided become one again, where nothing can tell them apart."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.radix import RadixTree
from branchwise.radix.explain import EvictionRecord

A, B, C = list(range(100, 112)), list(range(200, 208)), list(range(300, 308))  # three pages of four, two, two


def turns(d, count: int) -> list[int]:
    """A conversation: each prompt is the one before and a page more. Returns the last."""
    prompt = list(A)
    for turn in range(count):
        prompt += [1000 + turn] * 4
        d.remember(prompt)
    return prompt


def evict(d, pages: int) -> None:
    structure = d.tree.structure
    d.tree.allocator.give_back(structure.evict(structure.device, pages))
    structure.events.deliver()
    d.check()


def test_a_conversation_is_one_node_and_its_last_turn(drive):
    """Without joining, its walk would take one node for each turn."""
    d = drive()
    prompt = turns(d, 10)
    assert d.tree.num_nodes <= 3  # what was used twice, and the last turn
    assert d.peek([*prompt, 5]) == len(prompt)


def test_what_was_never_reused_stays_apart(drive):
    """Pages that were used once may be dropped instead of moving down: see `PrefixTree.keep_one_shot`."""
    d = drive()
    d.remember([*A, 0])
    d.remember([*A, *B])
    assert {len(node.tokens): node.hits for node in d.tree.structure.nodes()} == {12: 1, 8: 0, 1: 0}


@pytest.mark.parametrize("policy", ["lfu", "fifo"])
def test_what_the_policy_tells_apart_stays_apart(drive, policy):
    """Under `lfu` the turns of a conversation have different keys, under `fifo` too."""
    d = drive(policy=policy)
    turns(d, 10)
    assert d.tree.num_nodes >= 10


def test_what_a_request_still_reads_stays_apart(drive):
    """A lease ends at the upper node, and its page to copy is in the lower: both have one lock."""
    d = drive()
    d.remember([*A, *B])
    first = d.match([*A, *B[:2], 0])
    assert first.length == len(A) and first.source is not None
    other = d.match([*A, *B, 0])
    d.release(other)
    assert first.node is not other.node
    d.release(first)


def test_tiers_differ(drive):
    """A node has a copy of all its pages in a tier, or of none."""
    d = drive(num_pages=16, host_slots=16)
    for _ in range(2):
        d.remember([*A, *B, 0])
    evict(d, 3)
    lease = d.match([*A, *B, 0])
    d.release(lease)
    nodes = list(d.tree.structure.nodes())
    assert {len(node.pages) > 0 for node in nodes} == {True, False}


def test_an_evicted_sibling_is_still_explained(drive):
    """Evictions are recorded by the node after which the page was: that node must not disappear."""
    d = drive()
    d.remember([*A, *B])
    d.remember([*A, *C])
    assert d.tree.prune(np.array([*A, *B], np.int32)) == 2
    for _ in range(3):
        d.remember([*A, *C])
    assert d.match([*A, *B, 1]).report.reason == "evicted"
    assert d.tree.structure.evictions.elsewhere(next(iter(d.tree.structure.nodes())).serial, b"")


def test_a_page_that_came_back_divides_nothing(drive):
    """Its own eviction is no reason to keep the place apart: nothing else was ever there."""
    d = drive()
    for _ in range(2):
        d.remember([*A, *B])
    evict(d, 2)
    for _ in range(3):
        d.remember([*A, *B])
    assert d.tree.num_nodes == 1


def test_the_record_counts_the_places():
    """`elsewhere` asks after other pages at one place, and forgets what the record forgets."""
    record = EvictionRecord(2)
    record.note(1, b"aaaa")
    assert not record.elsewhere(1, b"aaaa") and record.elsewhere(1, b"bbbb") and not record.elsewhere(2, b"bbbb")
    record.note(1, b"aaaa")
    assert not record.elsewhere(1, b"aaaa")
    record.note(1, b"bbbb")
    assert record.elsewhere(1, b"aaaa")
    record.note(2, b"cccc")
    record.note(2, b"dddd")
    assert not record.elsewhere(1, b"bbbb") and record.elsewhere(2, b"cccc")


@pytest.mark.parametrize("good", range(6))
@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_counts_to_the_page(good: int, damaged: bool) -> None:
    """A node can be long. What arrived of it is on the device; the host keeps the rest, unless it was wrong there."""
    tree, tokens = RadixTree(16, 4, host_slots=16), np.arange(20, dtype=np.int32)
    for _ in range(2):
        lease = tree.match(tokens)
        tree.reserve(lease, 5 - len(lease.pages))
        tree.begin_step()
        tree.publish(lease, tokens)
        tree.release(lease, tokens)
    tree.allocator.give_back(tree.structure.evict(tree.structure.device, 5))
    transfer = tree.moves.load(tree.reach(tokens), 16)
    assert transfer is not None
    tree.end_transfer(transfer, good, damaged)
    tree.check()
    left = 0 if damaged else 20 - 4 * good
    assert tree.reach(tokens)[:3] == (4 * good, left, 0)
