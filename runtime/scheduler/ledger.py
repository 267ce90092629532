"""Waiting and running requests, and the pages and rows they have: the only place where either changes owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np

from ...radix.lease import Lease
from ...radix.tree import RadixTree
from ..step import Int32
from .request import Request, Status
from .rows import DECODE, Rows
from .waiting import WaitingQueue


class HoldOwner(Protocol):
    """Owns holds that may be given up when memory is short: the branches."""

    def relieve(self, pages: int, everything: bool) -> bool:
        """Gives up holds until ``pages`` can be reserved; returns whether they can. ``everything``: also the holds of
        branches that have a request."""
        ...

    def forget(self) -> None:
        """Gives up every hold."""
        ...


class Ledger:
    """Waiting requests, running rows, the tree, and page-table writes not yet sent to the device.

    A running request's row of the page table mirrors ``lease.pages``. Writes are queued here and sent with the next
    plan. A page that publishing replaced stays in the row for the step being planned, which still writes the request's
    own copy, as shared pages are never written; the following step swaps it.
    """

    def __init__(self, tree: RadixTree, max_rows: int) -> None:
        self.tree = tree
        self.page_size = tree.page_size
        self.rows = Rows(max_rows)
        self.waiting = WaitingQueue()
        self.owners: Counter[str] = Counter()  # unfinished requests by owner (API key); see `Scheduler`
        self.running: Counter[str] = Counter()  # of them, those with a row
        self.clock = 0  # tokens scheduled so far: measures how long requests have waited
        self.retractions = 0
        self.hold_owner: HoldOwner | None = None
        self.pin_breakpoints: Callable[[Request], None] = lambda request: None  # see `CacheService`
        self._writes: list[tuple[int, int, Int32]] = []  # (row, first column, pages)

    def lease(self, request: Request) -> Lease:
        if request.lease is None:
            raise LookupError(f"request {request.id} has no lease: it is not running")
        return request.lease

    def enter(self, request: Request, lease: Lease) -> int:
        """Starts a waiting request with ``lease``; returns its row."""
        del self.waiting[request.id]
        row = self.rows.take(request, lease.hit)
        request.row, request.lease, request.status = row, lease, Status.RUNNING
        self.running[request.namespace[0]] += 1
        self.rows.pages[row] = len(lease.pages)
        if len(lease.pages):
            self._writes.append((row, 0, np.array(lease.pages, dtype=np.int32)))
        return row

    def reserve(self, request: Request, pages: int) -> Int32 | None:
        """``pages`` more pages for a running request, or None with nothing changed."""
        if pages <= 0:
            return np.empty(0, dtype=np.int32)
        taken = self.tree.reserve(self.lease(request), pages)
        if taken is not None:
            row = request.row
            self._writes.append((row, int(self.rows.pages[row]), taken))
            self.rows.pages[row] += pages
        return taken

    def relieve(self, pages: int, *, everything: bool) -> bool:
        """Makes ``pages`` available, if necessary by giving up holds of branches; returns whether they are."""
        if pages <= self.tree.available:
            return True
        return self.hold_owner is not None and self.hold_owner.relieve(pages, everything)

    def publish(self, request: Request, length: int) -> tuple[int, int, Int32] | None:
        """Publishes the whole pages of the request's first ``length`` tokens, whose KV is written or scheduled.

        Returns the page-table write that replaces duplicates by the tree's pages, to be queued with `swap`.
        """
        replaced = self.tree.publish(self.lease(request), request.tokens[:length])
        return None if replaced is None else (request.row, replaced[0], replaced[1])

    def append(self, request: Request, token: int) -> None:
        """A step has sampled a request's next token. The request may have been retracted since the step was planned."""
        request.append(token)
        row = request.row
        if row < 0:
            self.waiting.changed(request)
        elif self.rows.length[row] == request.num_tokens:  # else a later step in flight has its value
            self.rows.last_token[row] = token

    def swap(self, writes: list[tuple[int, int, Int32]]) -> None:
        self._writes.extend(writes)

    def leave(self, request: Request, *, keep: bool = True) -> None:
        """Takes row and pages from a running request: the only way, for finish, abort, retraction and failure.

        ``keep``: known tokens whose KV is written or scheduled stay in the tree.
        """
        row = request.row
        valid = min(int(self.rows.computed[row]), request.num_tokens)
        self.tree.release(self.lease(request), request.tokens[:valid] if keep else None)
        self.rows.give_back(row)
        self._writes = [write for write in self._writes if write[0] != row]
        request.row, request.lease = -1, None
        self.running[request.namespace[0]] -= 1

    def left(self, request: Request) -> None:
        """A request has ended."""
        owner = request.namespace[0]
        self.owners[owner] -= 1
        if not self.owners[owner]:
            del self.owners[owner]
            self.running.pop(owner, None)

    def retract(self, request: Request) -> None:
        """Returns a running request to the queue. What it has computed stays in the tree, so resuming can be a hit."""
        self.leave(request)
        request.status = Status.WAITING
        request.retractions += 1
        request.hit_estimate = max(0, request.num_tokens - 1)
        self.retractions += 1
        self.waiting.restore(request)

    def victim(self, request: Request, *, by_priority: bool) -> Request | None:
        """The request to retract when ``request`` needs pages: the youngest running one that is younger, or of lower
        priority. None if there is none, so that the oldest (of the highest priority) is never retracted and ends."""

        def rank(other: Request) -> tuple[int, int]:
            return (other.priority if by_priority else 0, -int(self.rows.order[other.row]))

        lowest = min(self.rows.running(), key=rank, default=None)
        return lowest if lowest is not None and rank(lowest) < rank(request) else None

    def take_writes(self) -> tuple[Int32, Int32, Int32]:
        """The queued page-table writes as (rows, columns, pages), each cell at most once: the last write wins."""
        writes, self._writes = self._writes, []
        if not writes:
            empty = np.empty(0, dtype=np.int32)
            return empty, empty, empty
        lengths = [len(pages) for _, _, pages in writes]
        rows = np.repeat(np.fromiter((w[0] for w in writes), np.int32, len(writes)), lengths)
        cols = np.concatenate([np.arange(w[1], w[1] + len(w[2]), dtype=np.int32) for w in writes])
        pages = np.concatenate([w[2] for w in writes]).astype(np.int32, copy=False)
        cells = rows.astype(np.int64) << 32 | cols
        _, last = np.unique(cells[::-1], return_index=True)
        if len(last) != len(cells):
            keep = np.sort(len(cells) - 1 - last)
            rows, cols, pages = rows[keep], cols[keep], pages[keep]
        return rows, cols, pages

    def check(self) -> None:
        """Raises RuntimeError if rows and leases disagree; then walks the tree and the pages (`RadixTree.check`)."""
        if self.running + Counter() != Counter(request.namespace[0] for request in self.rows.running()):
            raise RuntimeError("the count of an owner's running requests is wrong")
        for request in self.rows.running():
            row, lease = request.row, self.lease(request)
            computed, length = int(self.rows.computed[row]), int(self.rows.length[row])
            problem = None
            if self.rows.pages[row] != len(lease.pages):
                problem = f"its row has {self.rows.pages[row]} pages, its lease {len(lease.pages)}"
            elif computed > len(lease.pages) * self.page_size:
                problem = f"{computed} tokens computed in {len(lease.pages)} pages"
            elif self.rows.phase[row] == DECODE and computed < self.rows.limit[row] and length != computed + 1:
                problem = f"decoding with {length} tokens of which {computed} are computed"
            elif request.status is not Status.RUNNING or request.id in self.waiting:
                problem = f"in a row with status {request.status.name}"
            if problem:
                raise RuntimeError(f"request {request.id}, row {row}: {problem}")
        for request in self.waiting.values():
            if request.status is not Status.WAITING or request.lease is not None:
                raise RuntimeError(f"waiting request {request.id} has status {request.status.name} or a lease")
        self.waiting.check()
        self.tree.check()
