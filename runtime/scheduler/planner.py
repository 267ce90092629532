"""Decides one step: who decodes, whose prompt advances, who is admitted, who must give way.

No torch, no I/O, no clock but the ledger's: the same requests in the same order give the same plans.
"""

from __future__ import annotations

import numpy as np

from ..config import SchedulePolicy
from ..messages import CacheReport
from ..step import RowStart
from .draft import Chunk, Draft, ScheduledStep
from .estimator import OutputEstimator
from .ledger import Ledger
from .policy import admission_order
from .request import Request
from .rows import DECODE, PREFILL

_PRODUCER_MIN = 64  # tokens: a shared, not yet computed prefix shorter than this is not worth a step's wait
_COPY_MIN = 4  # tokens: sharing less than this of a page is not worth a step's wait
_MAX_MISFITS = 8  # candidates per step that may fail to fit before admission stops looking
_MAX_SKIPS = 64  # times a request is overtaken because it did not fit, before it blocks the queue until it does
_REFRESH = 2  # waiting requests whose cached prefix is looked up anew each step (a lookup costs up to 0.1 ms)


class Planner:
    """Plans one step after another over the ledger's requests. ``max_batched_tokens``: query tokens of a step."""

    def __init__(self, ledger: Ledger, *, policy: SchedulePolicy, max_batched_tokens: int) -> None:
        self._ledger = ledger
        self._rows = ledger.rows
        self._tree = ledger.tree
        self._page_size = ledger.page_size
        self._policy: SchedulePolicy = policy
        self._budget = max_batched_tokens
        self._cursor = 0
        self.estimator = OutputEstimator()
        self.served: list[Request] = []  # ended at admission: everything asked for was in the tree

    def plan(self) -> ScheduledStep | None:
        """The next step, or None if nothing can run now. State advances as if the step had been launched."""
        while True:
            step = self._tree.begin_step()
            draft = Draft(step, self._budget)
            self._decodes(draft)
            producers = self._prefills(draft)
            if not draft.retracted:
                self._admissions(draft, producers)
            if not draft.empty:
                return draft.build(self._ledger)
            self._tree.cancel_step(step)
            if not draft.retracted:
                return None
            # What the retracted gave up was in quarantine until this step's end. It will not run: look again.

    # -- decodes -------------------------------------------------------------------------------------------------------

    def _decodes(self, draft: Draft) -> None:
        """Every decoding request advances by one token; the oldest get their pages first."""
        r, page = self._rows, self._page_size
        rows = r.in_order(DECODE)
        rows = rows[(r.length[rows] < r.limit[rows]) & ~r.blocked[rows]]
        for row in rows[r.computed[rows] >= r.held[rows] * page].tolist():
            if r.phase[row] == DECODE:  # not retracted by an older one just now
                self._grow(draft, r.request(row), 1)
        rows = rows[(r.phase[rows] == DECODE) & (r.computed[rows] < r.held[rows] * page)]
        draft.decode_rows = rows[: draft.budget]
        draft.budget -= len(draft.decode_rows)

    def _grow(self, draft: Draft, request: Request, pages: int) -> bool:
        """``pages`` more pages for a running request; branches that do not run lose theirs, and then younger requests
        are retracted until they fit.

        False: the request sits this step out, with what it holds. Older requests, or pages still in quarantine,
        will make room; the oldest request can always take every page but quarantined ones.
        """
        while self._ledger.reserve(request, pages) is None:
            if self._ledger.relieve(pages, everything=True):
                continue
            victim = self._ledger.victim(request, by_priority=self._policy == "priority")
            if victim is None:
                return False
            self._ledger.retract(victim)
            self.estimator.retracted()
            draft.retracted = True
        return True

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _prefills(self, draft: Draft) -> list[Request]:
        """Prompts under way advance; returns those that are not through after this step.

        Nobody gives way to one that comes later in this order: what a chunk publishes is a promise that the step runs
        it, so a request must not be retracted once its chunk is in the draft.
        """
        r = self._rows
        unfinished = []
        rows = r.in_order(PREFILL).tolist()
        if self._policy == "priority":
            rows.sort(key=lambda row: -r.request(row).priority)
        for row in rows:
            if r.phase[row] != PREFILL:
                continue
            request = r.request(row)
            self._chunk(draft, request)
            if r.phase[row] == PREFILL:
                unfinished.append(request)
        # An older prompt may have taken its pages from a younger request that was going to decode.
        draft.decode_rows = draft.decode_rows[r.phase[draft.decode_rows] == DECODE]
        return unfinished

    def _chunk(self, draft: Draft, request: Request, copy_from: int | None = None) -> None:
        """Schedules as much of the request's prompt as the budget allows, and publishes it at once.

        ``copy_from``: the page whose first tokens this request reuses by copying it to its first new page.
        """
        r, row = self._rows, request.row
        start, length = int(r.computed[row]), int(r.length[row])
        end = min(length, start + draft.budget)
        held = int(r.held[row])
        if end == start or not self._grow(draft, request, -(-end // self._page_size) - held):
            if copy_from is not None:
                raise RuntimeError(f"request {request.id} was admitted and its pages are gone")
            return
        if copy_from is not None:  # before publishing, which may swap the copy for the original
            draft.copies.append((copy_from, int(self._ledger.lease(request).pages[held])))
        done = end == length
        samples = done and length < request.limit
        draft.chunks.append(Chunk(request, row, request.tokens[start:end], start, samples))
        draft.budget -= end - start
        r.computed[row] = end
        if done:
            r.phase[row] = DECODE
            if samples:
                r.length[row] += 1
            else:
                draft.finishing.append(request)
        swap = self._ledger.publish(request, end)
        if swap is not None:
            draft.swaps.append(swap)

    # -- admission -----------------------------------------------------------------------------------------------------

    def _admissions(self, draft: Draft, producers: list[Request]) -> None:
        ledger = self._ledger
        if not ledger.waiting or draft.budget <= 0 or not self._rows.has_free:
            return
        wanted = self.estimator.pages_still_wanted(self._rows, self._page_size)
        misfits: list[Request] = []
        for request in self._candidates():
            if draft.budget <= 0 or not self._rows.has_free:
                break
            if self._waits_for_producer(request, producers) or (draft.chunks and self._waits_to_copy(request)):
                continue
            kept = self._admit(draft, request, wanted, look=not misfits)
            if kept is None:
                misfits.append(request)
                if request.skips >= _MAX_SKIPS or len(misfits) >= _MAX_MISFITS:
                    break
                continue
            wanted += kept
            for overtaken in misfits:
                overtaken.skips += 1
            if request.row >= 0 and self._rows.phase[request.row] == PREFILL:
                producers.append(request)

    def _candidates(self) -> list[Request]:
        """Waiting requests in the order they are tried. Their cached prefixes are refreshed a few a step."""
        waiting = list(self._ledger.waiting.values())
        for i in range(min(_REFRESH, len(waiting))):
            request = waiting[(self._cursor + i) % len(waiting)]
            request.hit_estimate = self._tree.peek(request.tokens, request.namespace, request.reuse_limit)
        self._cursor = (self._cursor + _REFRESH) % len(waiting)
        return admission_order(self._policy, waiting, self._ledger.clock)

    def _waits_for_producer(self, request: Request, producers: list[Request]) -> bool:
        """Is a long stretch of this prompt, not yet in the tree, being computed by someone else right now?"""
        if not self._tree.enabled:
            return False
        limit = request.reuse_limit
        for producer in producers:
            have = self._ledger.lease(producer).length
            soon = have + _PRODUCER_MIN
            if (
                soon <= min(limit, producer.num_tokens)
                and producer.namespace == request.namespace
                and np.array_equal(producer.tokens[have:soon], request.tokens[have:soon])
                and np.array_equal(producer.tokens[:have], request.tokens[:have])
            ):
                return True
        return False

    def _waits_to_copy(self, request: Request) -> bool:
        """Does it share part of a page with a prompt of this very step? The step writes that page; the next can copy
        it. Waiting for it, once, makes requests that come together share to the token, as if they had come in turn."""
        if request.held_back:
            return False
        now, soon = (
            self._tree.peek(request.tokens, request.namespace, request.reuse_limit, in_flight=in_flight)
            for in_flight in (False, True)
        )
        request.held_back = soon - now >= _COPY_MIN
        return request.held_back

    def _may_fit(self, request: Request, pages: int, look: bool) -> bool:
        """Could it fit if nothing it hits were evictable now? By the last look at the tree, or by a new one."""
        if pages - request.hit_estimate // self._page_size <= self._tree.available:
            return True
        if look:
            request.hit_estimate = self._tree.peek(request.tokens, request.namespace, request.reuse_limit)
        return look and pages - request.hit_estimate // self._page_size <= self._tree.available

    def _admit(self, draft: Draft, request: Request, wanted: int, *, look: bool) -> int | None:
        """Admits the request if it fits beside the ``wanted`` pages that running ones are expected to take.

        ``look``: a request that seems not to fit is worth a new look at the tree.

        Its own hits are locked before anything is evicted for it. Returns the pages it is expected to take beyond
        those it now holds, or None if it does not fit (nothing changed).
        """
        tree, page = self._tree, self._page_size
        alone = not len(self._rows)
        prompt_pages = -(-request.num_tokens // page)
        expected = self.estimator.expected_length(request.prompt_len, request.num_tokens, request.limit)
        total = max(prompt_pages, -(-expected // page))
        if not alone and not self._may_fit(request, total + wanted, look):
            pages = total + wanted - request.hit_estimate // page
            if not self._ledger.relieve(pages, everything=False):
                return None  # without a match: locking what is then let go would count as a use of it
        lease = tree.match(request.tokens, request.namespace, request.reuse_limit, request.priority)
        # Its own hits are leased by now, so its branch's hold may go with the others.
        self._ledger.relieve(total - len(lease.pages) + wanted, everything=alone)
        if alone and lease.copy is not None and prompt_pages - len(lease.pages) > tree.available:
            # The page it would copy from is locked and may be the very one it needs.
            aligned = lease.length
            tree.release(lease)
            lease = tree.match(request.tokens, request.namespace, aligned, request.priority)
        fits = total - len(lease.pages) + wanted <= tree.available
        if not fits and not (alone and prompt_pages - len(lease.pages) <= tree.available):
            tree.release(lease)
            return None
        if request.cache is None:
            report = lease.report
            refilled = max(0, min(request.remembered, request.reuse_limit) - lease.hit)
            reason = "disabled" if request.no_cache else report.reason
            written = 0 if reason == "disabled" else max(0, request.prompt_len - lease.hit)
            request.cache = CacheReport(report.hit_tokens, reason, report.diverged_at, refilled, written)
        if lease.hit == request.num_tokens:  # max_tokens=0 and everything is there
            self._ledger.keep(request)
            tree.release(lease)
            del self._ledger.waiting[request.id]
            self.served.append(request)
            return 0
        row = self._ledger.enter(request, lease)
        draft.starts.append(RowStart(row, request.params, request.seed, request.tokens, request.prompt_len))
        self._chunk(draft, request, copy_from=None if lease.copy is None else lease.copy[0])
        return total - len(lease.pages)
