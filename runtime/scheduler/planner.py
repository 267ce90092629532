"""Plans one step: which requests decode, which prompts advance, what is admitted and what is retracted.

No torch, no I/O and no wall clock: a plan is a function of the ledger, so the same inputs give the same plans.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..config import SchedulePolicy
from ..messages import CacheReport
from ..step import RowStart
from ..tiers.none import NoTiers
from .draft import Chunk, Draft
from .estimator import OutputEstimator
from .fairness import Fairness
from .forecast import NEVER, Reservations
from .ledger import Ledger
from .policy import admission_keys
from .prompt_scores import PromptScores
from .request import Request
from .rows import DECODE, PREFILL
from .scheduled_step import ScheduledStep

_PRODUCER_MIN = 64  # tokens: do not wait for another request to compute a shared prefix shorter than this
_COPY_MIN = 4  # tokens: do not wait a step to share less than this of a page
_MAX_TRIES = 8  # candidates that cannot be admitted before admission ends for the step
_MAX_SKIPS = 64  # later requests admitted before one that does not fit; then none may delay it
_PATIENCE = 32  # times the step's budget: tokens after which a waiting request is overdue (see `policy`)
_MAX_YIELDS = 4  # running requests retracted in one step so that other owners' can be admitted
# Beside decodes, short prompts fill a step to `_FILL` query tokens. Beyond that a step takes as much longer as it has
# tokens more, and requests whose prompts were computed together decode and end together, so that their clients' next
# prompts arrive together too and wait for each other. First tokens come sooner (p50) and no step between two tokens is
# long (p99); a request that decodes while a wave of prompts comes in takes a few such steps longer as a whole (p99).
_FILL = 1024
_SHORT = 512  # query tokens that a short prompt has left; there is room for as many however many requests decode
_REFRESH = 2  # waiting requests whose cached prefix is looked up again per step (a lookup costs up to 0.1 ms)


class Planner:
    """Plans steps over the ledger's requests. ``max_batched_tokens``: query tokens per step."""

    def __init__(self, ledger: Ledger, *, policy: SchedulePolicy, max_batched_tokens: int, tiers: NoTiers) -> None:
        self._ledger = ledger
        self._rows = ledger.rows
        self._tree = ledger.tree
        self._tiers = tiers
        self._page_size = ledger.page_size
        self._policy: SchedulePolicy = policy
        self._budget = max_batched_tokens
        self._patience = _PATIENCE * max_batched_tokens
        self._cursor = 0
        self._first: Request | None = None  # overtaken too often: goes first, and nothing delays its start
        self._fairness = Fairness(ledger)
        self.estimator = OutputEstimator()
        self._reservations = Reservations(ledger, self.estimator)
        self.scores = PromptScores(ledger)
        self.served: list[Request] = []  # ended at admission: everything that they need is cached
        self.misfit: Request | None = None  # the first that did not fit when the last step was planned

    def plan(self) -> ScheduledStep | None:
        """The next step, or None if nothing can run now. The ledger advances as if the step had been launched."""
        while True:
            self.misfit = None
            step = self._tree.begin_step()
            draft = Draft(step, self._budget)
            self._decodes(draft)
            draft.budget = min(draft.budget, self._fairness.prompt_budget(self._budget))
            producers = self._prefills(draft)
            if not draft.retracted:
                self._admissions(draft, producers)
            if not draft.empty:
                return draft.build(self._ledger)
            self._tree.cancel_step(step)
            if not draft.retracted:
                return None
            # Pages of retracted requests were quarantined until the end of this step. It will not run: try again.

    # -- decodes -------------------------------------------------------------------------------------------------------

    def _decodes(self, draft: Draft) -> None:
        """Advances every decoding request by one token; the oldest get pages first."""
        r, page = self._rows, self._page_size
        rows = r.in_order(DECODE)
        rows = rows[(r.length[rows] < r.limit[rows]) & ~r.blocked[rows]]
        full = rows[r.computed[rows] >= r.pages[rows] * page]
        if len(full) and not self._ledger.reserve_each(full):
            for row in full.tolist():
                if r.phase[row] == DECODE:  # not retracted for an older one meanwhile
                    self._grow(draft, r.request(row), 1)
        rows = rows[(r.phase[rows] == DECODE) & (r.computed[rows] < r.pages[rows] * page)]
        draft.decode_rows = rows[: draft.budget]
        draft.budget -= len(draft.decode_rows)

    def _grow(self, draft: Draft, request: Request, pages: int) -> bool:
        """Reserves ``pages`` more pages for a running request. If they are short, first branches give up their holds,
        then younger requests are retracted.

        False: the request skips this step and keeps its pages. Older requests will end, or quarantined pages become
        free; the oldest request can take every page except quarantined ones.
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
        """Advances the prompts of running requests; returns those that this step does not complete.

        No request is retracted for a later one in this order: publishing a chunk promises that the step computes it,
        so a request with a chunk in the draft must keep its pages.
        """
        r = self._rows
        unfinished = []
        rows = r.in_order(PREFILL).tolist()
        if self._policy == "priority":
            rows.sort(key=lambda row: -r.request(row).priority)
        shares = self._fairness.prompt_shares(draft.budget)
        for row in rows:
            if r.phase[row] != PREFILL:
                continue
            request = r.request(row)
            owner, before = request.namespace[0], draft.budget
            self._chunk(draft, request, most=shares.get(owner, before))
            if owner in shares:
                shares[owner] -= before - draft.budget
            if r.phase[row] == PREFILL:
                unfinished.append(request)
        # An older prompt may have caused the retraction of a younger, decoding request.
        draft.decode_rows = draft.decode_rows[r.phase[draft.decode_rows] == DECODE]
        return unfinished

    def _chunk(self, draft: Draft, request: Request, copy_from: int | None = None, most: int | None = None) -> None:
        """Schedules as much of the request's prompt as the budget and ``most`` allow, and publishes it at once.

        ``copy_from``: the page to copy to the request's first new page, to reuse its first tokens.
        """
        r, row = self._rows, request.row
        start, length = int(r.computed[row]), int(r.length[row])
        most = draft.budget if most is None else min(most, draft.budget)
        short, room = length - start <= _SHORT, self._room(draft)
        if short and room > 0:
            most = min(most, room)
        end = min(length, start + most)
        pages = int(r.pages[row])
        if end == start or not self._grow(draft, request, -(-end // self._page_size) - pages):
            if copy_from is not None:
                raise RuntimeError(f"request {request.id} was admitted without the pages for its first chunk")
            return
        if copy_from is not None:  # before publishing, which may replace the copy by the original
            draft.copies.append((copy_from, int(self._ledger.lease(request).pages[pages])))
        done = end == length
        samples = done and length < request.limit
        draft.chunks.append(Chunk(request, row, request.tokens[start:end], start, samples))
        draft.budget -= end - start
        draft.short_tokens += end - start if short else 0
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
        """Admits waiting requests, in the order of the policy and fairly between owners, as far as they fit.

        A request that does not fit, or for which a step has no room, may be overtaken. After `_MAX_SKIPS` times there
        is room for it, and whatever it waits for, only requests that end before its pages are there go before it: by
        the forecast it starts no later than if nothing else were admitted.
        """
        ledger = self._ledger
        if not ledger.waiting or draft.budget <= 0:
            return
        if not self._rows.has_free and not self._fairness.someone_may_take():
            return
        self._reservations.begin()
        self.scores.begin_step()
        misfits: list[Request] = []
        overtaken: list[Request] = []  # misfits, and those without room
        tries = _MAX_TRIES
        deadline = NEVER  # steps from now within which a request must have ended
        for request in self._candidates():
            if draft.budget <= 0 or tries <= 0:
                break
            goes_first = self._goes_first(request)
            if goes_first:
                deadline = self._start_of(request)
            if self.scores.should_await(request) or self._should_await_producer(request, producers):
                continue
            if not goes_first and self._room(draft) <= 0 and self._is_short(request):
                tries -= 1
                overtaken.append(request)
                continue
            if draft.chunks and self._should_await_copy(request):
                continue
            tries -= 1
            if self._should_await_tiers(request):
                continue
            if not goes_first and self._longest_run(request) > deadline:
                continue
            if not self._rows.has_free and not self._yield_to(draft, request):
                continue
            admitted = self._admit(draft, request, look=not misfits)
            if not admitted and self._yield_to(draft, request):
                self._reservations.begin()
                admitted = self._admit(draft, request, look=True)
            if admitted:
                tries += 1
                deadline = NEVER if goes_first else deadline
                for each in overtaken:
                    each.skips += 1
                if request.row >= 0 and self._rows.phase[request.row] == PREFILL:
                    producers.append(request)
                if not self._rows.has_free and not self._fairness.someone_may_take():
                    break
                continue
            misfits.append(request)
            overtaken.append(request)
            self.misfit = misfits[0]
            if goes_first:  # its prefix has been looked up again
                deadline = self._start_of(request)

    def _goes_first(self, request: Request) -> bool:
        """Whether it is the one request that was overtaken too often. It stays so until it is admitted or ends."""
        if self._first is None and request.skips >= _MAX_SKIPS:
            self._first = request
        return request is self._first

    def _start_of(self, request: Request) -> int:
        """Steps until its pages are there, if nothing else is admitted."""
        pages = self._expected_pages(request) - request.hit_estimate // self._page_size
        return self._reservations.forecast.start_of(pages, self._tree.available)

    def _room(self, draft: Draft) -> int:
        """Query tokens that short prompts may still have in this step."""
        decodes = len(draft.decode_rows)
        return max(_FILL - decodes, _SHORT) - draft.short_tokens if decodes else draft.budget

    def _is_short(self, request: Request) -> bool:
        """Whether little of a waiting request's prompt is left to compute. Looks it up where the estimate says no."""
        if request.num_tokens - request.hit_estimate > _SHORT:
            self._look_up(request)
        return request.num_tokens - request.hit_estimate <= _SHORT

    def _longest_run(self, request: Request) -> int:
        """Steps until it ends at its limit, if it is admitted now, its prompt has whole steps to itself and nothing
        holds it up."""
        return request.limit - request.num_tokens + -(-request.num_tokens // self._budget)

    def _expected_pages(self, request: Request) -> int:
        expected = self.estimator.expected_length(request.prompt_len, request.num_tokens, request.limit)
        return -(-max(expected, request.num_tokens) // self._page_size)

    def _yield_to(self, draft: Draft, request: Request) -> bool:
        """Retracts a running request of another owner for the sake of fairness; returns whether it did."""
        if draft.yields >= _MAX_YIELDS or not self._fairness.contended:
            return False
        pages = self._expected_pages(request) - request.hit_estimate // self._page_size
        victim = self._fairness.yielding(request, pages, (chunk.row for chunk in draft.chunks))
        if victim is None:
            return False
        kept = draft.decode_rows[draft.decode_rows != victim.row]
        draft.budget += len(draft.decode_rows) - len(kept)
        draft.decode_rows = kept
        self._ledger.retract(victim)
        draft.retracted = True
        draft.yields += 1
        return True

    def _candidates(self) -> Iterator[Request]:
        """Waiting requests in the order in which to try them. Of a long queue, looks up a few cached prefixes again in
        each step; the requests of a short one are all tried, which looks them up where it matters."""
        queue = self._ledger.waiting
        if len(queue) > _MAX_TRIES:
            for request in queue.some(self._cursor, _REFRESH):
                self._look_up(request)
            self._cursor = (self._cursor + _REFRESH) % len(queue)
        waiting = queue.columns()
        keys = admission_keys(self._policy, waiting, self._ledger.clock, self._patience)
        first = self._first
        if first is not None and queue.get(first.id) is not first:
            self._first = first = None
        if first is not None:
            yield first
        for position in self._fairness.in_order(waiting, keys):
            request = waiting.request(position)
            if request is not first:
                yield request

    def _look_up(self, request: Request) -> None:
        """Estimates again how much of a waiting request's prompt is cached."""
        request.hit_estimate = self._tree.peek(request.tokens, request.namespace, request.reuse_limit)
        self._ledger.waiting.changed(request)

    def _should_await_producer(self, request: Request, producers: list[Request]) -> bool:
        """Whether another request is computing a long part of this prompt that is not in the tree yet."""
        if not self._tree.enabled:
            return False
        limit = request.reuse_limit
        for producer in producers:
            if producer.row < 0:
                continue  # retracted since
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

    def _should_await_copy(self, request: Request) -> bool:
        """Whether it shares part of a page that this step writes, so that the next step can copy from it. Waiting for
        that once lets requests that arrive together share to the token, as if they had arrived one by one."""
        if request.deferred:
            return False
        now, soon = self._tree.peek_in_flight(request.tokens, request.namespace, request.reuse_limit)
        request.hit_estimate = now
        self._ledger.waiting.changed(request)
        request.deferred = soon - now >= _COPY_MIN
        return request.deferred

    def _should_await_tiers(self, request: Request) -> bool:
        """Whether it would fit, and lower memory tiers are bringing up a part of its prompt."""
        if not self._tiers.exist:
            return False
        expected = self.estimator.expected_length(request.prompt_len, request.num_tokens, request.limit)
        fits = not len(self._rows) or self._may_fit(request, expected, look=False)
        return fits and self._tiers.should_wait(request)

    def _may_fit(self, request: Request, expected: int, look: bool) -> bool:
        """Whether it may fit, by the last lookup of its prefix or, with ``look``, by a new one."""

        have = request.hit_estimate // self._page_size
        if self._reservations.demand(request.num_tokens, expected, have) <= self._tree.available:
            return True
        if look:
            self._look_up(request)
        return look and self._may_fit(request, expected, look=False)

    def _admit(self, draft: Draft, request: Request, *, look: bool) -> bool:
        """Admits the request if it fits beside what running requests are expected to need. False: nothing changed.

        ``look``: look its prefix up again if it seems not to fit. Its hits are locked before anything is evicted for
        it.
        """
        tree, page = self._tree, self._page_size
        demand, relieve = self._reservations.demand, self._ledger.relieve
        alone = not len(self._rows)
        available, length = tree.available, request.num_tokens
        prompt_pages = -(-length // page)
        expected = self.estimator.expected_length(request.prompt_len, length, request.limit)
        if (
            not alone
            and not self._may_fit(request, expected, look)
            and not relieve(demand(length, expected, request.hit_estimate // page), everything=False)
        ):
            return False  # before the match, which would count as a use of the prefix
        lease = tree.match(request.tokens, request.namespace, request.reuse_limit, request.priority)
        # Its hits are leased now, so its branch's hold can be given up like any other.
        fits = relieve(demand(length, expected, len(lease.pages)), everything=alone)
        if alone and lease.copy is not None and prompt_pages - len(lease.pages) > tree.available:
            # The page to copy from is locked, and may be the only one left to evict.
            aligned = lease.length
            tree.release(lease)
            lease = tree.match(request.tokens, request.namespace, aligned, request.priority)
        if not fits and not (alone and prompt_pages - len(lease.pages) <= tree.available):
            tree.release(lease)
            return False
        if request.cache is None:
            report = lease.report
            refilled = max(0, min(request.remembered, request.reuse_limit) - lease.hit)
            reason = "disabled" if request.no_cache else report.reason
            written = 0 if reason == "disabled" else max(0, request.prompt_len - lease.hit)
            request.cache = CacheReport(report.hit_tokens, reason, report.diverged_at, refilled, written)
            came = self._tiers.served(request, lease.hit)
            request.cache.host_tokens, request.cache.disk_tokens, request.cache.tier_reason = came
        request.cache.cached_logprobs = request.cached_logprobs
        if lease.hit == request.num_tokens:  # max_tokens=0 and everything is cached
            self._ledger.pin_breakpoints(request)
            tree.release(lease)
            del self._ledger.waiting[request.id]
            self.served.append(request)
            return True
        self.scores.carry(request, lease)
        row = self._ledger.enter(request, lease)
        draft.starts.append(RowStart(row, request.params, request.seed, request.tokens, request.prompt_len))
        self._chunk(draft, request, copy_from=None if lease.copy is None else lease.copy[0])
        self._reservations.add(length, expected, len(lease.pages), max(0, available - tree.available))
        return True
