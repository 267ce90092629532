"""Waiting and running requests, and the pages and rows they have: the only place where either changes owner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...radix.lease import Lease
from ...radix.tree import RadixTree
from ..step import Int32
from .request import Request, Status
from .rows import DECODE, Rows
from .scheduled_step import ScheduledStep
from .waiting import WaitingQueue

_PUBLISH_TOKENS = 64  # computed by a decode between two publications, each of which takes 20 µs


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
        self.publish_every = -(-_PUBLISH_TOKENS // tree.page_size) * tree.page_size
        self.rows = Rows(max_rows)
        self.waiting = WaitingQueue()
        self.owners: Counter[str] = Counter()  # unfinished requests by owner (API key); see `Scheduler`
        self.running: Counter[str] = Counter()  # of them, those with a row
        self.clock = 0  # tokens scheduled so far: measures how long requests have waited
        self.retractions = 0
        self.hold_owner: HoldOwner | None = None
        self.pin_breakpoints: Callable[[Request], None] = lambda request: None  # see `CacheService`
        self._writes: list[Int32] = []  # [3, n]: rows, columns, pages

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
            self._writes.append(_write(row, np.arange(len(lease.pages)), lease.pages))
        return row

    def reserve(self, request: Request, pages: int) -> Int32 | None:
        """``pages`` more pages for a running request, or None with nothing changed."""
        if pages <= 0:
            return np.empty(0, dtype=np.int32)
        taken = self.tree.reserve(self.lease(request), pages)
        if taken is not None:
            row, have = request.row, int(self.rows.pages[request.row])
            self._writes.append(_write(row, np.arange(have, have + pages), taken))
            self.rows.pages[row] += pages
        return taken

    def reserve_each(self, rows: Int32) -> bool:
        """One more page for the request of each row; False, with nothing changed, if there are not enough."""
        taken = self.tree.reserve_each([self.lease(self.rows.request(row)) for row in rows.tolist()])
        if taken is None:
            return False
        self._writes.append(_write(rows, self.rows.pages[rows], taken))
        self.rows.pages[rows] += 1
        return True

    def relieve(self, pages: int, *, everything: bool) -> bool:
        """Makes ``pages`` available, if necessary by giving up holds of branches; returns whether they are."""
        if pages <= self.tree.available:
            return True
        return self.hold_owner is not None and self.hold_owner.relieve(pages, everything)

    def publish(self, request: Request, length: int) -> Int32 | None:
        """Publishes the whole pages of the request's first ``length`` tokens, whose KV is written or scheduled.

        Returns the page-table writes that replace duplicates by the tree's pages, to be queued with `swap`.
        """
        replaced = self.tree.publish(self.lease(request), request.tokens[:length])
        if replaced is None:
            return None
        first, pages = replaced
        return _write(request.row, np.arange(first, first + len(pages)), pages)

    def take_in(self, step: ScheduledStep, tokens: Int32) -> npt.NDArray[np.bool_]:
        """A step's samples, which their requests have been given, become the next inputs of their rows. Returns the
        samples whose request is still in the row that it had in the step, bool ``[S]``."""
        rows = self.rows
        kept = rows.order[step.rows] == step.admissions
        next_inputs = kept & (rows.length[step.rows] == step.positions + 1)  # else a later step in flight has its value
        rows.last_token[step.rows[next_inputs]] = tokens[next_inputs]
        for i in np.flatnonzero(~kept).tolist():
            request = step.sampled[i]
            if request is not None and request.row < 0:
                self.waiting.changed(request)  # retracted: its tokens are one more
            elif request is not None and rows.length[request.row] == request.num_tokens:
                rows.last_token[request.row] = tokens[i]
        return kept

    def publish_decodes(self, step: ScheduledStep, kept: npt.NDArray[np.bool_]) -> None:
        """Publishes what some of a step's decodes have computed. Chunks of prompts are published when scheduled.

        Each request publishes once in `publish_every` tokens. Which step that is depends on its row, because samples of
        one prompt fill their pages in the same step, and publishing 256 at once would take longer than a step.
        ``kept``: see `take_in`.
        """
        rows, every = self.rows, self.publish_every
        # After a jump (PREFILL) not all known tokens have been scheduled.
        due = kept & (step.positions % every == step.rows % every) & (rows.phase[step.rows] == DECODE)
        for row in step.rows[due].tolist():
            request = rows.request(row)
            swap = self.publish(request, request.num_tokens - 1)
            if swap is not None:
                self._writes.append(swap)

    def swap(self, writes: list[Int32]) -> None:
        self._writes.extend(writes)

    def leave(self, request: Request, *, keep: bool = True) -> None:
        """Takes row and pages from a running request: the only way, for finish, abort, retraction and failure.

        ``keep``: known tokens whose KV is written or scheduled stay in the tree.
        """
        row = request.row
        valid = min(int(self.rows.computed[row]), request.num_tokens)
        self.tree.release(self.lease(request), request.tokens[:valid] if keep else None)
        self.rows.give_back(row)
        self._writes = [write[:, write[0] != row] for write in self._writes]
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
        found = np.concatenate(writes, axis=1) if writes else np.empty((3, 0), np.int32)
        cells = found[0].astype(np.int64) << 32 | found[1]
        _, last = np.unique(cells[::-1], return_index=True)
        if len(last) != len(cells):
            found = np.ascontiguousarray(found[:, np.sort(len(cells) - 1 - last)])
        rows, columns, pages = found
        return rows, columns, pages

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


def _write(rows: int | Int32, columns: npt.NDArray[np.integer], pages: Int32) -> Int32:
    """Page-table writes as one array, ``[3, n]``."""
    write = np.empty((3, len(pages)), np.int32)
    write[0], write[1], write[2] = rows, columns, pages
    return write
