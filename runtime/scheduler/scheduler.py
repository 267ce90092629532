"""Requests come in, steps go out, results come back, messages leave. Owns the tree and everybody's state."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np

from ...radix.tree import RadixTree
from ..config import EngineConfig
from ..errors import InvalidRequest
from ..limits import check_token_ids, fit
from ..logprobs import pack as pack_logprobs
from ..messages import (
    Finished,
    FinishReason,
    Generate,
    Limits,
    Opened,
    PromptLogprobs,
    Stats,
    StepOutput,
)
from ..sampling_params import MAX_SEED
from ..step import StepResult
from .draft import ScheduledStep
from .ledger import Ledger
from .planner import Planner
from .request import Request, Status

_TAIL = 8  # prompt tokens the detokenizer is primed with


class Scheduler:
    """Pure of torch and I/O: `plan` and `complete` are driven by `EngineCore`, or by a test.

    Every request added ends in exactly one `Finished`, whatever happens to it.
    """

    def __init__(
        self,
        config: EngineConfig,
        limits: Limits,
        *,
        num_pages: int,
        max_rows: int,
        max_batched_tokens: int,
        eos_ids: tuple[int, ...] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.tree = RadixTree(
            num_pages,
            page_size=config.page_size,
            policy=config.eviction_policy,
            enabled=not config.disable_radix_cache,
        )
        self.ledger = Ledger(self.tree, max_rows)
        self.planner = Planner(self.ledger, policy=config.schedule_policy, max_batched_tokens=max_batched_tokens)
        self._eos_ids = eos_ids
        self._now = now
        self._seeds = random.Random(config.seed)
        self._live: dict[int, Request] = {}
        self._out = StepOutput()
        self._totals = Stats(pages_total=num_pages, page_size=config.page_size)

    # -- in ------------------------------------------------------------------------------------------------------------

    def add(self, message: Generate) -> None:
        """Queues a request. One that can never be served is answered with an ``error`` at once."""
        if message.id in self._live:
            raise ValueError(f"request id {message.id} is in use")
        tokens = np.frombuffer(message.tokens, dtype="<i4")
        try:
            params = fit(len(tokens), message.params, self.limits)
            if tokens.min() < 0 or tokens.max() >= self.limits.vocab_size:
                check_token_ids(tokens.tolist(), self.limits.vocab_size, "prompt")
        except InvalidRequest as error:
            self._out.opened.append(Opened(message.id, len(tokens), b"", message.params))
            self._out.finished.append(
                Finished(
                    message.id,
                    "error",
                    prompt_tokens=len(tokens),
                    error=error.message,
                    error_field=error.field,
                    status=error.status,
                )
            )
            return
        seed = message.params.seed
        if seed is None:
            seed = self._seeds.randrange(MAX_SEED)
        request = Request(message, seed=seed, max_tokens=params.max_tokens or 0, eos_ids=self._eos_ids)
        request.arrival, request.arrival_clock = self._now(), self.ledger.clock
        request.hit_estimate = self.tree.peek(request.tokens, request.namespace, request.reuse_limit)
        self._live[request.id] = self.ledger.waiting[request.id] = request
        self._totals.prompt_tokens += request.prompt_len
        echo = request.echo_tokens or request.params.prompt_logprobs is not None
        self._out.opened.append(
            Opened(
                request.id,
                request.prompt_len,
                request.prompt[-_TAIL:].tobytes(),
                request.params,
                request.prompt.tobytes() if echo else None,
            )
        )

    def abort(self, request_id: int, reason: FinishReason = "abort") -> None:
        """Ends a request early; nothing happens if it has ended or was never here."""
        request = self._live.get(request_id)
        if request is not None:
            self._finish(request, reason)

    # -- one step ------------------------------------------------------------------------------------------------------

    def plan(self) -> ScheduledStep | None:
        step = self.planner.plan()
        for request in self.planner.served:
            self._first_scheduled(request)
            self._finish(request, "length")
        self.planner.served.clear()
        if step is not None:
            self._totals.steps += 1
            for start in step.plan.starts:
                self._first_scheduled(self.ledger.rows.request(start.row))
            self._totals.computed_tokens += step.prompt_tokens
        return step

    def _first_scheduled(self, request: Request) -> None:
        if not request.opened and request.cache is not None:
            request.opened = True
            request.queue_seconds = self._now() - request.arrival
            self._out.cache[request.id] = request.cache
            self._out.queue_seconds[request.id] = request.queue_seconds
            self._totals.cached_tokens += request.cache.hit_tokens

    def complete(self, step: ScheduledStep, result: StepResult) -> None:
        """Takes in what a launched step produced. Steps complete in launch order.

        Tokens of requests that have ended meanwhile are dropped; those of requests that were retracted meanwhile
        are kept: they were drawn from the right context.
        """
        self.tree.end_step(step.plan.step)
        for i, (start, rows) in result.prompt_logprobs.items():
            request = step.prompt_logprobs[i]
            if request.status is not Status.FINISHED:
                self._out.prompt_logprobs.append(PromptLogprobs(request.id, start, pack_logprobs(rows)))
        ids: list[int] = []
        drawn: list[int] = []
        page = self.tree.page_size
        r = self.ledger.rows
        ended: list[tuple[Request, FinishReason, int | None]] = []
        for i, (request, token) in enumerate(zip(step.sampled, result.tokens.tolist(), strict=True)):
            if request.status is Status.FINISHED:
                continue
            request.append(token)
            ids.append(request.id)
            drawn.append(token)
            if i in result.logprobs:
                self._out.logprobs[request.id] = pack_logprobs(result.logprobs[i])
            known = request.num_tokens
            row = request.row
            if row >= 0 and r.length[row] == known:  # else a later step is in flight and holds the value
                r.last_token[row] = token
            if token in request.stop_ids:
                ended.append((request, "stop", token))
            elif known == request.limit:
                ended.append((request, "length", None))
            elif row >= 0 and (known - 1) % page == 0:
                swap = self.ledger.publish(request, known - 1)
                if swap is not None:
                    self.ledger.swap([swap])
        self._out.ids += np.array(ids, dtype="<i8").tobytes()
        self._out.tokens += np.array(drawn, dtype="<i4").tobytes()
        self._totals.generated_tokens += len(ids)
        for request, reason, matched in ended:
            self._finish(request, reason, matched=matched)
        for request in step.finishing:
            self._finish(request, "length")

    def _finish(
        self, request: Request, reason: FinishReason, *, matched: int | None = None, error: str | None = None
    ) -> None:
        """The one end of every request."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self.ledger.leave(request, keep=reason != "error")
        else:
            self.ledger.waiting.pop(request.id, None)
        request.status = Status.FINISHED
        del self._live[request.id]
        if reason in ("stop", "length"):
            self.planner.estimator.finished(request.num_outputs, request.limit - request.prompt_len)
        self._totals.finished += 1
        self._out.finished.append(
            Finished(
                request.id,
                reason,
                prompt_tokens=request.prompt_len,
                completion_tokens=request.num_outputs,
                cache=request.cache,
                matched=matched,
                error=error,
                retractions=request.retractions,
                queue_seconds=request.queue_seconds,
            )
        )

    def fail_running(self, error: str) -> None:
        """A step broke: everything it may have touched is worthless. Running requests end with ``error`` and the
        tree forgets all it knows; waiting requests stay."""
        for request in self.ledger.rows.running():
            self._finish(request, "error", error=error)
        self.tree.end_step(self.tree.begin_step())  # whatever was in flight has ended, one way or another
        self.tree.flush()

    def fail_oldest(self, error: str) -> None:
        """Breaks a stalemate that the rules above should make impossible."""
        candidates = self.ledger.rows.running() or list(self.ledger.waiting.values())
        self._finish(candidates[0], "error", error=error)

    # -- out -----------------------------------------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        return bool(self._live)

    def take_output(self) -> StepOutput | None:
        """Everything said since the last call, or None."""
        out = self._out
        if not (out.opened or out.ids or out.finished or out.cache or out.prompt_logprobs):
            return None
        self._out = StepOutput()
        return out

    def stats(self) -> Stats:
        totals, tree = self._totals, self.tree
        totals.running = len(self.ledger.rows)
        totals.waiting = len(self.ledger.waiting)
        totals.pages_free = tree.allocator.free
        totals.pages_cached = tree.evictable
        totals.evicted_pages = tree.evicted_total
        totals.retractions = self.ledger.retractions
        return totals
