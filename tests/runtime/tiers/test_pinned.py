"""Pinning ahead of use, with a driver that records what it is asked to register."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from branchwise.runtime.tiers import pinned
from branchwise.runtime.tiers.pinned import PinningThread, anonymous_memory

ROW = 3 * 4096


class Driver:
    """The calls of ``cudart`` that pinning makes. ``fails_after``: registrations that succeed."""

    def __init__(self, fails_after: int = 1 << 30) -> None:
        self.registered: list[tuple[int, int]] = []  # (address, bytes)
        self.unregistered: list[int] = []
        self._fails_after = fails_after

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.registered) == self._fails_after:
            return 2
        self.registered.append((address, size))
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.unregistered.append(address)
        return 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in (
        ("_PIECE", 8),
        ("_POPULATED", 20),
        ("_LEAST_AHEAD", 10),
        ("_MOST_AHEAD", 40),
        ("_POPULATE_BYTES", 2),
    ):
        monkeypatch.setattr(pinned, name, rows * ROW)


def test_memory_is_pinned_ahead_of_its_use_and_no_further(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    memory = anonymous_memory(150, ROW)
    memory[:20] = np.arange(20, dtype=np.uint8)[:, None]
    thread = PinningThread(memory)
    for used, expected in ((0, 16), (9, 24), (3, 24), (20, 40), (100, 144), (120, 150)):
        thread.use(used)
        until(lambda expected=expected: thread.pinned_bytes == expected * ROW)  # type: ignore[misc]
        time.sleep(0.01)
        assert thread.pinned_bytes == expected * ROW, "pieces of 8 rows; as much ahead as is used, from 10 to 40 rows"
    ends = [address + size for address, size in driver.registered]
    assert [address for address, _ in driver.registered] == [memory.ctypes.data, *ends[:-1]]
    assert ends[-1] == memory.ctypes.data + memory.nbytes
    assert (memory[:20] == np.arange(20, dtype=np.uint8)[:, None]).all()
    thread.close()
    assert driver.unregistered == [address for address, _ in driver.registered]


def test_a_driver_that_pins_no_more_leaves_the_rest_as_it_is(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(fails_after=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    thread = PinningThread(anonymous_memory(150, ROW))
    thread.use(100)
    until(lambda: not thread._thread.is_alive())
    assert thread.pinned_bytes == 16 * ROW
    thread.close()
    assert len(driver.unregistered) == 2
