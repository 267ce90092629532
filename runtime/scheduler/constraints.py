"""The scheduler's side of constraints: grammar compilation, matchers of running requests, and token masks.

A fast grammar advances on the engine's thread while the forward pass runs. A slow one advances in a thread: its
requests skip steps until their next mask is known, and no other request waits for them.

Grammar threads finish at times that no plan can predict, so what they finished is an explicit input of a plan:
`ConstraintManager.poll` collects it as `ConstraintEvents` and `Scheduler.plan` takes it. Given the same messages,
events and results, the planner makes the same plans. Measured times remain: `Grammar.slow`, from CPU times, decides
whether a row skips a step, and `STEP_SECONDS` whether a sample is put off. They change when a token is sampled, never
which.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..constraint import Constraint, ConstraintError
from ..errors import InvalidRequest
from ..grammar.matcher import Grammar, Matcher, compute_masks, suppress
from ..step import TokenBitmask

if TYPE_CHECKING:
    from ..grammar.compiler import GrammarCompiler
    from .request import Request

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 10.0  # from a request's arrival until its grammar must be compiled
PARALLEL_MASKS = 4  # fewer masks than this are filled one by one
STEP_SECONDS = 0.05  # of one step's masks: beyond it, samples of slow grammars are put off


class ConstraintEvents(NamedTuple):
    """Results of grammar threads since the last poll.

    Attributes:
        compiled: requests whose grammar is ready (None), or why it will not be.
        advanced: requests whose slow matcher has consumed its token.
    """

    compiled: Sequence[tuple[Request, InvalidRequest | None]] = ()
    advanced: Sequence[Request] = ()


class ConstraintManager:
    """All constrained requests of a scheduler. ``compiler`` None: constraints are not served."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._compiling: dict[int, tuple[Request, Constraint, Future[Grammar]]] = {}
        self._advancing: dict[int, Request] = {}  # requests whose matcher's job `poll` has not reported

    @property
    def available(self) -> bool:
        return self._compiler is not None

    @property
    def busy(self) -> bool:
        """Whether a later `poll` will report something."""
        return bool(self._compiling or self._advancing)

    @property
    def compiling(self) -> int:
        """Number of requests whose grammar is not compiled yet."""
        return len(self._compiling)

    # -- threads -------------------------------------------------------------------------------------------------------

    def compile(self, request: Request, constraint: Constraint) -> None:
        """Start compiling; `poll` reports when the request may run. Needs `available`."""
        if self._compiler is None:
            raise LookupError("this scheduler has no grammar compiler")
        future = self._compiler.compile(constraint, owner=request.namespace[0])
        self._compiling[request.id] = request, constraint, future

    def forget(self, request: Request) -> None:
        """The request has ended. Its grammar is not compiled if no other request waits for it."""
        self._release(request)
        self._advancing.pop(request.id, None)

    def _release(self, request: Request) -> None:
        waiting = self._compiling.pop(request.id, None)
        if waiting is not None and self._compiler is not None:
            self._compiler.release(waiting[1])

    def poll(self, now: float) -> ConstraintEvents:
        """Collect what threads have finished. A compiled request has its matcher afterwards."""
        if not self.busy:
            return ConstraintEvents()
        compiled = []
        for request, _, future in list(self._compiling.values()):
            if future.done() or now - request.arrival > COMPILE_SECONDS:
                compiled.append((request, self._start(request, future)))
                self._release(request)
        advanced = []
        for request in list(self._advancing.values()):
            job = _matcher(request).job
            if job is None or job.done():
                self._take_job(request)
                advanced.append(request)
        return ConstraintEvents(compiled, advanced)

    def _start(self, request: Request, future: Future[Grammar]) -> InvalidRequest | None:
        """Give the request its matcher, or return why there is none."""
        if not future.done():
            problem = f"could not be compiled within {COMPILE_SECONDS:.0f} seconds: try again later"
            return _about(request, ConstraintError(problem, status=503))
        error = future.exception()
        if isinstance(error, ConstraintError):
            return _about(request, error)
        if error is not None:  # including a Rust panic, which is not an `Exception`: it ends this request only
            logger.error("a grammar could not be compiled", exc_info=error)
            return _about(request, ConstraintError("could not be compiled: the compiler failed", status=500))
        request.matcher = future.result().matcher()
        request.stop_ids |= request.matcher.grammar.backend.eos_ids
        return None

    def _take_job(self, request: Request) -> None:
        """Wait for the job that advances the request's matcher, and take its result."""
        matcher = _matcher(request)
        del self._advancing[request.id]
        if matcher.job is not None:
            failure, matcher.job = matcher.job.exception(), None
            if failure is not None:
                logger.error("an output could not be matched", exc_info=failure)
                matcher.error = ConstraintError("could not be enforced: the matcher failed", status=500)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def advance(self, request: Request, token: int, *, mask_needed: bool) -> bool:
        """Consume a token sampled for the request. ``mask_needed``: a launched step needs the next mask.

        Returns whether the request can be scheduled; if not, `poll` reports when it can.
        """
        matcher = _matcher(request)
        if self._compiler is None or mask_needed or not matcher.grammar.slow:
            matcher.advance(token)
            return True
        matcher.job = self._compiler.follow(partial(matcher.advance_and_compute_mask, token))
        self._advancing[request.id] = request
        return False

    def jump(self, request: Request) -> list[int]:
        """Consume and return the tokens that the grammar leaves no choice about: they need no forward pass.

        None of the request's stop tokens, and none beyond its limit.
        """
        return _matcher(request).jump(request.limit - request.num_tokens, request.stop_ids)

    def is_advancing(self, request: Request) -> bool:
        """Whether a thread uses the request's matcher, so that no other may."""
        return request.id in self._advancing

    def refusal(self, request: Request) -> InvalidRequest | None:
        """Why the request's output cannot continue, if it cannot."""
        error = _matcher(request).error
        return None if error is None else _about(request, error)

    # -- masks ---------------------------------------------------------------------------------------------------------

    def compute_masks(self, requests: Sequence[Request]) -> None:
        """Compute the masks of fast grammars in parallel, where there are enough of them to gain by it."""
        matchers = [one.matcher for one in requests if one.matcher is not None and not self.is_advancing(one)]
        unknown = [one for one in matchers if one.needs_mask and not one.forced]
        fast = [one for one in unknown if not one.grammar.slow and not one.grammar.masks_to_measure]
        if len(fast) >= PARALLEL_MASKS:
            compute_masks(fast)

    def masks(self, live: list[Request | None]) -> tuple[TokenBitmask, list[Request]]:
        """Tokens that each request may sample, uint32 [len(live), mask_words], and the requests that are put off.

        ``live``: None for a request that has ended; its mask allows everything and its token is dropped. A request
        found to have ended has `Matcher.error` or `Matcher.finished` set afterwards, and its mask allows everything.
        So does the mask of a request that is put off, which a thread computes: `poll` reports when it is known.
        """
        late: list[Request] = []
        words = 0 if self._compiler is None else self._compiler.mask_words
        masks = np.full((len(live), words), 0xFFFFFFFF, np.uint32)
        began = time.monotonic()
        self.compute_masks([request for request in live if request is not None])
        for mask, request in zip(masks, live, strict=True):
            if request is None:
                continue
            matcher = _matcher(request)
            if self.is_advancing(request):  # retracted and admitted again before its job was done
                self._take_job(request)
            slow = matcher.grammar.slow and matcher.needs_mask and not matcher.forced
            if slow and self._compiler is not None and time.monotonic() - began > STEP_SECONDS:
                matcher.job = self._compiler.follow(matcher.compute_mask)
                self._advancing[request.id] = request
                late.append(request)
                continue
            matcher.compute_mask()
            if matcher.error is None and not matcher.finished:
                mask[:] = matcher.mask
                if request.params.ignore_eos:
                    suppress(mask, matcher.grammar.backend.eos_ids)
                if request.num_outputs < request.params.min_tokens:
                    suppress(mask, request.stop_ids)
        return masks, late


def _matcher(request: Request) -> Matcher:
    if request.matcher is None:
        raise LookupError(f"request {request.id} has no matcher")
    return request.matcher


def _about(request: Request, error: ConstraintError) -> InvalidRequest:
    return InvalidRequest(request.params.constraint_kind, error.problem, status=error.status)
