"""Scores beside tokens: they stay through splits, copies and replaced pages, and leave with their pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from branchwise.radix import SCORE, Lease


def of(*values: int) -> np.ndarray:
    return np.array([(-value, value, value, -1) for value in values], SCORE)


def remember(driver: Any, tokens: Sequence[int], start: int = 1) -> None:
    """Runs a request that scores its prompt from ``start`` on: the score of a token is the token itself."""
    lease = driver.match(tokens, limit=start - 1)
    driver.compute(lease, tokens)
    driver.next_step()
    driver.tree.record_scores(lease, start, of(*tokens[start:]))
    driver.release(lease, tokens)
    driver.next_step()


def known(driver: Any, tokens: Sequence[int], start: int = 1) -> list[int]:
    return driver.tree.scores(np.array(tokens, np.int32), start=start)["best_id"].tolist()


def test_nothing_is_allocated_before_the_first_score(drive: Callable[..., Any]) -> None:
    driver = drive()
    driver.remember([1, 2, 3, 4, 5, 6])
    assert known(driver, [1, 2, 3]) == [] and not driver.tree._scores.allocated
    remember(driver, [1, 2, 3])
    assert driver.tree._scores.allocated and SCORE.itemsize == 16


def test_scores_are_exact_at_any_token(drive: Callable[..., Any]) -> None:
    driver = drive()
    tokens = list(range(1, 12))
    remember(driver, tokens)
    for end in range(12):
        for start in range(1, 12):
            assert known(driver, tokens[:end], start) == tokens[start:end]
    assert known(driver, [*tokens[:6], 90, *tokens[7:]]) == tokens[1:6]
    assert driver.tree.scores(np.array(tokens, np.int32), ("other", "")).tolist() == []


def test_scores_stay_through_a_split_and_a_copied_page(drive: Callable[..., Any]) -> None:
    driver = drive()
    tokens = list(range(1, 13))
    remember(driver, tokens)
    fork = [*tokens[:6], 70, 71, 72]
    driver.remember(fork)  # splits the node at 4 and copies two tokens of its second page
    assert known(driver, fork) == tokens[1:6]
    assert known(driver, tokens) == tokens[1:]
    lease = driver.match(fork)
    driver.tree.record_scores(lease, 6, of(70, 71))  # token 72's page is not reserved
    driver.release(lease)
    assert known(driver, fork) == [*tokens[1:6], 70, 71]


def test_a_cached_prompt_is_scored_later(drive: Callable[..., Any]) -> None:
    """The scoring request's own pages give way to those that are cached, which take over the scores."""
    driver = drive()
    tokens = list(range(1, 11))
    driver.remember([*tokens, 50, 51, 52])
    remember(driver, tokens)
    assert known(driver, tokens) == tokens[1:]


def test_a_longer_page_takes_over_the_scores_of_the_one_that_it_covers(drive: Callable[..., Any]) -> None:
    driver = drive()
    remember(driver, [1, 2])
    lease = driver.match([1, 2, 3, 4, 5], limit=0)
    driver.compute(lease, [1, 2, 3, 4, 5])
    assert known(driver, [1, 2, 3, 4, 5]) == [2]


def test_scores_leave_with_their_page(drive: Callable[..., Any]) -> None:
    driver = drive(num_pages=4)
    remember(driver, [1, 2, 3, 4, 5, 6])
    driver.remember([91, 92, 93, 94, 95, 96, 97, 98, 99])  # takes the page of 5 and 6
    assert known(driver, [1, 2, 3, 4, 5, 6]) == [2, 3, 4]
    assert known(driver, [91, 92, 93, 94, 95, 96]) == []
    driver.tree.flush()
    driver.remember([1, 2, 3, 4, 5, 6])
    assert known(driver, [1, 2, 3, 4, 5, 6]) == []


def test_a_score_may_arrive_before_its_tokens_page(drive: Callable[..., Any]) -> None:
    driver = drive()
    tokens = list(range(1, 10))
    lease: Lease = driver.match(tokens)
    driver.compute(lease, tokens[:4])
    driver.next_step()
    driver.tree.record_scores(lease, 1, of(2, 3, 4, 5))
    assert known(driver, tokens) == [2, 3, 4]
    driver.compute(lease, tokens[:8])
    assert known(driver, tokens) == [2, 3, 4, 5]
    driver.release(lease, tokens[:4])
    assert known(driver, tokens[:5]) == [2, 3, 4, 5]


def test_a_score_ahead_of_an_aborted_request_is_dropped(drive: Callable[..., Any]) -> None:
    driver = drive()
    lease: Lease = driver.match([1, 2, 3, 4])
    driver.compute(lease, [1, 2, 3])
    driver.next_step()
    driver.tree.record_scores(lease, 1, of(2, 3, 4))  # token 4 has a score and no KV yet
    driver.release(lease, [1, 2, 3])
    driver.remember([1, 2, 3, 9])
    assert known(driver, [1, 2, 3, 9]) == [2, 3]
