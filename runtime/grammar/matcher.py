"""Compiled grammars, and the position of one output in its grammar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from ..constraint import ConstraintError
from ..step import TokenBitmask

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from .llg import GrammarBackend

# Average CPU seconds a token from which a grammar counts as slow: only its own requests wait for its masks then. It
# counts as fast again below the second figure.
SLOW_SECONDS = 1e-3
FAST_SECONDS = 0.3e-3
_NEWEST_WEIGHT = 0.1  # of the latest token, in that moving average
# A parallel fill gives no cost for each grammar. One that takes longer than this, plus this for each mask, makes its
# grammars fill their next masks one by one, which measures each.
_PARALLEL_SECONDS, _PARALLEL_SECONDS_EACH = 1e-3, 0.1e-3
_MEASURED_MASKS = 16
MAX_JUMP = 256  # tokens of one `Matcher.jump`: the engine's thread spends 10 to 40 µs on each


class Grammar:
    """A compiled constraint, shared by all outputs that it constrains. Its cost a token is measured over all of them.

    ``start`` is a matcher at the grammar's start. Raises `ConstraintError` if no output can satisfy the grammar.
    """

    def __init__(self, backend: GrammarBackend, start: LLMatcher) -> None:
        self.backend = backend
        self.slow = False
        self.masks_to_measure = 0  # this many masks are still to be filled one by one
        self._cost = 0.0  # CPU seconds a token, moving average
        self._start = start
        self.first_mask = np.empty(backend.mask_words, np.uint32)
        began = time.thread_time()
        backend.fill_mask(start, self.first_mask)
        self.forced = backend.forced_tokens(start) if _allows_one(self.first_mask) else []
        self.record_cost(time.thread_time() - began)
        if start.is_stopped() and not start.is_accepting():
            raise ConstraintError("cannot be satisfied by any output")

    def matcher(self) -> Matcher:
        return Matcher(self, self._start.deep_copy())

    def record_cost(self, seconds: float) -> None:
        """Add one token's CPU time to the average."""
        self._cost += _NEWEST_WEIGHT * (seconds - self._cost)
        self.slow = self._cost > (FAST_SECONDS if self.slow else SLOW_SECONDS)


class Matcher:
    """The position of one output in its grammar. Used by one thread at a time: the engine's, or that of ``job``.

    Attributes:
        forced: tokens that must come next; may be known before their masks are.
        finished: the grammar allows no further token.
        error: why the output cannot continue.
        job: the thread job that is advancing this matcher, if there is one.
    """

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self.grammar = grammar
        self.finished = False
        self.error: ConstraintError | None = None
        self.job: Future[None] | None = None
        self.forced = grammar.forced
        self._matcher = matcher
        self._mask: TokenBitmask | None = grammar.first_mask  # of the next token, once computed
        self._unrecorded_seconds = 0.0  # CPU time not yet passed to `Grammar.record_cost`
        self._unrecorded_tokens = 0

    @property
    def ended(self) -> bool:
        return self.finished or self.error is not None

    @property
    def needs_mask(self) -> bool:
        """Whether `compute_mask` has work to do."""
        return self._mask is None and not self.ended

    @property
    def mask(self) -> TokenBitmask:
        """The tokens allowed next, uint32 [mask_words]. Call `compute_mask` first."""
        if self._mask is None:
            raise RuntimeError("no mask: call compute_mask() first")
        return self._mask

    def advance(self, token: int) -> None:
        """Consume a sampled token; sets ``finished`` and ``error``."""
        began = time.thread_time()
        self._mask = None
        self.forced = self.forced[1:] if self.forced[:1] == [token] else []
        if not self._matcher.consume_token(token):
            reason = self._matcher.get_error().splitlines()
            self.error = ConstraintError(f"is too complex to be enforced: {reason[0] if reason else 'refused'}")
        else:
            self._check_end()
        self._unrecorded_seconds += time.thread_time() - began
        self._unrecorded_tokens += 1

    def compute_mask(self) -> None:
        """Compute which tokens are allowed next; sets ``finished`` and ``error``."""
        if not self.needs_mask:
            return
        if self.forced:
            self._mask = _only(self.forced[0], self.grammar.backend.mask_words)
            return
        began = time.thread_time()
        mask = np.empty(self.grammar.backend.mask_words, np.uint32)
        try:
            self.grammar.backend.fill_mask(self._matcher, mask)
            self._set_mask(mask)
        except ConstraintError as error:
            self.error = error
        self.grammar.masks_to_measure = max(0, self.grammar.masks_to_measure - 1)
        average = self._unrecorded_seconds / max(1, self._unrecorded_tokens)
        self.grammar.record_cost(average + time.thread_time() - began)
        self._unrecorded_seconds, self._unrecorded_tokens = 0.0, 0

    def advance_and_compute_mask(self, token: int) -> None:
        """`advance`, then `compute_mask`: what a ``job`` runs."""
        self.advance(token)
        self.compute_mask()

    def jump(self, limit: int, stop_ids: frozenset[int]) -> list[int]:
        """Consume the tokens that must come next, as if they had been sampled, and return them.

        At most ``limit`` and `MAX_JUMP` tokens, and none of ``stop_ids``. Sets ``finished`` and ``error``.
        """
        consumed: list[int] = []
        while len(consumed) < min(limit, MAX_JUMP) and not self.ended:
            if not self.forced and not self.grammar.slow:  # a slow grammar's mask is computed in its thread
                self.compute_mask()
            if not self.forced or self.forced[0] in stop_ids:
                break
            consumed.append(self.forced[0])
            self.advance(consumed[-1])
        return consumed

    def _set_mask(self, mask: TokenBitmask) -> None:
        self._mask = mask
        self._check_end()
        if not self.forced and not self.finished and _allows_one(mask):
            self.forced = self.grammar.backend.forced_tokens(self._matcher)

    def _check_end(self) -> None:
        if self._matcher.is_stopped():
            self.finished = self._matcher.is_accepting()
            if not self.finished:
                self.error = ConstraintError("cannot be satisfied by any output that begins like this one")


def compute_masks(matchers: Sequence[Matcher]) -> None:
    """`Matcher.compute_mask` in parallel, for matchers of one backend of which each `needs_mask`."""
    backend = matchers[0].grammar.backend
    began = time.monotonic()
    masks = backend.fill_masks([matcher._matcher for matcher in matchers])
    if time.monotonic() - began > _PARALLEL_SECONDS + _PARALLEL_SECONDS_EACH * len(matchers):
        for matcher in matchers:
            matcher.grammar.masks_to_measure = _MEASURED_MASKS
    for matcher, mask in zip(matchers, masks, strict=True):
        matcher._unrecorded_seconds, matcher._unrecorded_tokens = 0.0, 0
        try:
            backend.check(matcher._matcher)
            matcher._set_mask(mask)
        except ConstraintError as error:
            matcher.error = error


def suppress(mask: TokenBitmask, tokens: frozenset[int]) -> None:
    """Disallow ``tokens`` in ``mask``, unless that would leave no token."""
    rest = mask.copy()
    for token in tokens:
        if token >> 5 < len(rest):
            rest[token >> 5] &= ~np.uint32(1 << (token & 31))
    if rest.any():
        mask[:] = rest


def _allows_one(mask: TokenBitmask) -> bool:
    """Whether exactly one token is allowed."""
    words = mask[mask != 0]
    return len(words) == 1 and not int(words[0]) & (int(words[0]) - 1)


def _only(token: int, words: int) -> TokenBitmask:
    """The mask of ``words`` words that allows ``token`` and nothing else."""
    mask = np.zeros(words, np.uint32)
    mask[token >> 5] = np.uint32(1 << (token & 31))
    return mask
