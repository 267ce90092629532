"""The queue of waiting requests: its columns and its order against a plain sort of the request objects."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.fairness import Fairness
from branchwise.runtime.scheduler.policy import admission_keys, in_order
from branchwise.runtime.scheduler.request import Request
from branchwise.runtime.scheduler.waiting import WaitingQueue

POLICIES = ("hrrn", "fcfs", "lpm", "priority")
PROMPTS = [np.full(length, 2, np.int32) for length in range(1, 41)]


def request(id, rng, clock=0):
    made = Request(
        id,
        rng.choice(PROMPTS),
        SamplingParams(max_tokens=8, seed=0),
        namespace=(rng.choice("abc"), ""),
        priority=rng.choice((0, 0, 0, 3, -2)),
    )
    made.arrival_clock, made.hit_estimate = clock, rng.randrange(made.num_tokens)
    made.retractions = rng.choice((0, 0, 0, 0, 1, 2))
    return made


def plainly_sorted(policy, requests, clock, patience):
    def key(each):
        waited, work = clock - each.arrival_clock, max(1, each.num_tokens - each.hit_estimate)
        by = (-each.priority if policy == "priority" else 0, each.retractions == 0)
        by += {"lpm": (-each.hit_estimate,), "hrrn": (-(waited + work) / work, work)}.get(policy, ())
        return (False, each.arrival_clock, *by) if waited > patience else (True, 0, *by)

    return sorted(requests, key=key)


def interleaved(requests, running):
    """By the rows that the owner of each has once all of its requests that precede have one."""
    rows, ranks = Counter(running), {}
    for each in requests:
        ranks[each.id] = rows[each.namespace[0]]
        rows[each.namespace[0]] += 1
    return sorted(requests, key=lambda each: ranks[each.id])


def filled(n, seed):
    """A queue of ``n``, of which some were removed and looked up again, and the same requests as a list."""
    rng, queue, clock = random.Random(seed), WaitingQueue(), 0
    for id in range(2 * n):
        clock += rng.choice((0, 0, 1, 5, 40))
        queue[id] = request(id, rng, clock)
        if id % 2:
            del queue[rng.choice(list(islice(queue, 50)))]
        if rng.random() < 0.3 and queue:
            one = queue[next(iter(queue))]
            one.hit_estimate = rng.randrange(one.num_tokens)
            queue.changed(one)
    queue.check()
    return queue, list(queue.values()), clock


@pytest.mark.parametrize("policy", POLICIES)
@given(
    n=st.sampled_from((1, 2, 60, 129, 300, 1200)),
    seed=st.integers(0, 2**32),
    patience=st.sampled_from((0, 50, 1 << 62)),
)
@settings(max_examples=25, deadline=None)
def test_the_order_is_that_of_a_plain_sort(policy, n, seed, patience):
    queue, requests, clock = filled(n, seed)
    columns = queue.columns()
    keys = admission_keys(policy, columns, clock, patience)
    expected = [each.id for each in plainly_sorted(policy, requests, clock, patience)]
    assert [columns.request(position).id for position in in_order(keys)] == expected
    assert [columns.request(position).id for position in islice(in_order(keys), 5)] == expected[:5]


@pytest.mark.parametrize("policy", POLICIES)
@given(
    n=st.sampled_from((1, 2, 60, 300)),
    seed=st.integers(0, 2**32),
    running=st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.integers(0, 200)}),
)
@settings(max_examples=25, deadline=None)
def test_several_owners_take_turns_as_by_a_plain_count(policy, n, seed, running):
    queue, requests, clock = filled(n, seed)
    columns = queue.columns()
    ledger = SimpleNamespace(owners=Counter("abc"), running=Counter(running), rows=None)
    order = Fairness(ledger).in_order(columns, admission_keys(policy, columns, clock, 50))
    expected = interleaved(plainly_sorted(policy, requests, clock, 50), running)
    assert [columns.request(position).id for position in order] == [each.id for each in expected]
    work = Counter()
    for each in requests:
        work[each.namespace[0]] += each.num_tokens - each.hit_estimate
    assert queue.work() == +work


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_a_restored_request_is_in_its_place_and_columns_taken_before_are_not_changed(seed):
    queue, requests, _ = filled(100, seed)
    columns = queue.columns()
    before = [each.id for each in requests]
    back = requests[len(requests) // 2]
    del queue[back.id]
    back.retractions += 1
    queue.restore(back)
    queue.check()
    assert list(queue) == sorted(before)
    for id in before:
        del queue[id]
    assert not queue and not len(queue.columns())
    assert [columns.request(position).id for position in range(len(columns))] == before


def test_an_empty_queue_keeps_no_request_that_left():
    """A prompt of an agent's session is megabytes: a fleet of 1,000 simulated replicas held 16 GB of them."""
    queue = WaitingQueue()
    for id in range(3):
        queue[id] = request(id, random.Random(id))
    for id in range(3):
        del queue[id]
    assert queue.columns().requests == []


def test_a_request_is_queued_once():
    queue = WaitingQueue()
    queue[1] = request(1, random.Random(0))
    with pytest.raises(ValueError, match="waiting already"):
        queue[1] = request(1, random.Random(0))
    assert queue.some(5, 3) == [queue[1]]


def test_a_column_that_differs_from_its_request_is_found():
    queue = WaitingQueue()
    queue[1] = one = request(1, random.Random(0))
    one.hit_estimate += 1
    with pytest.raises(RuntimeError, match="columns"):
        queue.check()
