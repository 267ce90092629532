"""Admission by the simulated need of pages: what ends before the pool is full does not wait, and delays nobody."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.runtime.scheduler import planner
from branchwise.runtime.scheduler.forecast import NEVER, Forecast


def simulated(running, candidate, page_size):
    """The most pages beyond those in use now until the candidate ends, by a plain count of every step."""
    length, expected, have = candidate
    most = -(10**9)
    for t in range(expected - length + 1):
        need = max(0, -(-min(length + t, expected) // page_size) - have)
        for now, end, pages, exclusive in running:
            ended = t > end - now
            need += -exclusive if ended else max(0, -(-min(now + t, end) // page_size) - pages)
        most = max(most, need)
    return most


def forecast(running, page_size):
    columns = np.array(running, np.int64).reshape(-1, 4).T
    return Forecast(*columns, page_size)


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_is_that_of_a_plain_simulation_and_never_below_it(seed):
    rng = np.random.default_rng(seed)
    page_size = int(rng.choice([1, 4, 16]))
    for count in (0, 1, 5, 16, 60):
        running = []
        for _ in range(count):
            now = int(rng.integers(1, 200))
            pages = -(-now // page_size)
            running.append((now, now + int(rng.integers(1, 300)), pages, int(rng.integers(0, pages + 1))))
        length = int(rng.integers(1, 100))
        candidate = (length, length + int(rng.integers(0, 400)), int(rng.integers(0, length // page_size + 1)))
        peak, exact = forecast(running, page_size).peak(*candidate), simulated(running, candidate, page_size)
        assert peak >= exact  # the need between two ends is highest just before the second
        # It counts the candidate until the end of its group; with few ends the only excess is its own last growth.
        assert peak <= sum(-(-end // page_size) - pages for _, end, pages, _ in running) + -(-candidate[1] // page_size)


def test_a_request_that_ends_before_the_pool_is_full_needs_only_its_own_pages():
    long = [(100, 5000, 7, 7)] * 10  # will need some 3,000 pages more, but not for thousands of steps
    assert forecast(long, 16).peak(14, 22, 0) < 20
    assert forecast(long, 16).peak(14, 4000, 0) > 2000


def test_the_pages_of_requests_that_end_first_count_as_available():
    short, long = (64, 70, 4, 4), (64, 640, 4, 4)
    assert forecast([short, long], 16).peak(16, 1600, 1) < forecast([(64, 70, 4, 0), long], 16).peak(16, 1600, 1)


def test_an_added_request_counts_until_it_ends():
    both = forecast([(10, 50, 1, 1), (10, 90, 1, 1)], 16)
    alone = both.peak(1, 200, 0)
    both.add(16, 300, 1, 1)
    assert both.peak(1, 200, 0) > alone
    assert both.peak(1, 400, 0) == forecast([(10, 50, 1, 1), (10, 90, 1, 1), (16, 300, 1, 1)], 16).peak(1, 400, 0)


def test_when_a_request_that_does_not_fit_can_start():
    running = forecast([(10, 50, 1, 1), (10, 90, 6, 6)], 16)
    assert running.start_of(1, available=10) == 40
    assert running.start_of(8, available=2) == 80
    assert running.start_of(1000, available=0) == 80  # never: pins or branches have the pages
    assert forecast([], 16).start_of(5, available=5) == 0
    assert NEVER > 1 << 30


def test_a_small_request_does_not_wait_for_pages_that_others_need_later(make_driver):
    """Long outputs reserved the whole pool, most of which was free."""
    driver = make_driver(num_pages=420, page_size=4, max_len=1500)
    driver.core.scheduler.planner.estimator.fraction = 1.0
    driver.core.scheduler.planner.estimator.finished = lambda outputs, max_tokens: None
    for i in range(3):
        driver.add([3 + i] * 8, max_tokens=500)
    for _ in range(5):
        driver.step()
    large = driver.add([8] * 8, max_tokens=900)
    small = driver.add([9] * 14, max_tokens=8)
    for _ in range(12):
        driver.step()
    assert small in driver.finished
    assert driver.core.scheduler.ledger.waiting.keys() == {large}
    assert not driver.core.stats().retractions
    driver.drain()
    assert not driver.core.stats().retractions
    driver.verify()


def test_requests_that_go_first_do_not_delay_one_that_does_not_fit(make_driver):
    """Once it was overtaken often enough it starts when the pages are there, whatever else arrives."""

    def start_of_large(stream):
        driver = make_driver(num_pages=64, page_size=4, max_num_seqs=4, max_len=256)
        driver.core.scheduler.planner.estimator.fraction = 1.0
        driver.core.scheduler.planner.estimator.finished = lambda outputs, max_tokens: None
        driver.add([3] * 4, max_tokens=100)
        driver.add([4] * 4, max_tokens=60)
        driver.step()
        large = driver.add([5] * 200, max_tokens=20)
        driver.core.scheduler.ledger.waiting[large].skips = 64
        short = []
        for step in range(300):
            if stream:
                short.append(driver.add([6 + step % 30, 7], max_tokens=1 + step % 40))
            driver.step()
            if large not in driver.core.scheduler.ledger.waiting:
                return step, sum(id_ in driver.finished for id_ in short)
        raise AssertionError("it never started")

    alone, _ = start_of_large(False)
    beside, others = start_of_large(True)
    assert beside <= alone
    assert others > 10


@pytest.mark.parametrize("seed", range(30))
def test_a_short_prompt_that_goes_first_is_not_delayed(make_driver, monkeypatch, seed):
    """Prompts that run already fill the steps' room for short ones, and a stream of others takes what pages it can."""
    monkeypatch.setattr(planner, "_FILL", 16)
    monkeypatch.setattr(planner, "_SHORT", 8)

    def start_of_first(stream):
        rng = np.random.default_rng(seed)
        driver = make_driver(num_pages=96, page_size=4, max_num_seqs=24, max_len=384, max_num_batched_tokens=32)
        driver.core.scheduler.planner.estimator.fraction = 1.0
        driver.core.scheduler.planner.estimator.finished = lambda outputs, max_tokens: None
        for i in range(8):
            driver.add([3 + i] * int(rng.integers(1, 4)), max_tokens=int(rng.integers(8, 60)))
        driver.step()
        first = driver.add([11] * int(rng.integers(1, 9)), max_tokens=300)
        driver.core.scheduler.ledger.waiting[first].skips = 64
        for step in range(300):
            for _ in range(int(rng.integers(1, 4)) if stream else 0):
                length, end = int(rng.choice([4, 9, 20, 24, 32])), int(rng.integers(1, 80))
                driver.add(rng.integers(12, 50, length).tolist(), max_tokens=end)
            driver.step()
            if first not in driver.core.scheduler.ledger.waiting:
                return step
        raise AssertionError("it never started")

    assert start_of_first(True) <= start_of_first(False)


def test_a_short_prompt_without_room_in_a_step_is_not_overtaken_for_ever(make_driver, monkeypatch):
    """Of each longer prompt, what its first step leaves is short, and fills the room of the next step."""
    monkeypatch.setattr(planner, "_FILL", 16)
    monkeypatch.setattr(planner, "_SHORT", 8)
    driver = make_driver(num_pages=4096, page_size=4, max_num_seqs=24, max_len=2048, max_num_batched_tokens=32)
    for i in range(8):
        driver.add([3 + i], max_tokens=1500)
    driver.add([11] * 32, max_tokens=1)
    driver.step()
    short, later = driver.add([12] * 4, max_tokens=1), []
    while short in driver.core.scheduler.ledger.waiting:
        later.append(driver.add([13] * 24, max_tokens=1, salt=str(len(later))))
        driver.step()
        assert len(later) <= 70
    assert len(later) > 60, "it was overtaken until then"
