"""The router's index and its choice."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchwise.runtime.fleet.choice import Loads, choose, costs
from branchwise.runtime.fleet.index import PrefixIndex
from branchwise.runtime.fleet.kv_events import AllBlocksCleared, BlockRemoved, StoredHashes
from branchwise.runtime.fleet.router import FleetRouter
from branchwise.runtime.fleet.view import FleetView, RoutingHint


def loads(n: int, queued=0.0, running=0.0, recent=0.0) -> Loads:
    return Loads(*(np.broadcast_to(np.asarray(each, np.float64), n) for each in (queued, running, recent)))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=60), st.integers(0, 33))
def test_the_index_finds_how_far_each_replica_goes(depths: list[tuple[int, int]], length: int) -> None:
    """Against the definition: the longest prefix of which all blocks are there."""
    index, held = PrefixIndex(), dict.fromkeys(range(41), 0)
    chain = list(range(1000, 1040))
    for replica, depth in depths:
        if depth > held[replica]:
            index.store(replica, chain[held[replica] : depth])
        else:
            index.remove(replica, chain[depth : held[replica]][::-1])
        held[replica] = depth
    found = index.overlap(chain[:length], 41)
    assert found.tolist() == [min(held[replica], length) for replica in range(41)]
    assert [index.blocks(replica) for replica in held] == list(held.values())
    assert len(index) == max(held.values())


def test_events_of_one_replica_do_not_touch_another() -> None:
    index = PrefixIndex()
    for replica in (0, 1):
        index.apply(replica, [StoredHashes([1, 2, 3]), StoredHashes([4])])
    index.apply(1, [BlockRemoved([4]), BlockRemoved([99])])
    assert index.overlap([1, 2, 3, 4], 3).tolist() == [4, 3, 0]
    index.apply(0, [AllBlocksCleared()])
    assert index.overlap([1, 2, 3, 4], 3).tolist() == [0, 3, 0]
    index.clear(1)
    assert not len(index) and index.overlap([1], 2).tolist() == [0, 0]
    assert index.overlap([], 2).tolist() == [0, 0]


def test_blocks_of_slower_tiers_count_less() -> None:
    """A block that left one medium is still in the others; unknown media count as the slowest."""
    index, chain = PrefixIndex(), [1, 2, 3, 4, 5, 6, 7, 8]
    index.store(0, chain[:4], "GPU")
    index.store(0, chain[2:6], "CPU_PINNED")
    index.store(0, chain, "DISK")
    index.store(1, chain[:3], "CPU")
    index.store(2, chain, "TAPE")
    assert index.overlap(chain, 3).tolist() == [4, 0, 0]
    assert index.credit(chain, 3).tolist() == [4 + 0.75 * 2 + 0.25 * 2, 0.75 * 3, 0.25 * 8]
    index.remove(0, [4, 3], "GPU")
    assert index.credit(chain, 3).tolist()[0] == 2 + 0.75 * 4 + 0.25 * 2
    index.remove(0, [6, 5, 4, 3], "CPU_PINNED")
    assert index.credit(chain, 3).tolist()[0] == 2 + 0.25 * 6
    index.clear(0)
    assert index.credit(chain, 3).tolist() == [0, 0.75 * 3, 0.25 * 8] and len(index) == 11


counts = st.lists(st.integers(0, 100_000), min_size=1, max_size=30)


@given(counts, st.integers(1, 50_000), st.data())
def test_more_cached_and_less_load_are_never_worse(cached: list[int], prompt: int, data: st.DataObject) -> None:
    n = len(cached)
    busy = loads(n, *(data.draw(st.lists(st.integers(0, 99_999), min_size=n, max_size=n)) for _ in range(3)))
    array = np.array(cached)
    best, cost = choose(prompt, array, busy, 1000.0), costs(prompt, array, busy, 1000.0)
    assert cost[best] <= cost.min() + prompt / 8, "nearly the least"
    assert (busy.recent[cost == cost.min()] >= busy.recent[best]).all(), "and of those the one that did least"
    better = array.copy()
    better[best] += data.draw(st.integers(0, 1000))
    assert choose(prompt, better, busy, 1000.0) == best, "it has even more of the prompt"
    lighter = Loads(*(each.copy() for each in busy[:2]), busy.recent)
    lighter.queued[best] = 0
    assert choose(prompt, array, lighter, 1000.0) == best, "it has even less to do"


def test_what_is_cached_wins_until_the_queue_is_longer() -> None:
    cached = np.array([8000, 0])
    assert choose(9000, cached, loads(2, queued=[28_000, 0]), 1000.0) == 0
    assert choose(9000, cached, loads(2, queued=[36_000, 0]), 1000.0) == 1
    assert choose(9000, cached, loads(2, queued=[0, 0]), 1000.0, np.array([False, True])) == 1, "it may not be chosen"
    with pytest.raises(ValueError, match="no replica"):
        choose(9000, cached, loads(2), 1000.0, np.array([False, False]))


def test_a_prompt_that_is_cached_nowhere_goes_where_least_was_done() -> None:
    assert choose(500, np.zeros(3, np.int64), loads(3, recent=[10.0, 5.0, 9.0]), 1000.0) == 1


def test_the_first_block_of_all_prompts_decides_nothing() -> None:
    """Of prompts that begin alike, each goes where least was done, though others have that beginning."""
    cached = np.array([32, 32, 0, 0], np.int64)
    order = np.array([0.1, 0.2, 0.4, 0.3])
    assert choose(512, cached, loads(4, recent=[600.0, 600.0, 0.0, 0.0]), 1000.0, order=order) == 3
    assert choose(512, 8 * cached, loads(4, recent=[600.0, 600.0, 0.0, 0.0]), 1000.0, order=order) == 0


def test_routers_that_know_nothing_of_each_other_take_different_replicas() -> None:
    """Ten prompts that begin alike by each of eight routers: one order for all would use ten replicas eight times."""
    routers = [FleetRouter(16, 200, seed=seed) for seed in range(8)]
    for router in routers[1:]:
        router.index = routers[0].index
    chosen = []
    for number in range(80):
        router = routers[number % 8]
        replica, cached = router.choose(0.0, 1600, [7, *range(1000 * number, 1000 * number + 99)])
        router.sent(replica, 1600, cached)
        router.index.store(replica, [7])
        chosen.append(replica)
    assert len(set(chosen)) > 50
    assert max(chosen.count(replica) for replica in chosen) <= 4


def test_a_prompt_in_flight_counts_as_cached_until_it_ends() -> None:
    """An agent's next request may come before the last one's prompt is computed: it waits for that prompt where it is
    rather than computing it again elsewhere, unless the wait is longer."""
    router = FleetRouter(16, 4, seed=0)
    chain = list(range(1, 101))
    home, cached = router.choose(0.0, 1600, chain)
    first = router.sent(home, 1600, cached, chain)
    again, cached = router.choose(0.0, 1600, chain)
    assert (again, cached) == (home, 1600)
    second = router.sent(home, 1600, cached, chain[:50])
    router.index.store(home, chain[:20])
    router.started(first)
    router.ended(first)
    router.ended(first)
    assert router.cached(1600, chain).max() == 20 * 16, "the second one has announced no block of its own"
    router.ended(second)
    third = router.sent(home, 1600, 0, chain[:50])
    fourth = router.sent(home, 1600, 0, chain[:30])
    router.ended(third)
    assert router.cached(1600, chain)[home] == 30 * 16, "of two that share blocks one has ended"
    router.ended(fourth)
    assert router.cached(1600, chain)[home] == 20 * 16 and not router._in_flight.holders
    router.sent(home, 1_000_000, 0, [999])
    assert router.choose(0.0, 1600, chain)[0] != home, "it would wait longer than it takes to compute"


def test_a_removed_replicas_requests_do_not_count_for_the_next_one_with_its_number() -> None:
    """A replica that drains is no longer a member, and its requests start and end later."""
    router = FleetRouter(16, 2, seed=0)
    chain = list(range(1, 101))
    waiting, running, failed, kept = (router.sent(number, 1600, 0, chain) for number in (0, 0, 0, 1))
    router.started(running)
    router.reset(0)
    assert router.cached(1600, chain).tolist() == [0, 1600], "the new one has no prompt in flight"
    new = router.sent(0, 800, 0, chain[:50])
    router.started(waiting)
    for sent in (waiting, running, failed):
        router.ended(sent)
    assert router._loads[:2].tolist() == [[800, 1600], [0, 0]]
    router.started(new)
    for sent in (new, kept):
        router.ended(sent)
    router.forget(0)
    router.withdrawn(new)
    assert not router._loads[:2].any() and not router._in_flight.holders and not any(router._unfinished)


def test_a_request_that_a_replica_did_not_take_is_no_recent_work() -> None:
    router = FleetRouter(16, 1)
    taken = router.sent(0, 1600, 0, [1])
    router.withdrawn(router.sent(0, 320, 0, [1, 2]))
    assert router._loads[:, 0].tolist() == [1600, 0, 0, 0, 1600] and router._in_flight.holders.keys() == {1}
    router.started(taken)
    router.ended(taken)
    assert router._loads[:, 0].tolist() == [0, 0, 0, 0, 1600]


def test_a_session_is_served_where_it_prefers_while_that_takes_requests() -> None:
    """Without a preference, or without that replica, all routers choose the same one for it."""

    async def snapshot(url: str) -> bytes:
        raise AssertionError("a replica that reports nothing is not followed")

    views = [FleetView[str](snapshot, str.encode) for _ in range(2)]
    for view in views:
        view.update(dict.fromkeys("abcd"))

    def homes(preferred: bytes | None) -> set[str]:
        """Of one session at every router."""
        hint = RoutingHint(prompt_tokens=64, session="s", preferred=preferred)
        choices = [view.choose(0.0, hint, "abcd") for view in views]
        return {choice.replica for choice in choices if choice is not None}

    [first] = homes(None)
    other = next(each for each in "abcd" if each != first)
    assert homes(other.encode()) == {other} and homes(b"gone") == {first}
    for view in views:
        view.router.allowed[view._numbers[other]] = False  # full
    assert homes(other.encode()) == {first}
    for view in views:
        view.router.allowed[:] = False
    assert homes(other.encode()) == {other}


def test_a_full_replica_is_chosen_only_where_all_are_full() -> None:
    async def snapshot(url: str) -> bytes:
        raise AssertionError("a replica that reports nothing is not followed")

    view = FleetView[str](snapshot, str.encode)
    view.update(dict.fromkeys("abc"))

    def home(among: str) -> str:
        choice = view.choose(0.0, RoutingHint(prompt_tokens=64), among)
        assert choice is not None
        view.ended(choice)
        return choice.replica

    for key in "ab":
        view.router.allowed[view._numbers[key]] = False
    assert home("abc") == "c"
    assert home("ab") in "ab", "an error would leave the request without an end"
    assert view.choose(0.0, RoutingHint(prompt_tokens=64), "unknown") is None


def test_a_choice_among_a_thousand_replicas_takes_less_than_a_millisecond() -> None:
    """The bar of one choice: the best of many, in CPU time. A prompt of 32k tokens that 300 replicas have in part."""
    n, blocks = 1000, 2048
    index, rng = PrefixIndex(), np.random.default_rng(0)
    chain = rng.integers(1, 1 << 63, blocks).tolist()
    for replica in range(0, n, 3):
        index.store(replica, chain[: 1 + 40 * (replica % 50)])
    busy = loads(n, rng.integers(0, 9000, n), rng.integers(0, 99, n), rng.integers(0, 99_999, n))
    seconds = []
    for _ in range(101):
        began = time.thread_time()
        choose(16 * blocks, 16 * index.overlap(chain, n), busy, 12_000.0)
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 1e-3
