"""The branch registry alone: expiry, holds, and access by owner."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.radix import RadixTree
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.scheduler.branches.ids import BranchIds
from branchwise.runtime.scheduler.branches.registry import MAX_FORK, Branches, BranchState
from branchwise.runtime.shared_tokens import EMPTY, SharedTokens

OWNER = ("key", "")


def array(tokens):
    return np.array(tokens, np.int32)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tree():
    return RadixTree(64, 4)


@pytest.fixture
def branches(tree, clock):
    return Branches(tree, max_branches=100, ttl=10.0, now=clock)


def remember(tree, tokens, namespace=OWNER):
    step = tree.begin_step()
    lease = tree.match(array(tokens), namespace, len(tokens) - 1)
    assert tree.reserve(lease, max(0, -(-len(tokens) // tree.page_size) - len(lease.pages))) is not None
    tree.publish(lease, array(tokens))
    tree.release(lease, array(tokens))
    tree.end_step(step)


def status(call, *args):
    with pytest.raises(InvalidRequest) as caught:
        call(*args)
    return caught.value.status


def test_an_expired_or_deleted_id_is_gone_and_a_foreign_one_was_never_there(branches, clock):
    branch, other = branches.create(OWNER), branches.create(("other", ""))
    deleted = branches.create(OWNER)
    branches.remove(deleted)
    assert status(branches.get, deleted.id, "key") == 410
    assert status(branches.get, deleted.id, "other") == 404
    assert status(branches.get, other.id, "key") == 404
    assert status(branches.get, "", "key") == 404
    assert status(branches.get, "bAAAA", "key") == 404
    assert status(branches.get, branch.id + "A", "key") == 404
    clock.now += 10.0
    assert status(branches.get, branch.id, "key") == 410
    assert status(branches.get, branch.id, "other") == 404
    branches.check()


def test_ids_cannot_be_made_elsewhere():
    ids, others = BranchIds(), BranchIds()
    made = ids.make("key", 500)
    assert len(set(made)) == 500
    for id in made[:20]:
        assert ids.made(id, "key")
        assert not ids.made(id, "") and not others.made(id, "key")
        for at in range(len(id)):
            swapped = id[:at] + ("A" if id[at] != "A" else "B") + id[at + 1 :]
            assert not ids.made(swapped, "key")
    for id in ("", "b", "b!", "bé", "b" + "A" * 32, made[0][:-4]):
        assert not ids.made(id, "key")


def test_a_use_renews_and_a_sweep_ends_what_was_not_used(branches, clock):
    used, unused, short = branches.create(OWNER), branches.create(OWNER), branches.create(OWNER, ttl=3.0)
    assert branches.sweep() == pytest.approx(3.0)
    clock.now += 4.0
    assert branches.sweep() == pytest.approx(6.0)
    assert short.state is BranchState.GONE and len(branches) == 2
    branches.get(used.id, "key")
    clock.now += 7.0
    assert branches.sweep() == pytest.approx(3.0)
    assert [branch.id for branch in branches] == [used.id] and unused.state is BranchState.GONE
    used.state = BranchState.GENERATING
    clock.now += 20.0
    branches.sweep()
    assert branches.get(used.id, "key") is used  # at work nobody expires
    used.state = BranchState.IDLE
    branches.touch(used)
    clock.now += 10.0
    assert branches.sweep() is None and not len(branches)


def test_ttl_and_n_have_both_bounds(branches):
    branch = branches.create(OWNER, ttl=10.0)
    for ttl in (0.0, -1.0, 10.1, float("nan"), float("inf")):
        assert status(branches.create, OWNER, EMPTY, ttl) == 400
    for n in (0, -1, MAX_FORK + 1):
        assert status(branches.fork, branch, n) == 400


def test_the_limit_counts_everybody_and_forgets_the_expired(branches, clock):
    branch = branches.create(OWNER)
    branches.fork(branch, 99)
    assert status(branches.create, ("other", "")) == 429
    assert status(branches.fork, branch, 1) == 429
    clock.now += 11.0
    branches.create(OWNER)
    assert len(branches) == 1
    branches.check()


def test_deleting_early_leaves_nothing_behind(branches):
    for _ in range(5000):
        branches.remove(branches.create(OWNER))
    assert len(branches._deadlines) < 200


def test_forks_share_tokens_and_hold(tree, branches):
    remember(tree, range(30))
    trunk = branches.create(OWNER, SharedTokens(array(range(30))))
    children = branches.fork(trunk, 20)
    assert all(child.tokens is trunk.tokens and child.hold is trunk.hold for child in children)
    assert len(tree.holds) == 1 and trunk.hold.count == 21 and trunk.hold.tokens == 30
    branches.check()
    for branch in [trunk, *children[:-1]]:
        branches.remove(branch)
        tree.check()
        assert not tree.evictable
    branches.remove(children[-1])
    assert tree.evictable == 8
    tree.check()


def test_the_idle_go_first_the_longest_unused_before_others(tree, branches):
    made = []
    for i in range(4):
        remember(tree, [100 * i + j for j in range(40)])  # 10 pages each: 24 are left
        made.append(branches.create(OWNER, SharedTokens(array([100 * i + j for j in range(40)]))))
    made[1].state = BranchState.GENERATING
    branches.touch(made[1])
    branches.get(made[0].id, "key")
    assert branches.relieve(24, False) and branches.holding == 4
    assert branches.relieve(30, False)
    assert [branch.hold is not None for branch in made] == [True, True, False, True]
    assert not branches.relieve(64, False)
    assert [branch.hold is not None for branch in made] == [False, True, False, False]
    branches.check()
    assert branches.relieve(64, True)
    assert branches.holding == 0 and branches.holds_lost == 4
    assert made[2].tokens.length == 40
    branches.check()
    tree.check()


def test_one_key_cannot_use_up_the_branches_of_another(tree):
    branches = Branches(tree, max_branches=5, max_per_key=3, ttl=10.0, now=lambda: 0.0)
    trunk = branches.create(("a", ""))
    branches.fork(trunk, 2)
    for attempt in (lambda: branches.create(("a", "other salt")), lambda: branches.fork(trunk, 1)):
        with pytest.raises(InvalidRequest, match=r"this key has 3 branches.*--max-branches-per-key") as caught:
            attempt()
        assert (caught.value.status, caught.value.code) == (429, "too_many_branches")
    other = branches.create(("b", ""))
    branches.fork(other, 1)
    with pytest.raises(InvalidRequest, match=r"there are 5 branches.*--max-branches\)"):
        branches.create(("c", ""))
    branches.remove(trunk)
    branches.create(("a", ""))
    branches.check()
