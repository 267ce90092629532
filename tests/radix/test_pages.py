"""The page allocator: owners and quarantine."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.radix import InvariantError, OutOfPages, PageAllocator, RadixTree


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def test_order_is_deterministic_and_out_of_pages_changes_nothing():
    a = PageAllocator(4)
    assert a.allocate(3).tolist() == [0, 1, 2]
    with pytest.raises(OutOfPages):
        a.allocate(2)
    assert (a.free, a.total) == (1, 4)
    a.give_back(pages(2, 0))
    assert a.allocate(3).tolist() == [2, 0, 3]
    assert a.allocate(0).tolist() == []


def test_quarantine_waits_for_every_step_begun_so_far():
    a = PageAllocator(6)
    a.allocate(6)
    a.quarantine(pages(0))
    assert (a.free, a.quarantined) == (1, 0), "nothing is in flight"
    assert a.begin_step() == 1
    a.quarantine(pages(1))
    assert a.begin_step() == 2
    a.quarantine(pages(2, 3))
    assert (a.free, a.quarantined) == (1, 3)
    a.end_step(1)
    assert (a.free, a.quarantined) == (2, 2)
    a.quarantine(pages(4))
    a.end_step(2)
    assert (a.free, a.quarantined) == (5, 0)
    a.quarantine(pages(5))
    assert a.free == 6
    assert sorted(a.allocate(6).tolist()) == [0, 1, 2, 3, 4, 5]


def test_one_late_end_ends_all_before():
    a = PageAllocator(2)
    a.allocate(2)
    for page in (0, 1):
        a.begin_step()
        a.quarantine(pages(page))
    a.end_step(2)
    a.end_step(1)
    assert a.free == 2


@pytest.mark.parametrize("way", ["give_back", "quarantine"])
def test_a_page_is_freed_once(way):
    a = PageAllocator(4)
    a.allocate(3)
    a.begin_step()
    a.quarantine(pages(0))
    a.give_back(pages(1))
    for held in ((0,), (1,), (3,), (2, 1)):
        with pytest.raises(InvariantError):
            getattr(a, way)(pages(*held))
        assert (a.free, a.quarantined) == (2, 1)


def test_arguments_are_checked():
    with pytest.raises(ValueError):
        PageAllocator(0)
    with pytest.raises(ValueError):
        RadixTree(4, page_size=0)
    a = PageAllocator(4)
    with pytest.raises(ValueError):
        a.allocate(-1)
    with pytest.raises(ValueError):
        a.end_step(1)


def test_quarantined_array_is_not_the_callers():
    a = PageAllocator(4)
    a.begin_step()
    mine = a.allocate(2)
    a.quarantine(mine)
    mine[:] = 3
    a.end_step(1)
    assert sorted(a.allocate(4).tolist()) == [0, 1, 2, 3]
