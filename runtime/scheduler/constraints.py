"""The scheduler's side of constraints: requests that wait for their grammar, matchers that follow tokens, masks.

A quick grammar is followed on the engine's thread while the forward pass runs. A slow one is followed in a thread: its
requests sit out the steps until they know what may come next, and nobody else waits for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from ..constraint import KINDS, Constraint
from ..errors import InvalidRequest
from ..grammar.matcher import Grammar, Matcher, hold_open, look_together

if TYPE_CHECKING:
    from ..grammar.compiler import GrammarCompiler
    from ..grammar.llg import TokenBitmask
    from .request import Request

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 10.0  # a request waits no longer than this for its grammar
TOGETHER = 4  # masks are worth filling in parallel from here on
STEP_SECONDS = 0.05  # of one step's masks: past it, outputs of grammars that have just turned out slow are given up


class ConstraintManager:
    """All requests that have a constraint. ``compiler``: None where constraints are not served."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._compiling: dict[int, tuple[Request, Future[Grammar]]] = {}
        self._jobs: dict[int, Request] = {}  # whose matcher's job has not been taken in

    @property
    def available(self) -> bool:
        return self._compiler is not None

    @property
    def busy(self) -> bool:
        """Is there something under way that `compiled` or `settled` will tell?"""
        return bool(self._compiling or self._jobs)

    @property
    def compiling(self) -> int:
        """Requests that wait for their grammar."""
        return len(self._compiling)

    # -- compiling -----------------------------------------------------------------------------------------------------

    def begin(self, request: Request, constraint: Constraint) -> None:
        """`compiled` will tell when the request may run. Needs `available`."""
        if self._compiler is None:
            raise LookupError("there is no compiler")
        self._compiling[request.id] = request, self._compiler.compile(constraint)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._compiling.pop(request.id, None)
        self._jobs.pop(request.id, None)

    def compiled(self, now: float) -> Iterator[tuple[Request, InvalidRequest | None]]:
        """Requests that have their matcher now, or a reason why they will not get one."""
        for request, future in list(self._compiling.values()):
            if not future.done():
                if now - request.arrival <= COMPILE_SECONDS:
                    continue
                refusal = InvalidRequest(f"could not be compiled within {COMPILE_SECONDS:.0f} seconds")
                del self._compiling[request.id]
                yield request, _about(request, refusal)
                continue
            del self._compiling[request.id]
            error = future.exception()
            if error is None:
                request.matcher = future.result().matcher()
                if self._compiler is not None:
                    request.stop_ids |= self._compiler.eos_ids
                yield request, None
            elif isinstance(error, InvalidRequest):
                yield request, _about(request, error)
            else:  # be it a panic of Rust's, which is no `Exception`: it is this request's end and nobody else's
                logger.error("a grammar could not be compiled", exc_info=error)
                yield request, _about(request, InvalidRequest("could not be compiled: the compiler broke", status=500))

    # -- following -----------------------------------------------------------------------------------------------------

    def follow(self, request: Request, token: int, *, wanted: bool) -> bool:
        """Takes in a token that the request drew. ``wanted``: a step that is launched waits for the next mask.

        Returns whether the request can be scheduled; if not, `settled` will tell when.
        """
        matcher = _matcher(request)
        if self._compiler is None or wanted or not matcher.grammar.slow:
            matcher.advance(token)
            return True
        matcher.job = self._compiler.run(matcher, token)
        self._jobs[request.id] = request
        return False

    def jump(self, request: Request) -> list[int]:
        """Takes in the tokens that the request's output cannot do without: no forward pass is needed to know them.

        None that could end it by its stop tokens, and none beyond its limit.
        """
        return _matcher(request).jump(request.limit - request.num_tokens, request.stop_ids)

    def under_way(self, request: Request) -> bool:
        """Whether a thread is at the request's matcher: nobody else looks at it then."""
        return request.id in self._jobs

    def settled(self) -> Iterator[Request]:
        """Requests that know now what may come next, or that they have ended."""
        for request in list(self._jobs.values()):
            job = _matcher(request).job
            if job is None or job.done():
                self._settle(request)
                yield request

    def _settle(self, request: Request) -> None:
        matcher = _matcher(request)
        del self._jobs[request.id]
        if matcher.job is not None:
            broken, matcher.job = matcher.job.exception(), None
            if broken is not None:
                logger.error("an output could not be followed", exc_info=broken)
                matcher.error = InvalidRequest("could not be enforced: the matcher broke", status=500)

    def refusal(self, request: Request) -> InvalidRequest | None:
        """Why the request's output cannot go on, if it cannot."""
        error = _matcher(request).error
        return None if error is None else _about(request, error)

    def look(self, requests: Sequence[Request]) -> None:
        """Where several quick grammars must say what may come next, they do so in parallel."""
        matchers = [one.matcher for one in requests if one.matcher is not None and not self.under_way(one)]
        unsure = [one for one in matchers if one.blank and not one.forced]
        quick = [one for one in unsure if not one.grammar.slow and not one.grammar.alone]
        if len(quick) >= TOGETHER:
            look_together(quick)

    # -- masks ---------------------------------------------------------------------------------------------------------

    def masks(self, live: list[Request | None]) -> TokenBitmask:
        """Bits [len(live), words] of the tokens that each may draw.

        ``live``: the request of each, or None if it has ended: then anything goes, and is dropped. A request that is
        found to have ended has `Matcher.error` or `Matcher.finished` set afterwards, and all bits too.
        """
        words = 0 if self._compiler is None else self._compiler.words
        masks = np.full((len(live), words), 0xFFFFFFFF, np.uint32)
        began = time.monotonic()
        self.look([request for request in live if request is not None])
        for mask, request in zip(masks, live, strict=True):
            if request is None:
                continue
            matcher = _matcher(request)
            if request.id in self._jobs:  # retracted and back before its thread was done
                self._settle(request)
            if matcher.grammar.slow and time.monotonic() - began > STEP_SECONDS:
                matcher.error = InvalidRequest("is too slow to be enforced for so many outputs at once")
            matcher.look()
            if matcher.error is None and not matcher.finished:
                mask[:] = matcher.mask
                if request.params.ignore_eos and self._compiler is not None:
                    hold_open(mask, self._compiler.eos_ids)
                if request.num_outputs < request.params.min_tokens:
                    hold_open(mask, request.stop_ids)
        return masks


def _matcher(request: Request) -> Matcher:
    if request.matcher is None:
        raise LookupError(f"request {request.id} has no matcher")
    return request.matcher


def _about(request: Request, error: InvalidRequest) -> InvalidRequest:
    """``error``, in a sentence about the field that the client sent."""
    params = request.params
    field = params.constraint_name or next((kind for kind in KINDS if getattr(params, kind) is not None), "constraint")
    return InvalidRequest(f"{field} {error.message}", field=field, status=error.status)
