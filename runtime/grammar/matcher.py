"""A compiled grammar, and one output's way through it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from .llg import Backend, TokenBitmask

SLOW = 1e-3  # processor seconds a token, on average: from here on nobody waits for this grammar but its own requests
_FAST = 0.3e-3  # and below this they are quick again
_WEIGHT = 0.1  # of the latest token in the average
_LONG, _QUICK = 1e-3, 0.1e-3  # seconds: masks filled together take this and this much each, or somebody is slow
_ALONE = 16
STRETCH = 256  # tokens of one `Matcher.jump`: everybody's next step waits while they are taken in, 10 to 40 µs each


class Grammar:
    """A compiled constraint, shared by every output that follows it; its cost a token is learnt from all of them."""

    def __init__(self, backend: Backend, start: LLMatcher, size: int) -> None:
        """``start``: a matcher at the grammar's start. Raises `InvalidRequest` if no output can satisfy it."""
        self.backend = backend
        self.size = size  # bytes of memory, estimated
        self.slow = False
        self.alone = 0  # so many masks are filled one by one, to learn what each costs
        self._cost = 0.0
        self._start = start
        self.first = np.empty(backend.words, np.uint32)  # the tokens an output may begin with
        began = time.thread_time()
        backend.fill(start, self.first)
        self.forced = backend.forced(start) if _single(self.first) else []
        self.spent(time.thread_time() - began)
        if start.is_stopped() and not start.is_accepting():
            raise InvalidRequest("cannot be satisfied by any output")

    def matcher(self) -> Matcher:
        return Matcher(self, self._start.deep_copy())

    def spent(self, seconds: float) -> None:
        """One token took so much processor time."""
        self._cost += _WEIGHT * (seconds - self._cost)
        self.slow = self._cost > (_FAST if self.slow else SLOW)


class Matcher:
    """Where one output stands. Used by one thread at a time: the engine's, or that of the ``job`` under way."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self.grammar = grammar
        self.finished = False  # nothing may follow
        self.error: InvalidRequest | None = None  # the output cannot go on
        self.job: Future[None] | None = None
        self._matcher = matcher
        self._mask: TokenBitmask | None = grammar.first  # of the next token, if it is known
        self.forced = grammar.forced  # tokens that must come next; may be known without their masks
        self._unspent = 0.0  # seconds since the cost was told last
        self._taken = 0  # tokens that they went to

    def advance(self, token: int) -> None:
        """Takes in the token that was drawn; sets ``finished`` and ``error``."""
        began = time.thread_time()
        self._mask = None
        self.forced = self.forced[1:] if self.forced[:1] == [token] else []
        if not self._matcher.consume_token(token):
            reason = self._matcher.get_error().splitlines()
            self.error = InvalidRequest(f"is too complex to be enforced: {reason[0] if reason else 'refused'}")
        else:
            self._see_end()
        self._unspent += time.thread_time() - began
        self._taken += 1

    @property
    def blank(self) -> bool:
        """Whether `look` has something to find out."""
        return self._mask is None and not self.ended

    def look(self) -> None:
        """Finds out which tokens may come next; sets ``finished`` and ``error``."""
        if not self.blank:
            return
        if self.forced:
            self._mask = _only(self.forced[0], self.grammar.backend.words)
            return
        began = time.thread_time()
        mask = np.empty(self.grammar.backend.words, np.uint32)
        try:
            self.grammar.backend.fill(self._matcher, mask)
            self._see(mask)
        except InvalidRequest as error:
            self.error = error
        self.grammar.alone = max(0, self.grammar.alone - 1)
        self.grammar.spent(self._unspent / max(1, self._taken) + time.thread_time() - began)
        self._unspent, self._taken = 0.0, 0

    def _see(self, mask: TokenBitmask) -> None:
        self._mask = mask
        self._see_end()
        if not self.forced and not self.finished and _single(mask):
            self.forced = self.grammar.backend.forced(self._matcher)

    def _see_end(self) -> None:
        if self._matcher.is_stopped():
            self.finished = self._matcher.is_accepting()
            if not self.finished:
                self.error = InvalidRequest("cannot be satisfied by any output that begins like this one")

    def step(self, token: int) -> None:
        """`advance`, then `look`: what a ``job`` does."""
        self.advance(token)
        self.look()

    def jump(self, most: int, but: frozenset[int]) -> list[int]:
        """Takes in the tokens that must come next, ``most`` and `STRETCH` at most and none of ``but``, as if they had
        been drawn; returns them. Sets ``finished`` and ``error``."""
        taken: list[int] = []
        while len(taken) < min(most, STRETCH) and not self.ended:
            if not self.forced and not self.grammar.slow:  # what follows a slow one's is for its thread to find out
                self.look()
            if not self.forced or self.forced[0] in but:
                break
            taken.append(self.forced[0])
            self.advance(taken[-1])
        return taken

    @property
    def ended(self) -> bool:
        return self.finished or self.error is not None

    @property
    def mask(self) -> TokenBitmask:
        """The tokens that may come next. `look` comes first."""
        if self._mask is None:
            raise RuntimeError("look() first")
        return self._mask


def look_together(matchers: Sequence[Matcher]) -> None:
    """`Matcher.look` for those of one backend that are `Matcher.blank`, in parallel.

    What each took is not known. Where they took long, their grammars are asked one by one for a while.
    """
    backend = matchers[0].grammar.backend
    began = time.monotonic()
    masks = backend.fill_all([matcher._matcher for matcher in matchers])
    if time.monotonic() - began > _LONG + _QUICK * len(matchers):
        for matcher in matchers:
            matcher.grammar.alone = _ALONE
    for matcher, mask in zip(matchers, masks, strict=True):
        matcher._unspent, matcher._taken = 0.0, 0
        try:
            backend.check(matcher._matcher)
            matcher._see(mask)
        except InvalidRequest as error:
            matcher.error = error


def _single(mask: TokenBitmask) -> bool:
    """Whether exactly one token is allowed."""
    words = mask[mask != 0]
    return len(words) == 1 and not int(words[0]) & (int(words[0]) - 1)


def _only(token: int, words: int) -> TokenBitmask:
    """The mask that allows it and nothing else."""
    mask = np.zeros(words, np.uint32)
    mask[token >> 5] = np.uint32(1 << (token & 31))
    return mask


def hold_open(mask: TokenBitmask, tokens: frozenset[int]) -> None:
    """Takes ``tokens`` from the choice, unless nothing would be left of it."""
    rest = mask.copy()
    for token in tokens:
        if token >> 5 < len(rest):
            rest[token >> 5] &= ~np.uint32(1 << (token & 31))
    if rest.any():
        mask[:] = rest
