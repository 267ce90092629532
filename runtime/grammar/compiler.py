"""Compiles constraints in threads, and caches compiled grammars (LRU by estimated memory)."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..constraint import Constraint, ConstraintError
from .matcher import Grammar, Matcher

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer
    from .llg import GrammarBackend

CACHE_BYTES = 64 * 1024 * 1024
_MAX_THREADS = 4
_NICE = 10  # compiler threads yield to the engine's thread where CPUs are scarce
_GRAMMAR_BYTES, _BYTES_PER_BYTE = (
    64 * 1024,
    40,
)  # of memory: a grammar, and each byte of its text (measured, rounded up)
_ERROR_BYTES = 1024  # of a cached error, besides the text


class GrammarCompiler:
    """Thread-safe. The constructor prepares the tokenizer, which holds the GIL: better at start than during serving.

    For a tokenizer that llguidance cannot use, every constraint is refused with the reason.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Sequence[int],
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        from .llg import GrammarBackend  # llguidance takes 0.1 s to import, and only engines need it

        self._backend: GrammarBackend | None = None
        self._unusable: ConstraintError | None = None
        try:
            self._backend = GrammarBackend(tokenizer, vocab_size, eos_ids)
        except ConstraintError as error:
            self._unusable = error
        self._pool = ThreadPoolExecutor(
            max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)), "branchwise-grammar", initializer=_yield_to_others
        )
        self._lock = threading.Lock()
        self._cache: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()
        self._sizes: dict[Constraint, int] = {}
        self._cache_bytes = cache_bytes
        self.cached_bytes = 0
        self.compiled = 0  # grammars compiled so far, refused ones included

    @property
    def mask_words(self) -> int:
        """Length of a token bitmask, in 32-bit words."""
        return 0 if self._backend is None else self._backend.mask_words

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """The grammar, from the cache or a thread. The future's exception for a bad constraint is `ConstraintError`."""
        with self._lock:
            found = self._cache.get(constraint)
            if found is not None:
                self._cache.move_to_end(constraint)
                return found
            future = self._pool.submit(self._compile, constraint)
            self._cache[constraint] = future
            self._keep(constraint, len(constraint.text))
        return future

    def advance(self, matcher: Matcher, token: int) -> Future[None]:
        """`Matcher.advance_and_compute_mask` in a thread."""
        return self._pool.submit(matcher.advance_and_compute_mask, token)

    def close(self) -> None:
        """Cancel queued work; a compilation that runs is finished by its thread and dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> Grammar:
        size = _ERROR_BYTES + len(constraint.text)
        try:
            if self._backend is None:
                raise self._unusable or ConstraintError("cannot be enforced")
            size = _GRAMMAR_BYTES + _BYTES_PER_BYTE * len(constraint.text)
            return Grammar(self._backend, self._backend.compile(constraint), size)
        finally:
            with self._lock:
                self.compiled += 1
                if constraint in self._cache:
                    self._keep(constraint, size)

    def _keep(self, constraint: Constraint, size: int) -> None:
        """Account for an entry, and evict the least recently used while the cache is too large."""
        self.cached_bytes += size - self._sizes.get(constraint, 0)
        self._sizes[constraint] = size
        while self.cached_bytes > self._cache_bytes and len(self._cache) > 1:
            old, _ = self._cache.popitem(last=False)
            self.cached_bytes -= self._sizes.pop(old)


def _yield_to_others() -> None:
    """Lower the priority of this thread only: on Linux each thread has its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
