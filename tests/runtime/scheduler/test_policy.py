"""Admission order, and that no request starves."""

from __future__ import annotations

import random

import numpy as np
import pytest

from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.estimator import OutputEstimator
from branchwise.runtime.scheduler.policy import admission_keys, in_order
from branchwise.runtime.scheduler.request import Request
from branchwise.runtime.scheduler.rows import Rows
from branchwise.runtime.scheduler.waiting import WaitingQueue


def waiting(id_, *, tokens=100, hit=0, arrived=0, priority=0, retractions=0):
    request = Request(id_, np.full(tokens, 2, np.int32), SamplingParams(max_tokens=8, seed=0), priority=priority)
    request.hit_estimate, request.arrival_clock, request.retractions = hit, arrived, retractions
    return request


def order(policy, requests, clock=0):
    queue = WaitingQueue()
    for request in requests:
        queue[request.id] = request
    columns = queue.columns()
    return [columns.request(position).id for position in in_order(admission_keys(policy, columns, clock))]


def test_fcfs_keeps_arrival_order_but_for_retracted_requests():
    assert order("fcfs", [waiting(1), waiting(2, hit=90), waiting(3, retractions=1)]) == [3, 1, 2]


def test_lpm_prefers_the_longest_cached_prefix():
    assert order("lpm", [waiting(1, hit=10), waiting(2, hit=90), waiting(3, hit=50)]) == [2, 3, 1]


def test_priority_comes_before_everything():
    assert order("priority", [waiting(1), waiting(2, priority=5), waiting(3, priority=1, retractions=2)]) == [2, 3, 1]


def test_hrrn_puts_cache_hits_first_and_breaks_ties_by_less_work():
    assert order("hrrn", [waiting(1), waiting(2, hit=90), waiting(3, hit=50)]) == [2, 3, 1]
    assert order("hrrn", [waiting(1), waiting(2, hit=90, arrived=500)], clock=600) == [2, 1]


def test_hrrn_lets_no_cold_request_starve():
    """A cold request against an endless stream of fresh hits: its ratio passes theirs."""
    cold = waiting(1, tokens=1000, arrived=0)
    for clock in (0, 500, 5_000, 50_000):
        hits = [waiting(i + 2, tokens=1000, hit=990, arrived=clock) for i in range(50)]
        first = order("hrrn", [cold, *hits], clock)[0]
        assert (first == 1) == (clock > 0)


def test_cold_requests_are_admitted_under_a_stream_of_hits(make_driver):
    driver = make_driver(num_pages=256, max_num_seqs=2, max_num_batched_tokens=16, max_len=256)
    stem = [5] * 40
    driver.add(stem, max_tokens=0)
    driver.drain()
    cold = driver.add(list(range(2, 42)) * 2, max_tokens=1)
    for i in range(200):
        driver.add([*stem, 2 + i % 40, 3 + i % 7], max_tokens=1)
        driver.add([*stem, 3 + i % 40, 4 + i % 5], max_tokens=1)
        driver.step()
        if cold in driver.finished:
            break
    assert cold in driver.finished
    assert driver.core.stats().waiting > 0
    driver.drain()
    driver.verify()


def test_one_request_that_does_not_fit_blocks_nobody_and_is_not_forgotten(make_driver):
    driver = make_driver(num_pages=32, page_size=4, max_num_seqs=4, max_len=128)
    driver.add([3] * 40, max_tokens=60)
    driver.step()
    big = driver.add([4] * 100, max_tokens=8)
    small = [driver.add([5 + i, 6], max_tokens=2) for i in range(5)]
    for _ in range(12):
        driver.step()
    assert all(id_ in driver.finished for id_ in small)
    assert big not in driver.finished
    for i in range(300):
        if big in driver.finished:
            break
        driver.add([6 + i % 30, 7, i % 40 + 2], max_tokens=3)
        driver.step()
    assert big in driver.finished
    driver.drain()
    driver.verify()


def test_a_higher_priority_request_takes_pages_from_a_lower_one(make_driver):
    driver = make_driver(num_pages=16, page_size=4, schedule_policy="priority", max_len=64)
    driver.core.scheduler.planner.estimator.fraction = 0.1
    low = driver.add([3] * 4, max_tokens=50, priority=0)
    driver.step()
    high = driver.add([4] * 4, max_tokens=50, priority=9)
    driver.drain()
    assert driver.finished[high].retractions == 0
    assert driver.finished[low].retractions > 0
    driver.verify()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", ["hrrn", "fcfs", "lpm", "priority"])
@pytest.mark.parametrize("disabled", [False, True], ids=["cache", "no-cache"])
def test_an_overcommitted_pool_only_costs_time(make_driver, policy, overlap, disabled):
    """Admission that counts on no output at all: constant retraction, in the middle of prompts too."""
    rng = random.Random(f"{policy}/{overlap}")
    driver = make_driver(
        num_pages=24,
        page_size=4,
        schedule_policy=policy,
        max_num_batched_tokens=40,
        max_len=96,
        overlap=overlap,
        disable_radix_cache=disabled,
    )
    driver.core.scheduler.planner.estimator.expected_pages = lambda rows, page_size: 0
    for _ in range(60):
        stem = [rng.randrange(2, 5)] * rng.randrange(1, 60)
        driver.add([*stem, rng.randrange(2, 40)], max_tokens=rng.randrange(1, 30), priority=rng.randrange(4))
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.drain()
    assert driver.core.stats().retractions > 0
    driver.verify()


@pytest.mark.parametrize("observed", [0.0, 0.3, 1.0])
def test_the_estimate_learns_and_a_retraction_raises_it(observed):
    estimator = OutputEstimator()
    for _ in range(200):
        estimator.finished(int(observed * 1000), 1000)
    assert estimator.fraction == pytest.approx(max(0.1, observed), abs=0.01)
    before = estimator.fraction
    estimator.retracted()
    assert before < estimator.fraction <= 1.0 or before == pytest.approx(1.0)


def test_pages_wanted_by_running_requests_match_a_plain_count():
    estimator, rows = OutputEstimator(fraction=0.5), Rows(8)
    rng = np.random.default_rng(0)
    expected = 0
    for id_ in range(6):
        request = waiting(id_, tokens=int(rng.integers(1, 90)))
        request.limit = request.prompt_len + int(rng.integers(0, 9000))
        row = rows.take(request, 0)
        rows.pages[row] = int(rng.integers(0, 6))
        length = estimator.expected_length(request.prompt_len, request.num_tokens, request.limit)
        expected += max(0, -(-length // 16) - int(rows.pages[row]))
    assert estimator.expected_pages(rows, 16) == expected
