"""Takes requests and step results, makes step plans and output messages. Owns the tree and all request state."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..config import EngineConfig
from ..errors import InvalidRequest
from ..grammar.compiler import GrammarCompiler
from ..limits import check_token_ids, fit
from ..logprobs import pack as pack_logprobs
from ..messages import (
    Finished,
    FinishReason,
    Generate,
    Limits,
    PromptLogprobs,
    Refusal,
    RequestStarted,
    Stats,
    StepOutput,
)
from ..sampling_params import MAX_SEED
from ..step import NON_FINITE, StepResult, TokenLogprobs
from ..tiers.copies import Ended
from .cache.service import CacheService
from .clock import Clock
from .constraints import ConstraintEvents, ConstraintManager
from .ledger import Ledger
from .memory import LowerTiers, make_tree
from .planner import Planner
from .request import Request, Status
from .rows import DECODE
from .scheduled_step import ScheduledStep
from .totals import update_stats

logger = logging.getLogger(__name__)

_TAIL = 8  # last prompt tokens sent to the detokenizer, which needs them to decode the first output
_NO_EVENTS = ConstraintEvents()
_ENDS_TOGETHER = 8  # requests that one step ends, after which `Scheduler.send_early` gets their output
_WORTH_A_STEP = 2  # forced tokens: with more, skip a step (where steps overlap) to append them at once


class Scheduler:
    """Driven by `EngineCore`, or by a test, through `add`, `poll`, `plan` and `complete`. No torch and no I/O.

    Every request added ends with exactly one `Finished`. Plans are deterministic: the same calls with the same
    messages, `ConstraintEvents`, results and clock readings (``now``: seconds, read by `Clock.tick`) make the same
    plans.
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
        grammars: GrammarCompiler | None = None,
        lower: LowerTiers | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = Clock(now)
        self.limits = limits
        self.tree, self.tiers = make_tree(config, num_pages, lower, self.clock)
        self.cache = CacheService(self.tree, config, self.clock, self.tiers.jobs)
        self.ledger = Ledger(self.tree, max_rows)
        self.ledger.pin_breakpoints = self.cache.pin_breakpoints
        self.planner = Planner(
            self.ledger, policy=config.schedule_policy, max_batched_tokens=max_batched_tokens, tiers=self.tiers
        )
        self._eos_ids = eos_ids
        self._constraints = ConstraintManager(grammars)
        self._jump_forward = config.jump_forward
        self._seeds = random.Random(config.seed)
        self._live: dict[int, Request] = {}
        self.output = StepOutput()  # since the last `take_output`
        self.send_early: Callable[[StepOutput], None] | None = None  # see `_finish_all`
        self._totals = Stats(pages_total=num_pages, page_size=config.page_size)

    # -- input ---------------------------------------------------------------------------------------------------------

    def add(self, message: Generate) -> None:
        """Queues every sample of a prompt. If it can never be served, all of them end with an ``error``."""
        self.clock.tick()
        prompt = np.frombuffer(message.tokens, dtype="<i4").astype(np.int32, copy=False)
        try:
            params = fit(len(prompt), message.params, self.limits)
            check_token_ids(prompt, self.limits.vocab_size, "prompt")
        except InvalidRequest as error:
            for id in message.ids:
                self.refuse(id, error)
            return
        for i, id in enumerate(message.ids):
            self.submit(
                Request(
                    id,
                    prompt,
                    params.sample(i),
                    namespace=message.namespace,
                    priority=message.priority,
                    stream=message.stream,
                    echo_from=0 if message.echo_tokens else None,
                    breakpoints=message.breakpoints,
                    no_cache=message.no_cache,
                )
            )

    def submit(self, request: Request) -> None:
        """Queues a request whose prompt and limits have been checked."""
        if request.id in self._live:
            raise ValueError(f"request id {request.id} is in use")
        params = request.params
        if request.seed < 0:
            request.seed = self._seeds.randrange(MAX_SEED)
        if not params.ignore_eos:
            request.stop_ids = request.stop_ids.union(self._eos_ids)
        request.arrival, request.arrival_clock = self.clock(), self.ledger.clock
        request.hit_estimate = self.tree.peek(request.tokens, request.namespace, request.reuse_limit)
        self._live[request.id] = request
        self.ledger.owners[request.namespace[0]] += 1
        self._totals.prompt_tokens += request.prompt_len
        echo_from = 0 if request.echo_from is None and params.prompt_logprobs is not None else request.echo_from
        self.output.started.append(
            RequestStarted(
                request.id,
                request.prompt_len,
                request.prompt[-_TAIL:].tobytes(),
                params.without_constraint(),
                None if echo_from is None else request.prompt[echo_from:].tobytes(),
                request.stream,
                request.settle,
            )
        )
        constraint = params.constraint
        if constraint is None:
            self.ledger.waiting[request.id] = request
        elif self._constraints.available:
            request.status = Status.COMPILING
            self._constraints.compile(request, constraint)
        else:
            refusal = InvalidRequest(None, "this engine has no tokenizer, so it cannot constrain outputs")
            self._finish(request, "error", error=refusal)

    def refuse(self, request_id: int, error: InvalidRequest) -> None:
        """Ends a request that was never added with an ``error``."""
        self.output.finished.append(Finished(request_id, "error", error=Refusal.of(error)))

    def refuse_aborted(self, request_id: int) -> None:
        """Ends a request whose client left before it was added."""
        self.output.finished.append(Finished(request_id, "abort"))

    def abort(self, request_id: int, reason: FinishReason = "abort") -> None:
        """Ends a request early. Does nothing if it has ended or is unknown."""
        request = self._live.get(request_id)
        if request is not None:
            self._finish(request, reason)

    # -- one step ------------------------------------------------------------------------------------------------------

    def poll(self) -> ConstraintEvents:
        """Collects the results of grammar threads, for the next `plan`. Reads the clock."""
        self.clock.tick()
        return self._constraints.poll(self.clock())

    def plan(self, events: ConstraintEvents = _NO_EVENTS, copies: Sequence[Ended] = ()) -> ScheduledStep | None:
        """The next step, or None if nothing can run now. It must be launched, in order, after `TierManager.begin`.

        ``events``: which grammars and masks became ready since the last plan. Grammar threads are not polled here.
        ``copies``: the copies between memory tiers that have ended, from `TierManager.poll`.
        """
        self._apply(events)
        self.tiers.apply(copies)
        step = self.planner.plan()
        for request, position, rows in self.planner.scores.recalled:
            self._deliver_prompt_logprobs(request, position, rows)
        self.planner.scores.recalled.clear()
        for request in self.planner.served:
            self._first_scheduled(request)
            self._finish(request, "length")
        self.planner.served.clear()
        if step is not None:
            self._totals.steps += 1
            for start in step.plan.starts:
                self._first_scheduled(self.ledger.rows.request(start.row))
            self._totals.computed_tokens += step.prompt_tokens
            for i in step.plan.constrained.tolist():
                request = step.sampled[i]
                if request is not None and request.matcher is not None and request.matcher.grammar.slow:
                    self.ledger.rows.blocked[request.row] = True
        return step

    def masks(self, step: ScheduledStep) -> npt.NDArray[np.uint32]:
        """The tokens that the step's constrained samples may sample, for `PendingStep.sample`. Every earlier step must
        have been completed: what is allowed depends on the tokens before."""
        indices = step.plan.constrained.tolist()
        requests = [step.sampled[i] for i in indices]
        live = [None if one is None or one.status is Status.FINISHED else one for one in requests]
        masks, late = self._constraints.masks(live)
        for i, request in zip(indices, live, strict=True):
            if request in late:
                step.sampled[i] = None
                self._put_off(request)
            elif request is not None:
                self._end_matched(request)
                if self._may_jump(request) and request.matcher and len(request.matcher.forced) > _WORTH_A_STEP:
                    self.ledger.rows.blocked[request.row] = True  # until `complete` jumps: a step launched before
                    # could not include the forced tokens
        return masks

    def _put_off(self, request: Request) -> None:
        """Takes the request out of the running ones until a thread has computed its mask. What it has stays cached."""
        self.ledger.retract(request)
        del self.ledger.waiting[request.id]
        request.status = Status.COMPILING

    def _apply(self, events: ConstraintEvents) -> None:
        """Queue requests whose grammar is compiled, and unblock those whose mask is known."""
        for request, refusal in events.compiled:
            if request.status is not Status.COMPILING:
                continue  # aborted since the poll
            if refusal is not None:
                self._finish(request, "error", error=refusal)
            else:
                request.status = Status.WAITING
                self.ledger.waiting[request.id] = request
        for request in events.advanced:
            if request.row >= 0:
                self.ledger.rows.blocked[request.row] = False
                if self._may_jump(request) and self._is_idle(request):
                    self._emit(request, self._jump(request))
            elif request.status is Status.COMPILING:
                request.status = Status.WAITING
                self.ledger.waiting[request.id] = request
            self._end_matched(request)

    def _end_matched(self, request: Request) -> None:
        """Finish a request whose grammar allows no further token.

        An output that reached the limits on what can be enforced ends like one that reached its number of tokens: what
        was sent is the beginning of a valid one.
        """
        if request.matcher is None:
            return
        error = request.matcher.error
        if error is not None and error.status < 500 and request.num_outputs:
            logger.info("request %d ends after %d tokens: its grammar %s", request.id, request.num_outputs, error)
            self._finish(request, "length")
        elif error is not None:
            self._finish(request, "error", error=self._constraints.refusal(request))
        elif request.matcher.finished:
            self._finish(request, "stop")

    def _first_scheduled(self, request: Request) -> None:
        if not request.opened and request.cache is not None:
            request.opened = True
            request.queue_seconds = self.clock() - request.arrival
            self.output.cache[request.id] = request.cache
            self.output.queue_seconds[request.id] = request.queue_seconds
            self._totals.cached_tokens += request.cache.hit_tokens
            self.cache.begun(request)
            self.tiers.used(request.namespace, request.prompt[: request.cache.hit_tokens])

    def complete(self, step: ScheduledStep, result: StepResult) -> None:
        """Applies the result of a launched step. Steps complete in launch order.

        Tokens of requests that have ended meanwhile are dropped. Those of requests retracted meanwhile are kept: they
        were sampled from the right context.
        """
        self.clock.tick()
        self.tree.end_step(step.plan.step)
        self.tiers.step_ended(step.prompt_tokens, step.plan.num_tokens)
        self._totals.kv_bytes += result.kv_bytes
        self._totals.kv_bytes_saved += result.kv_bytes_saved
        for i, (start, rows) in result.prompt_logprobs.items():
            scored = step.prompt_logprobs[i]
            if scored.status is Status.FINISHED:
                continue
            if np.isnan(rows.chosen).any():
                self._fail_not_finite(scored, "the prompt")
                continue
            self.planner.scores.record(scored, start, rows)
            self._deliver_prompt_logprobs(scored, start, rows)
        failed = {i for i, rows in result.logprobs.items() if np.isnan(rows.chosen[0])}
        for i in sorted(failed.union(np.flatnonzero(result.tokens == NON_FINITE).tolist())):
            request = step.sampled[i]
            if request is not None and request.status is not Status.FINISHED:
                self._fail_not_finite(request, f"output token {request.num_outputs + 1}")
        ids: list[int] = []
        sampled_tokens: list[int] = []
        ended: list[tuple[Request, FinishReason, int | None]] = []
        constrained: list[Request] = []
        finished = Status.FINISHED
        for request, token in zip(step.sampled, result.tokens.tolist(), strict=True):
            if request is None or request.status is finished:
                continue
            request.append(token)
            ids.append(request.id)
            sampled_tokens.append(token)
            if token in request.stop_ids:
                ended.append((request, "stop", token))
            elif request.matcher is not None:
                self._advance(request, token)
                constrained.append(request)
            elif request.num_tokens == request.limit:
                ended.append((request, "length", None))
        for i, rows in result.logprobs.items():
            request = step.sampled[i]
            if request is not None and request.status is not finished:
                self.output.logprobs[request.id] = pack_logprobs(rows)
        kept = self.ledger.take_in(step, result.tokens)
        for request in self._jump_all(constrained, ids, sampled_tokens):
            if request.num_tokens == request.limit:
                ended.append((request, "length", None))
        self.ledger.publish_decodes(step, kept)
        self.output.ids += np.array(ids, dtype="<i8").tobytes()
        self.output.tokens += np.array(sampled_tokens, dtype="<i4").tobytes()
        self._totals.generated_tokens += len(ids)
        self._finish_all(ended)
        for request in constrained:
            if not self._constraints.is_advancing(request):
                self._end_matched(request)
        for request in step.finishing:
            self._finish(request, "length")

    def _deliver_prompt_logprobs(self, request: Request, start: int, rows: TokenLogprobs) -> None:
        k = request.params.prompt_logprobs or 0
        asked = TokenLogprobs(rows.chosen, rows.ranks, rows.top_ids[:, :k], rows.top[:, :k])
        self.output.prompt_logprobs.append(PromptLogprobs(request.id, start, pack_logprobs(asked)))

    # -- grammars ------------------------------------------------------------------------------------------------------

    def _advance(self, request: Request, token: int) -> None:
        """Advance the request's matcher by the token."""
        row, rows = request.row, self.ledger.rows
        in_flight = row >= 0 and rows.length[row] != request.num_tokens
        ready = self._constraints.advance(request, token, mask_needed=in_flight)
        if row >= 0 and request.matcher is not None:
            # A slow grammar skips the step after the one in flight, whose token a thread will consume.
            rows.blocked[row] = not ready or (in_flight and request.matcher.grammar.slow)

    def _may_jump(self, request: Request) -> bool:
        return self._jump_forward and request.jumps and request.row >= 0

    def _is_idle(self, request: Request) -> bool:
        """Whether no step in flight samples the request's next token, and no thread advances its matcher."""
        rows, row = self.ledger.rows, request.row
        still = rows.phase[row] == DECODE and rows.length[row] == request.num_tokens
        return bool(still) and not self._constraints.is_advancing(request)

    def _jump_all(self, constrained: list[Request], ids: list[int], sampled_tokens: list[int]) -> list[Request]:
        """`_jump` for all; appends their tokens to ``ids`` and ``sampled_tokens``. Returns those that continue."""
        free = [request for request in constrained if self._may_jump(request) and self._is_idle(request)]
        self._constraints.compute_masks(free)
        for request in free:
            tokens = self._jump(request)
            ids += [request.id] * len(tokens)
            sampled_tokens += tokens
        return [
            one for one in constrained if one.matcher and (self._constraints.is_advancing(one) or not one.matcher.ended)
        ]

    def _jump(self, request: Request) -> list[int]:
        """Jump-forward decoding (SGLang): appends the tokens that the grammar forces, as if they had been sampled.

        Their KV is computed in one pass with the token before them. Returns the tokens.

        Requires `_is_idle` and `_may_jump`.
        """
        tokens = self._constraints.jump(request)
        if tokens:
            for token in tokens:
                request.append(token)
            request.jumped += len(tokens)
            self.ledger.rows.lengthen(request)
        return tokens

    def _emit(self, request: Request, tokens: list[int]) -> None:
        """Outputs tokens that were appended between two steps' results."""
        self.output.ids += np.full(len(tokens), request.id, dtype="<i8").tobytes()
        self.output.tokens += np.array(tokens, dtype="<i4").tobytes()
        self._totals.generated_tokens += len(tokens)

    def _finish_all(self, ended: list[tuple[Request, FinishReason, int | None]]) -> None:
        """Ends requests, with the token that stopped each, and hands output to `send_early` in between.

        Ending a request takes 40 µs, most of it in the tree. Clients of the first of 128 would otherwise wait for the
        last, and the device for their next requests.
        """
        # The detokenizer leaves out a stop token if it gets the token and `Finished` together: those are sent first.
        ended.sort(key=lambda end: end[1] != "stop")
        for i, (request, reason, matched) in enumerate(ended, start=1):
            self._finish(request, reason, matched=matched)
            if i % _ENDS_TOGETHER == 0 and i < len(ended) and ended[i][1] != "stop" and self.send_early is not None:
                self.send_early(self.output)
                self.output = StepOutput()

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        matched: int | None = None,
        error: InvalidRequest | None = None,
    ) -> None:
        """Ends a request: the only way."""
        if request.status is Status.FINISHED:
            return
        if request.status is Status.RUNNING:
            self.cache.leaving(request, int(self.ledger.rows.computed[request.row]))
            self.ledger.leave(request, keep=reason != "error")
        else:
            self.ledger.waiting.pop(request.id, None)
        self._constraints.forget(request)
        self.tiers.forget(request.id)
        request.status = Status.FINISHED
        self.cache.ended(request, well=reason in ("stop", "length"))
        del self._live[request.id]
        self.ledger.left(request)
        if reason in ("stop", "length"):
            self.planner.estimator.finished(request.num_outputs, request.limit - request.prompt_len)
        self._totals.finished += 1
        self._totals.jumped_tokens += request.jumped
        self.output.finished.append(
            Finished(
                request.id,
                reason,
                prompt_tokens=request.prompt_len,
                completion_tokens=request.num_outputs,
                cache=request.cache,
                matched=matched,
                error=None if error is None else Refusal.of(error),
                retractions=request.retractions,
                jumped_tokens=request.jumped,
                queue_seconds=request.queue_seconds,
            )
        )
        if request.on_end is not None:
            request.on_end(request)

    def _fail_not_finite(self, request: Request, where: str) -> None:
        """Ends a request whose logits hold NaN, and removes its prefix from the tree: in a prompt chunk, NaN in the
        value of one token reaches the tokens before it, since attention multiplies what it masks by zero."""
        reason = "its weights are damaged, or overflow in this dtype"
        problem = f"the model's logits for {where} are NaN or infinite: {reason}"
        self._finish(request, "error", error=InvalidRequest(None, problem, status=500))
        cached = self.tree.peek(request.tokens, request.namespace, request.num_tokens)
        self.tree.prune(request.tokens[:cached], request.namespace)

    def fail_running(self, error: str, dropped: Sequence[ScheduledStep] = ()) -> None:
        """A step failed, so the KV of whatever it touched is invalid: running requests end with ``error``, and the tree
        is flushed. Waiting requests stay, except those whose prompt logprobs a ``dropped`` step (launched, and its
        result lost) would have delivered: no later step will."""
        scored = [request for step in dropped for request in step.prompt_logprobs.values()]
        for request in [*self.ledger.rows.running(), *scored]:
            self._finish(request, "error", error=InvalidRequest(None, error, status=500))
        if self.ledger.hold_owner is not None:
            self.ledger.hold_owner.forget()
        self.cache.pins.forget()
        self.tree.end_step(self.tree.begin_step())  # whatever was in flight has ended
        self.tiers.distrust()
        self.tree.flush(keep_disk=True)

    def fail_one(self, error: str) -> None:
        """Ends one request, a last resort when none can advance: of waiting ones, one that was found not to fit."""
        waiting = self.planner.misfit or next(iter(self._live.values()))
        stuck = next(iter(self.ledger.rows.running()), waiting)
        status = 503 if self.cache.pins.pages else 500  # 503: there is room again when pins expire
        self._finish(stuck, "error", error=InvalidRequest(None, error, status=status))

    # -- output --------------------------------------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        return bool(self._live)

    @property
    def waits_outside(self) -> bool:
        """Whether grammar threads or copies between memory tiers will make a request schedulable, though none may be
        now."""
        return self._constraints.busy or self.tiers.busy

    def take_output(self) -> StepOutput | None:
        """All output since the last call, or None."""
        output, self.output = self.output, StepOutput()
        return output or None

    def stats(self) -> Stats:
        """The present counters. The same object is updated by the next call."""
        waiting = len(self.ledger.waiting) + self._constraints.compiling
        return update_stats(self._totals, self.ledger, waiting, self.cache.pins, self.tiers)
