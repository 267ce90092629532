"""Restarts are few and further apart each time, until an hour has passed."""

from __future__ import annotations

from branchwise.runtime.server.restarts import LONGEST_DELAY, WINDOW_SECONDS, Restarts


def test_delays_double_and_the_number_is_bounded() -> None:
    now = 0.0
    restarts = Restarts(9, lambda: now)
    assert [restarts.next_delay() for _ in range(9)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        LONGEST_DELAY,
        LONGEST_DELAY,
        LONGEST_DELAY,
    ]
    assert restarts.next_delay() is None
    now += WINDOW_SECONDS
    assert restarts.next_delay() == 1.0


def test_none_are_made_by_default() -> None:
    assert Restarts(0).next_delay() is None
