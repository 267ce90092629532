"""Compiles constraints in threads of its own and remembers the compiled ones, least recently used first to go."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..constraint import Constraint
from ..errors import InvalidRequest
from .matcher import Grammar, Matcher

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer
    from .llg import Backend

CACHE_BYTES = 64 * 1024 * 1024
_MOST_THREADS = 4
_NICE = 10  # the engine's thread goes first where processors are scarce
_FIXED, _PER_BYTE = 64 * 1024, 40  # of memory: a compiled grammar, and each byte of its text (measured, rounded up)
_REFUSED = 1024  # bytes kept of a refusal, besides the text


class GrammarCompiler:
    """Thread-safe. The tokenizer is prepared at once: that holds the GIL, which nobody should wait for later.

    A model whose tokenizer llguidance cannot use has a compiler too: it refuses every constraint and says why.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_ids: Sequence[int],
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        from .llg import Backend  # llguidance: 0.1 s to import, and only engines need it

        self._backend: Backend | None = None
        self._unusable: InvalidRequest | None = None
        try:
            self._backend = Backend(tokenizer, vocab_size, eos_ids)
        except InvalidRequest as error:
            self._unusable = error
        self._pool = ThreadPoolExecutor(
            max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)), "branchwise-grammar", initializer=_yield_to_others
        )
        self._lock = threading.Lock()
        self._cache: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()
        self._sizes: dict[Constraint, int] = {}
        self._cache_bytes = cache_bytes
        self.cached_bytes = 0
        self.compiled = 0  # grammars compiled so far, refused ones included

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that may end an output, besides those that are part of it."""
        return frozenset() if self._backend is None else self._backend.eos_ids

    @property
    def words(self) -> int:
        """32-bit words of a mask."""
        return 0 if self._backend is None else self._backend.words

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """The grammar, now or later. Its exception is an `InvalidRequest` whose message continues "<field> …"."""
        with self._lock:
            found = self._cache.get(constraint)
            if found is not None:
                self._cache.move_to_end(constraint)
                return found
            future = self._pool.submit(self._compile, constraint)
            self._cache[constraint] = future
            self._keep(constraint, len(constraint.text))
        return future

    def run(self, matcher: Matcher, token: int) -> Future[None]:
        """`Matcher.step`, in a thread."""
        return self._pool.submit(matcher.step, token)

    def close(self) -> None:
        """What is being compiled is finished by its thread and forgotten."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> Grammar:
        size = _REFUSED + len(constraint.text)
        try:
            if self._backend is None:
                raise self._unusable or InvalidRequest("cannot be enforced")
            size = _FIXED + _PER_BYTE * len(constraint.text)
            return Grammar(self._backend, self._backend.compile(constraint), size)
        finally:
            with self._lock:
                self.compiled += 1
                if constraint in self._cache:
                    self._keep(constraint, size)

    def _keep(self, constraint: Constraint, size: int) -> None:
        """Accounts for an entry and lets go of the least recently used while there is too much."""
        self.cached_bytes += size - self._sizes.get(constraint, 0)
        self._sizes[constraint] = size
        while self.cached_bytes > self._cache_bytes and len(self._cache) > 1:
            old, _ = self._cache.popitem(last=False)
            self.cached_bytes -= self._sizes.pop(old)


def _yield_to_others() -> None:
    """Lowers the priority of this thread alone: Linux has one for each."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
