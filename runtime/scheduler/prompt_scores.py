"""Prompt logprobs that the tree remembers, and requests that wait for others to compute theirs.

The tree keeps a token's logprob and rank, and the likeliest token with its logprob (`radix.scores`), so a request for
at most one alternative gets every remembered position from memory, and computes from the first missing one on.
"""

from __future__ import annotations

import numpy as np

from ...radix.lease import Lease
from ...radix.scores import SCORE
from ..step import TokenLogprobs
from .ledger import Ledger
from .request import Request
from .rows import PREFILL

_MAX_LOOKUPS = 64  # waiting requests whose scores are looked up in one step (a lookup costs up to 0.1 ms)


class PromptScores:
    """``recalled``: logprobs from memory that have not been delivered, as (request, first position, rows)."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._tree = ledger.tree
        self._lookups = 0
        self.recalled: list[tuple[Request, int, TokenLogprobs]] = []

    def begin_step(self) -> None:
        """A step is about to be planned."""
        self._lookups = 0

    def should_await(self, request: Request) -> bool:
        """Recalls what is remembered for a waiting request. Returns whether a running request computes what it lacks
        next: one step later it is remembered, and computed once."""
        if not request.shares_scores or not self._tree.enabled:
            return False
        producer = request.awaits
        if producer is not None and self._will_know(producer, request.prompt_logprob_next):
            return True
        if self._lookups == _MAX_LOOKUPS:
            return True
        self._lookups += 1
        self._recall(request)
        request.awaits = self._producer(request) if request.shares_scores else None
        return request.awaits is not None

    def carry(self, request: Request, lease: Lease) -> None:
        """Keeps the score of a recalled token whose keys and values the request computes again: the last one, for the
        logits that score the token after it. ``lease``: with no page after its hit reserved yet."""
        first = max(1, lease.hit)
        if request.keeps_scores and first < request.prompt_logprob_next:
            scores = self._tree.scores(request.prompt[: request.prompt_logprob_next], request.namespace, first)
            self._tree.record_scores(lease, first, scores)

    def record(self, request: Request, start: int, rows: TokenLogprobs) -> None:
        """Remembers logprobs that a step has computed. Those with more alternatives are not used: of equally likely
        tokens, they may name another as the best."""
        request.prompt_logprob_done = max(request.prompt_logprob_done, start + len(rows.chosen))
        if request.lease is None or not request.keeps_scores:
            return
        scores = np.empty(len(rows.chosen), SCORE)
        scores["logprob"], scores["rank"] = rows.chosen, rows.ranks
        scores["best_id"], scores["best"] = rows.top_ids[:, 0], rows.top[:, 0]
        self._tree.record_scores(request.lease, start, scores)

    def _recall(self, request: Request) -> None:
        start = request.prompt_logprob_next
        if request.prompt_logprob_done < start:
            return  # logprobs before these are still being computed, and are delivered in order
        scores = self._tree.scores(request.prompt, request.namespace, start)
        if len(scores):
            best = scores["best_id"][:, None], scores["best"][:, None]
            rows = TokenLogprobs(scores["logprob"], scores["rank"], *best)
            self.recalled.append((request, start, rows))
            request.prompt_logprob_next = request.prompt_logprob_done = start + len(scores)
            request.cached_logprobs += len(scores)

    def _will_know(self, request: Request, position: int) -> bool:
        """Whether the tree is about to get the logprob of this position of a running request's prompt: when it has been
        computed, and its page is published. A last page that is not full is published when the request ends."""
        if request.lease is None or position >= request.prompt_len:
            return False
        if position >= request.prompt_logprob_done:
            return True
        prefilling = self._ledger.rows.phase[request.row] == PREFILL
        ends_with_its_prompt = request.limit - request.prompt_len <= 1
        return position >= request.lease.length and bool(prefilling or ends_with_its_prompt)

    def _producer(self, request: Request) -> Request | None:
        """A running request that computes the first score that this one lacks."""
        at, prompt = request.prompt_logprob_next, request.prompt
        for other in self._ledger.rows.running():
            if (
                other.keeps_scores
                and self._will_know(other, at)
                and other.namespace == request.namespace
                and other.prompt[at] == prompt[at]
                and np.array_equal(other.prompt[:at], prompt[:at])
            ):
                return other
        return None
