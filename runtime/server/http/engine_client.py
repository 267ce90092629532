"""The HTTP process's side of the engine: it sends requests, and hands the deltas of each to its `EngineCall`.

An `EngineCall` is one HTTP request and owns all of its engine requests (prompts × n). An engine request counts against
the limit of the queue until its terminal message has arrived, also after its client has left: until then the engine
still has it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ...errors import EngineDead, InvalidRequest, Overloaded, TimedOut
from ...messages import (
    Abort,
    BranchOp,
    BranchRun,
    Control,
    ControlReply,
    ControlWhat,
    Delta,
    Generate,
    Limits,
    Message,
    Refusal,
)
from .plumbing import request_log
from .plumbing.metrics import Metrics
from .plumbing.request_log import RequestRecord

# leaving: /health says so, and requests are still taken
ServerState = Literal["starting", "ready", "leaving", "draining", "restarting", "dead"]

CONTROL_SECONDS = 30.0
ENDS = 8  # requests: their responses take about a millisecond

Batch = list[tuple[int, Delta]]  # (index of the engine request within its call, delta)


class EngineCall:
    """The engine requests of one HTTP request, in order: prompt by prompt, sample by sample.

    Leaving the context aborts those that have not finished. Only one task may wait for a call.
    """

    def __init__(self, client: EngineClient, ids: range, record: RequestRecord | None = None) -> None:
        self._client = client
        self.prompts: list[int] = []  # of several: the prompt of each engine request
        self.ids = ids
        self._open = set(ids)
        self._pending: Batch = []
        self._waiter: asyncio.Future[None] | None = None
        self._until_all = False  # wake the waiter only when all have finished
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._record = record

    async def batch(self) -> Batch:
        """Waits for deltas; returns those that have arrived since the last call, none once all have finished.

        Raises `InvalidRequest`, `EngineDead`, `TimedOut` or `ClientGone`.
        """
        if not self._pending and self._open and self._error is None:
            await self._wait(until_all=False)
        return self._take()

    async def all(self) -> Batch:
        """Waits until all have finished; returns every delta. Raises as `batch` does."""
        if self._open and self._error is None:
            await self._wait(until_all=True)
        return self._take()

    @property
    def finished(self) -> bool:
        return not self._open

    def end_within(self, seconds: float) -> None:
        """Aborts what has not finished after ``seconds`` and makes the call fail with `TimedOut`."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._time_out, seconds)

    def _time_out(self, seconds: float) -> None:
        if self._open:
            self.fail(TimedOut(f"the request did not finish within the {seconds:g} s it may take (--request-timeout)"))
            self.close()

    def fail(self, error: Exception) -> None:
        """Makes the waiting task, or the next one that waits, get ``error``."""
        if self._error is None:
            self._error = error
        self._wake()

    def push(self, delta: Delta) -> None:
        if self._record is not None:
            self._record.add(delta)
        if delta.finish is not None:
            self._open.discard(delta.id)
            if delta.finish.reason == "error":
                refusal = delta.finish.error or Refusal(None, "the request failed", 500)
                error = refusal.error()
                if self.prompts:
                    error = error.renamed({"prompt": f"prompt[{self.prompts[delta.id - self.ids.start]}]"})
                self.fail(Overloaded(error.message) if error.status == 503 else error)
        self._pending.append((delta.id - self.ids.start, delta))
        if not self._until_all or not self._open:
            self._wake()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._client.abandon(self._open)
        self._open.clear()

    def __enter__(self) -> EngineCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _wait(self, until_all: bool) -> None:
        self._until_all = until_all
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> Batch:
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback refers to this call, and to the request's body
        taken, self._pending = self._pending, []
        return taken


@dataclass(slots=True)
class _InFlight:
    """One engine request. ``call`` is None once the client has left."""

    call: EngineCall | None
    owner: str  # of its namespace: whose API key it came with
    label: str | None  # by which its client may abort it
    arrived: float  # monotonic seconds
    last: float = 0.0  # when its latest token arrived; 0: none yet


class EngineClient:
    """Sends requests to the engine's processes and hands their deltas to calls.

    ``to_tokenizer`` and ``to_scheduler`` deliver messages in order; they must not block. ``request_timeout``: seconds a
    call may take. ``max_requests_per_key``: how many of ``max_requests`` one API key may have unfinished.
    """

    def __init__(
        self,
        to_tokenizer: Callable[[Sequence[Message]], None],
        to_scheduler: Callable[[Sequence[Message]], None],
        max_requests: int,
        metrics: Metrics,
        request_timeout: float | None = None,
        max_requests_per_key: int | None = None,
    ) -> None:
        self._to_tokenizer = to_tokenizer
        self._to_scheduler = to_scheduler
        self._max_requests = max_requests
        self._metrics = metrics
        self._request_timeout = request_timeout
        self._max_requests_per_key = max_requests_per_key
        self._next_id = 1
        self._control_ids = itertools.count(1)
        self._in_flight: dict[int, _InFlight] = {}
        self._unfinished: Counter[str] = Counter()  # requests in flight by owner
        self._controls: dict[int, asyncio.Future[ControlReply]] = {}
        self._late: dict[int, BranchOp] = {}  # that make branches, and for whose answers nobody waits any more
        self._deltas: deque[Delta] = deque()  # that have arrived and are still to be handed out
        self._ends = 0  # requests whose ends were handed out since the last `_resume`
        self._limits: Limits | None = None
        self.state: ServerState = "starting"

    # -- requests ------------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """The model's limits. Raises `Overloaded` before the engine is ready."""
        if self._limits is None:
            raise self.unavailable()
        return self._limits

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def oldest_arrival(self) -> float | None:
        """When the oldest unfinished request arrived, in monotonic seconds."""
        return next((request.arrived for request in self._in_flight.values()), None)

    def ready(self, limits: Limits) -> None:
        self._limits = limits
        self._to_tokenizer([limits])
        self.state = "ready"

    def open(self, prompts: Sequence[Generate], labels: Sequence[str | None] = ()) -> EngineCall:
        """Submits prompts of one owner and assigns their ``ids``, ``params.n`` each. ``labels[i]`` is the name by which
        a client may abort prompt i; it need not be unique.

        Raises `Overloaded` if the queue is full or the server is not ready, `InvalidRequest` (429) if the owner has too
        many unfinished requests, `EngineDead` after the engine died.
        """
        owner = prompts[0].namespace[0]
        call = self._new_call(sum(prompt.params.n for prompt in prompts), owner)
        if len(prompts) > 1:
            call.prompts = [i for i, prompt in enumerate(prompts) for _ in range(prompt.params.n)]
        ids = iter(call.ids)
        messages = [
            msgspec.structs.replace(each, ids=list(itertools.islice(ids, each.params.n)), more=len(prompts) - 1 - i)
            for i, each in enumerate(prompts)
        ]
        self._to_tokenizer(messages)
        for message, label in itertools.zip_longest(messages, labels):
            self._expect(message.ids, call, owner, label)
        return call

    def open_run(self, run: BranchRun, requests: int, label: str | None = None) -> EngineCall:
        """Submits a run on a branch and assigns its ``ids``, one for each engine request. Raises as `open`."""
        owner = run.namespace[0]
        call = self._new_call(requests, owner)
        run.ids = list(call.ids)
        self._to_tokenizer([run])
        self._expect(run.ids, call, owner, label)
        return call

    def _new_call(self, count: int, owner: str) -> EngineCall:
        if self.state not in ("ready", "leaving"):
            raise self.unavailable()
        if len(self._in_flight) + count > self._max_requests:
            raise Overloaded(
                f"{len(self._in_flight)} requests are queued and {count} more would pass the limit of "
                f"{self._max_requests}; try again later"
            )
        most = self._max_requests_per_key
        if most is not None and self._unfinished[owner] + count > most:
            raise InvalidRequest(
                None,
                f"this key has {self._unfinished[owner]} unfinished requests and {count} more would pass its limit of "
                f"{most} (--max-queued-per-key); try again later",
                status=429,
                code="rate_limit_exceeded",
            )
        record = request_log.current()
        if record is not None:
            record.owner = owner
        call = EngineCall(self, range(self._next_id, self._next_id + count), record)
        self._next_id += count
        if self._request_timeout is not None:
            call.end_within(self._request_timeout)
        return call

    def _expect(self, ids: Sequence[int], call: EngineCall, owner: str, label: str | None) -> None:
        """Registers requests that have been sent. Not before: a failed send would otherwise leave them open forever."""
        now = time.monotonic()
        self._unfinished[owner] += len(ids)
        for id in ids:
            self._in_flight[id] = _InFlight(call, owner, label, now)

    def abandon(self, ids: Iterable[int]) -> None:
        """Aborts requests whose client has left. They stay in flight until the engine has confirmed it."""
        messages: list[Message] = []
        for id in sorted(ids):
            request = self._in_flight.get(id)
            if request is not None and request.call is not None:
                request.call = None
                messages.append(Abort(id))
        if self.state != "dead":
            self._to_tokenizer(messages)

    def abort(self, label: str | None, owner: str | None = None) -> int:
        """Aborts the requests with this label (None: all) of ``owner`` (None: of all); returns how many.

        Their clients get what has been generated so far.
        """
        ids = [
            id
            for id, request in self._in_flight.items()
            if label in (None, request.label) and owner in (None, request.owner)
        ]
        self._to_tokenizer([Abort(id) for id in ids])
        return len(ids)

    # -- answers -------------------------------------------------------------------------------------------------------

    def deliver(self, deltas: Iterable[Delta]) -> None:
        """Hands out deltas. The event loop reads its sockets after every `ENDS` requests that end.

        Many requests may end in one step, and their clients send as many new ones: the first of those then reaches the
        engine before the last response is written.
        """
        self._deltas.extend(deltas)
        if self._ends < ENDS:
            self._hand_out()

    def _hand_out(self) -> None:
        try:
            self._hand_out_some()
        finally:  # a fault in one request is not one of those after it
            if self._deltas or self._ends == ENDS:
                asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        self._ends = 0
        self._hand_out()

    def _hand_out_some(self) -> None:
        now = time.monotonic()
        in_flight = self._in_flight
        while self._deltas and self._ends < ENDS:
            delta = self._deltas.popleft()
            request = in_flight.get(delta.id)
            if request is None:
                continue
            if delta.tokens:
                if request.last:
                    count = len(delta.tokens) // 4
                    self._metrics.observe_token((now - request.last) / count, count)
                else:
                    self._metrics.observe_first_token(now - request.arrived)
                request.last = now
            if delta.finish is not None:
                self._ends += 1
                del in_flight[delta.id]
                self._forget(request.owner)
                self._metrics.observe_finish(delta.finish, now - request.arrived)
            if request.call is not None:
                request.call.push(delta)

    def _forget(self, owner: str) -> None:
        self._unfinished[owner] -= 1
        if not self._unfinished[owner]:
            del self._unfinished[owner]

    def fail_all(self, error: Exception) -> None:
        """Makes every call and every control request fail with ``error``."""
        calls = {id(request.call): request.call for request in self._in_flight.values() if request.call is not None}
        for call in calls.values():
            call.fail(error)
        for control in self._controls.values():
            if not control.done():
                control.set_exception(error)

    def died(self, error: EngineDead) -> None:
        """The engine has died: fails everything in flight, and everything that comes later."""
        self.state = "dead"
        self.fail_all(error)

    def lost(self, error: EngineDead) -> None:
        """The engine has died and will be replaced: fails everything in flight, and refuses requests until `ready`."""
        self.state, self._limits = "restarting", None
        self.fail_all(error)
        self._in_flight.clear()
        self._unfinished.clear()
        self._late.clear()

    # -- control -------------------------------------------------------------------------------------------------------

    async def control(self, what: ControlWhat, argument: Any = None, seconds: float = CONTROL_SECONDS) -> Any:
        """Sends a `Control` to the scheduler; returns the reply's value.

        Raises `InvalidRequest` if the scheduler refuses it, `Overloaded` if it does not answer within ``seconds``.
        """
        return await self._ask(Control(next(self._control_ids), what, argument), self._to_scheduler, seconds)

    async def operate(self, op: BranchOp) -> Any:
        """Sends an operation on a branch and assigns its ``id``; returns the reply's value. Raises as `control`;
        branches that it makes after that are deleted."""
        op.id = next(self._control_ids)
        return await self._ask(op, self._to_tokenizer, CONTROL_SECONDS)

    def delete_branches(self, owner: tuple[str, str], made: Mapping[str, Any]) -> None:
        """Deletes the branches that an operation's value names. Without an answer: nobody else has their ids."""
        ids = made.get("ids") or [made["id"]]
        self._to_tokenizer([BranchOp(next(self._control_ids), "delete", owner, id) for id in ids])

    async def _ask(
        self, question: Control | BranchOp, send: Callable[[Sequence[Message]], None], seconds: float
    ) -> Any:
        if self.state not in ("ready", "leaving", "draining"):
            raise self.unavailable()
        future: asyncio.Future[ControlReply] = asyncio.get_running_loop().create_future()
        self._controls[question.id] = future
        try:
            send([question])
            reply = await asyncio.wait_for(future, seconds)
        except TimeoutError as error:
            if isinstance(question, BranchOp) and question.what in ("create", "fork"):
                self._late[question.id] = question
            raise Overloaded(f"the scheduler did not answer {question.what} within {seconds:g} s") from error
        finally:
            del self._controls[question.id]
        if reply.error is not None:
            raise reply.error.error()
        return reply.value

    def answer(self, reply: ControlReply) -> None:
        future = self._controls.get(reply.id)
        if future is not None and not future.done():
            future.set_result(reply)
            return
        op = self._late.pop(reply.id, None)
        if op is not None and reply.error is None:
            self.delete_branches(op.namespace, reply.value)

    def unavailable(self) -> Exception:
        """The error of a request that comes in a state in which none is taken."""
        if self.state == "dead":
            return EngineDead("the engine has stopped; the server is going down")
        if self.state == "draining":
            return Overloaded("the server is shutting down")
        if self.state == "restarting":
            return Overloaded("the engine is restarting; try again later")
        return Overloaded("the model is still loading")
