"""Compiles constraints in threads, and caches compiled grammars (LRU by estimated memory)."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..constraint import Constraint, ConstraintError
from ..errors import LoadError
from ..fair_queue import FairQueue
from .matcher import Grammar

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


@dataclass(eq=False, slots=True)
class _Job:
    call: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    waiters: int = 0


class GrammarCompiler:
    """Thread-safe. Loading the tokenizer and preparing it for llguidance hold the GIL for up to 0.5 and 0.7 s of a
    vocabulary of 150,000: `prepare` does so while nothing else runs, else the first compilation.

    Compilations are queued fairly by owner, and dropped when their last caller stops waiting. Matchers of slow grammars
    advance in the same threads, before all compilations. For a tokenizer that llguidance cannot use, every constraint
    is refused with the reason.

    ``load_tokenizer`` is called when the tokenizer is needed.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        eos_ids: Sequence[int],
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._load_tokenizer, self._eos_ids = load_tokenizer, eos_ids
        self._tokenizer: Tokenizer | None = None
        self.mask_words = -(-vocab_size // 32)  # length of a token bitmask, in 32-bit words
        self._vocab_size = vocab_size
        self._backend: GrammarBackend | ConstraintError | None = None  # or why there is none
        self._preparing = threading.Lock()
        self._pool = ThreadPoolExecutor(
            max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // 2)), "branchwise-grammar", initializer=_lower_priority
        )
        self._lock = threading.Lock()
        self._compiling: dict[Constraint, _Job] = {}  # queued or running
        self._queue: FairQueue[_Job] = FairQueue()
        self._advances: deque[_Job] = deque()
        self._cache: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()  # compiled or refused
        self._sizes: dict[Constraint, int] = {}
        self._cache_bytes = cache_bytes
        self.cached_bytes = 0
        self.compiled = 0  # grammars compiled so far, refused ones included

    def prepare(self) -> bool:
        """Loads the tokenizer; called again, prepares it. Returns whether anything was still to be done."""
        with self._preparing:
            if self._backend is not None:
                return False
            try:
                if self._tokenizer is None:
                    self._tokenizer = self._load_tokenizer()
                    return True
                from .llg import GrammarBackend  # llguidance takes 0.1 s to import

                self._backend = GrammarBackend(self._tokenizer, self._vocab_size, self._eos_ids)
            except (ConstraintError, LoadError) as error:
                self._backend = ConstraintError(str(error))
            return True

    def backend(self) -> GrammarBackend:
        """Prepared. Raises `ConstraintError` if llguidance cannot use the tokenizer."""
        while self.prepare():
            pass
        assert self._backend is not None
        if isinstance(self._backend, ConstraintError):
            raise self._backend
        return self._backend

    def compile(self, constraint: Constraint, owner: str = "") -> Future[Grammar]:
        """The grammar, from the cache or a thread. The future's exception for a bad constraint is `ConstraintError`.

        Call `release` once for each call, when its caller stops waiting.
        """
        with self._lock:
            found = self._cache.get(constraint)
            if found is not None:
                self._cache.move_to_end(constraint)
                return found
            job = self._compiling.get(constraint)
            if job is None:
                job = self._compiling[constraint] = _Job(partial(self._compile, constraint))
                self._pool.submit(self._run_next)
            if not job.future.running():
                self._queue.put(owner, job)
            job.waiters += 1
            return job.future

    def release(self, constraint: Constraint) -> None:
        """One caller of `compile` stops waiting. A compilation that has not begun is dropped after the last."""
        with self._lock:
            job = self._compiling.get(constraint)
            if job is None:
                return
            job.waiters -= 1
            if job.waiters == 0 and job.future.cancel():
                self._queue.discard(job)
                del self._compiling[constraint]

    def follow(self, call: Callable[[], None]) -> Future[None]:
        """Runs ``call``, a method of a `Matcher`, in a thread."""
        job = _Job(call)
        with self._lock:
            self._advances.append(job)
        self._pool.submit(self._run_next)
        return job.future

    def _run_next(self) -> None:
        with self._lock:
            if not self._advances and not self._queue:
                return  # its job was dropped
            job = self._advances.popleft() if self._advances else self._queue.take()
            self._queue.discard(job)  # other owners wait for it too
            if not job.future.set_running_or_notify_cancel():
                return
        try:
            result = job.call()
        except BaseException as error:  # a Rust panic is not an `Exception`
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def close(self) -> None:
        """Cancel queued work; a compilation that runs is finished by its thread and dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> Grammar:
        size = _ERROR_BYTES + len(constraint.text)
        try:
            backend = self.backend()
            grammar = Grammar(backend, backend.compile(constraint))
            size = _GRAMMAR_BYTES + _BYTES_PER_BYTE * len(constraint.text)
            return grammar
        finally:
            self._keep(constraint, size)

    def _keep(self, constraint: Constraint, size: int) -> None:
        """Move a compilation to the cache, and evict the least recently used while the cache is too large."""
        with self._lock:
            self.compiled += 1
            self._cache[constraint] = self._compiling.pop(constraint).future
            self._sizes[constraint] = size
            self.cached_bytes += size
            while self.cached_bytes > self._cache_bytes and len(self._cache) > 1:
                old, _ = self._cache.popitem(last=False)
                self.cached_bytes -= self._sizes.pop(old)


def _lower_priority() -> None:
    """Lower the priority of this thread only: on Linux each thread has its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
