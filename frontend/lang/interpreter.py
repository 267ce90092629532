"""The interpreter of one state: a queue of operations, done one after the other on the session's loop.

Appending an expression queues an operation and returns; a variable that it will set exists at once, without a value.
The first failure ends the state: operations queued after it fail with the same error. An idle state has no task.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ...runtime.errors import BranchwiseError
from ..errors import BackendError
from .errors import ProgramError
from .expressions import Chain, Expr, Gen, RoleBegin, RoleEnd, Select, Text
from .generate import run_gen
from .prompt_writer import PromptWriter
from .scoring import run_select
from .session import Path, Session
from .transcript import Close, Item, Open, Run, Transcript
from .variables import ReplayStream, Variable


@dataclass(slots=True)
class Operation:
    """``run`` finishes at once or returns what to await. ``on_failure`` is called if the operation fails or is never
    run. ``variable``: its name, for the error message."""

    run: Callable[[], Awaitable[None] | None]
    site: str
    on_failure: Callable[[BaseException], None] | None = None
    variable: str | None = None

    def fail(self, error: BaseException) -> None:
        if self.on_failure is not None:
            self.on_failure(error)


class Interpreter:
    """``path``: the forks that lead to this state; empty for the first state of a run."""

    def __init__(self, session: Session, path: Path = (), *, forked: bool = False) -> None:
        self.session = session
        self.path = path
        self.variables: dict[str, Variable] = {}
        self.inherited: dict[str, Variable] = {}  # as they were when this state was forked
        self.finished: Future[Any] = Future()  # of a run's first state: what the program returned or raised
        self.failure: ProgramError | None = None
        self.closed = False  # joined, or its run is over
        self.writer = PromptWriter(session, ReplayStream() if session.streams and not path else None)
        self._fork_log: list[Item] | None = None  # what a fork has appended since it was forked
        self._joining: list[Interpreter] = []  # states that queued operations of this one join
        self._lock = threading.Lock()
        self._arrivals: dict[str, Future[None]] = {}
        self._operations: deque[Operation] = deque()
        self._busy = forked  # a fork starts when its parent has forked
        self._woken = False  # a call of `_wake` is scheduled on the loop
        self._occurrences: Counter[str | None] = Counter()
        self._forks = 0

    # -- appending (any thread) ----------------------------------------------------------------------------------------

    def append(self, expr: Expr, site: str) -> None:
        """Never blocks. Raises `ProgramError` if this state has been joined or its run is over."""
        self.check_open(site)
        match expr:
            case Chain(parts):
                for part in parts:
                    self.append(part, site)
            case Text(text, is_special):
                self.put(Operation(lambda: self.writer.add(Run(text, is_special)), site))
            case RoleBegin(role):
                self.put(Operation(lambda: self.writer.add(Open(role)), site))
            case RoleEnd(role):
                self.put(Operation(lambda: self.writer.add(Close(role)), site))
            case Gen():
                variable = self._declare(expr.name, expr.site or site)
                seed = self.session.seed_of(self.path, expr.name, self._occurrences[expr.name])
                self._occurrences[expr.name] += 1
                self.put_for(variable, lambda: run_gen(self.writer, expr, variable, seed))
            case Select():
                variable = self._declare(expr.name, expr.site or site)
                self.put_for(variable, lambda: run_select(self.writer, expr, variable))
            case _:
                raise TypeError(f"a state takes text and expressions, not {type(expr).__name__}")

    def check_open(self, site: str) -> None:
        if self.closed:
            raise ProgramError("this state has been joined or closed; nothing can be appended to it", site=site)

    def put(self, operation: Operation) -> None:
        if self.failure is not None:
            operation.fail(self.failure)
            return
        self._operations.append(operation)
        if self.session.on_loop:
            self._wake()
        elif not self._woken:
            self._woken = True
            self.session.loop.call_soon_threadsafe(self._wake)

    def put_for(self, variable: Variable, run: Callable[[], Awaitable[None] | None]) -> None:
        """Queues the operation that sets ``variable``."""
        self.put(Operation(run, variable.site, variable.fail, variable.name))

    def ask(self, question: Callable[[Transcript], Any], site: str) -> Future[Any]:
        """The answer, once everything appended so far is done."""
        answer = Variable("", site)

        async def run() -> None:
            answer.set(question(await self.writer.open()))

        self.put_for(answer, run)
        return answer.future

    # -- variables (any thread) ----------------------------------------------------------------------------------------

    def set(self, name: str, value: Any, site: str) -> None:
        variable = Variable(name, site)
        variable.set(value)
        self.define(variable)

    def define(self, variable: Variable) -> None:
        with self._lock:
            self.variables[variable.name] = variable
            arrival = self._arrivals.pop(variable.name, None)
        if arrival is not None:
            arrival.set_result(None)

    def _declare(self, name: str | None, site: str) -> Variable:
        variable = Variable(name or "", site, ReplayStream() if self.session.streams else None)
        if name is not None:
            self.define(variable)
        return variable

    def arrival(self, name: str) -> Future[None]:
        """Done once the variable exists or the program has returned, for readers of a program that still runs."""
        with self._lock:
            if name not in self.variables and not self.finished.done():
                if name not in self._arrivals:
                    self._arrivals[name] = Future()
                    self._arrivals[name].set_running_or_notify_cancel()  # a cancelled reader must not cancel others
                return self._arrivals[name]
        arrived: Future[None] = Future()
        arrived.set_result(None)
        return arrived

    def finish(self, value: Any, error: BaseException | None = None) -> None:
        """The program has returned ``value`` or raised ``error``."""
        if error is None:
            self.finished.set_result(value)
        else:
            self.finished.set_exception(error)
        with self._lock:
            arrivals, self._arrivals = self._arrivals, {}
        for arrival in arrivals.values():
            arrival.set_result(None)

    # -- forking and joining (any thread) ------------------------------------------------------------------------------

    def fork(self, n: int, site: str, *, copy: bool = False) -> list[Interpreter]:
        """States that continue from this one. Raises `ProgramError` if this state has already failed."""
        self.check_open(site)
        if n < 1:
            raise ProgramError(f"fork needs at least one branch, got {n}", site=site)
        if self.failure is not None:
            raise self._fork_error(self.failure, site)
        children = [Interpreter(self.session, (*self.path, self._forks, i), forked=True) for i in range(n)]
        self._forks += 1
        for child in children:
            child.variables, child.inherited = dict(self.variables), dict(self.variables)

        def fail(error: BaseException) -> None:
            for child in children:
                child._start(self._fork_error(error, site))

        self.put(Operation(lambda: self._fork(children, copy), site, fail))
        return children

    def _fork_error(self, cause: BaseException, site: str) -> ProgramError:
        self.session.reported(cause)
        error = ProgramError(f"this state was forked from one that failed: {cause}", site=site)
        error.__cause__ = cause
        return error

    async def _fork(self, children: list[Interpreter], copy: bool) -> None:
        transcript = await self.writer.open()
        handles = await self.writer.prepare_fork(len(children), transcript)
        for child, handle in zip(children, handles, strict=True):
            forked = transcript.fork()
            child.writer.start(forked, handle, self.writer.uncomputed)
            child._fork_log = None if copy else forked.log()
        for child in children:
            child._start()

    def _start(self, failure: ProgramError | None = None) -> None:
        """Starts a fork, or fails it."""
        self._busy = False
        if failure is not None and self.failure is None:
            self._fail(failure)
        self._wake()

    def join(self, others: Sequence[Interpreter], mode: str, site: str) -> None:
        """Closes ``others`` and queues their joining. The variables that they set since they were forked exist here at
        once."""
        self.check_open(site)
        for other in others:
            other.check_open(site)
            if other.session is not self.session:
                raise ProgramError("a state of another run cannot be joined", site=site)
            if other is self or other._joins(self):
                raise ProgramError("a cycle in join: each of these states would wait for the other", site=site)
        self._joining += others
        gathered: dict[str, Variable] = {}
        if mode == "gather_variable":
            for name in dict.fromkeys(name for other in others for name in other.own_variables()):
                gathered[name] = self._declare(name, site)
        for other in others:
            other.closed = True

        def fail(error: BaseException) -> None:
            for variable in gathered.values():
                variable.fail(error)

        self.put(Operation(lambda: self._join(others, gathered, mode), site, fail))

    def own_variables(self) -> dict[str, Variable]:
        """The variables set since this state was forked."""
        return {name: one for name, one in self.variables.items() if self.inherited.get(name) is not one}

    def _joins(self, other: Interpreter) -> bool:
        """Whether ``other`` is among the states that this one joins, or that those join."""
        seen: set[int] = set()
        stack = list(self._joining)
        while stack:
            joined = stack.pop()
            if joined is other:
                return True
            if id(joined) not in seen:
                seen.add(id(joined))
                stack += joined._joining
        return False

    async def _join(self, others: Sequence[Interpreter], gathered: dict[str, Variable], mode: str) -> None:
        for other in others:
            await other.done()
            if other.failure is not None:
                self.session.reported(other.failure)
                raise other.failure
        if mode == "concate_and_append":
            transcript = await self.writer.open()
            for other in others:
                for item in other._fork_log or ():
                    transcript.add(item)
        for name, variable in gathered.items():
            found = [other.variables[name] for other in others if name in other.variables]
            values = [await asyncio.wrap_future(one.future) for one in found]
            variable.set(values, [one.meta for one in found])
        for other in others:
            await self.session.release(other.writer.handle)
        self._joining = [one for one in self._joining if one not in others]

    # -- running (on the loop) -----------------------------------------------------------------------------------------

    async def done(self) -> None:
        """Waits until everything appended so far is done or has failed."""
        if self._operations or self._busy:
            barrier: asyncio.Future[None] = self.session.loop.create_future()

            def release(_: BaseException | None = None) -> None:
                if not barrier.done():
                    barrier.set_result(None)

            self._operations.append(Operation(release, "", release))
            self._wake()
            await barrier

    def _wake(self) -> None:
        self._woken = False
        if not self._busy and self._operations:
            self._busy = True
            self.session.spawn(self._work())

    async def _work(self) -> None:
        try:
            while self._operations and self.failure is None:
                operation = self._operations.popleft()
                try:
                    awaitable = operation.run()
                    if awaitable is not None:
                        await awaitable
                except asyncio.CancelledError:
                    ended = ProgramError("the program ended before this was done", site=operation.site)
                    self._fail(self.failure or ended, operation)
                    raise
                except Exception as error:  # a bug here or in a method given to `select`: reported to the reader
                    self._fail(self._program_error(error, operation), operation)
        finally:
            self._busy = False
            self._drain()

    def _program_error(self, error: Exception, operation: Operation) -> ProgramError:
        if isinstance(error, ProgramError):
            return error
        if isinstance(error, BackendError):
            message = error.reason
        else:
            message = str(error) if isinstance(error, BranchwiseError) else f"{type(error).__name__}: {error}"
        found = ProgramError(
            message, variable=operation.variable, site=operation.site, backend=self.session.backend.name
        )
        found.__cause__ = error
        return found

    def _fail(self, error: ProgramError, operation: Operation | None = None) -> None:
        self.failure = self.failure or error
        self.session.failed(error)
        if operation is not None:
            operation.fail(error)
        if self.writer.stream is not None:
            self.writer.stream.end(error)
        self._drain()

    def _drain(self) -> None:
        """Fails what is queued, if this state has failed."""
        while self.failure is not None and self._operations:
            self._operations.popleft().fail(self.failure)

    async def end(self) -> None:
        """The run is over: streams the rest of the text."""
        await self.writer.end_stream(self.failure)
