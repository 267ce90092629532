"""Page numbers: which are free, and which become free only when the steps in flight have ended.

A page is the keys and values of some consecutive tokens in the KV pool on the device. The allocator handles page
numbers only; the tree and the leases record the uses of a page. Each lower tier numbers its slots with one, too.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from .errors import InvariantError, OutOfPages
from .node import Int32


class PageAllocator:
    """A stack of free page numbers and a queue of quarantined ones.

    **Quarantine.** A page that a step in flight may still read or write must not get a new owner. `begin_step`
    numbers the steps; a quarantined page becomes free when every step begun before has ended. A page that no step in
    flight uses (an evicted one was not leased) is free at once: what writes to it next runs in a later step, and
    steps run in order.

    Deterministic: the same calls return the same page numbers in the same order, so that ranks agree without
    communication.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"need at least one page, got {num_pages}")
        self.total = num_pages
        self.free = num_pages
        self.quarantined = 0
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # [:free] are free, the last is allocated next
        self._in_use = np.zeros(num_pages, np.bool_)
        self._waiting: deque[tuple[int, Int32]] = deque()  # (step that must end first, pages), steps ascending
        self._begun = 0  # the last step begun
        self._ended = 0  # every step up to this one has ended

    def allocate(self, n: int) -> Int32:
        """Takes n free pages. Raises `OutOfPages`, and changes nothing, when there are fewer."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if n > self.free:
            raise OutOfPages(f"{n} pages requested, {self.free} of {self.total} are free")
        self.free -= n
        pages = self._stack[self.free : self.free + n][::-1].copy()
        self._in_use.put(pages, True)
        return pages

    def claim(self, pages: Int32) -> None:
        """Takes these pages, which are free: what they hold is from an earlier process. O(all pages)."""
        if not np.isin(pages, self._stack[: self.free]).all():
            raise InvariantError("pages claimed that are not free")
        left = self._stack[: self.free][~np.isin(self._stack[: self.free], pages)]
        self.free = len(left)
        self._stack[: self.free] = left
        self._in_use.put(pages, True)

    def give_back(self, pages: Int32) -> None:
        """Frees pages that no step in flight uses; the next `allocate` returns them in this order."""
        self._mark_unused(pages)
        self._push(pages)

    def quarantine(self, pages: Int32) -> None:
        """Frees pages when every step begun so far has ended: at once if none is in flight."""
        if not len(pages):
            return
        self._mark_unused(pages)
        if self._begun == self._ended:
            self._push(pages)
            return
        self.quarantined += len(pages)
        self._waiting.append((self._begun, pages.copy()))

    def begin_step(self) -> int:
        """Begins a step; pages quarantined from now on also wait for its end. Returns its number, from 1."""
        self._begun += 1
        return self._begun

    def end_step(self, step: int) -> None:
        """Every step up to and including this one has ended: pages quarantined for them become free."""
        if step > self._begun:
            raise ValueError(f"step {step} has not begun; the last was {self._begun}")
        self._ended = max(self._ended, step)
        while self._waiting and self._waiting[0][0] <= self._ended:
            _, pages = self._waiting.popleft()
            self.quarantined -= len(pages)
            self._push(pages)

    def cancel_step(self, step: int) -> None:
        """The step begun last will not run: pages quarantined for it wait for the step before instead."""
        if step != self._begun:
            raise ValueError(f"step {step} cannot be cancelled; the last begun is {self._begun}")
        self._begun -= 1
        self._waiting = deque((min(until, self._begun), pages) for until, pages in self._waiting)
        self.end_step(self._ended)

    def listing(self) -> tuple[Int32, Int32]:
        """(free pages, quarantined pages) as the allocator records them, for `RadixTree.check`."""
        waiting = [pages for _, pages in self._waiting]
        return self._stack[: self.free].copy(), np.concatenate(waiting) if waiting else np.empty(0, np.int32)

    def _mark_unused(self, pages: Int32) -> None:
        """Refuses a page that is not in use, before any change: a page freed twice would get two owners."""
        in_use = self._in_use.take(pages)
        if np.count_nonzero(in_use) < len(pages):
            raise InvariantError(f"pages freed that are not in use: {pages[~in_use].tolist()}")
        self._in_use.put(pages, False)

    def _push(self, pages: Int32) -> None:
        self._stack[self.free : self.free + len(pages)] = pages[::-1]
        self.free += len(pages)
