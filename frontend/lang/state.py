"""States, which programs append to and read from, blocking or awaitable, and groups of forked states."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NoReturn, TypeVar

from .errors import ProgramError, call_site
from .expressions import RoleBegin, RoleEnd, parts
from .interpreter import Interpreter, Operation
from .transcript import Item, Transcript
from .turns import TemplateVariables
from .variables import ReplayStream, Variable

S = TypeVar("S", bound="BaseState")
T = TypeVar("T")
Body = Any  # what can be appended: text, an expression, a list of them
Each = Any  # one body for all branches, a list with one for each, or a function of the branch's number


class BaseState:
    """The base of both kinds of state: appending, forking and joining never block, and reads are defined once, in terms
    of `_result`, which blocks or returns an awaitable.

    ``follows``: the program still runs, and this is the caller's view of its state: reads wait for the program to set
    a variable, or to end.
    """

    def __init__(self, interpreter: Interpreter, follows: bool = False) -> None:
        self._interpreter = interpreter
        self._follows = follows
        self._origin: BaseState | None = None  # the state that this one is a copy of

    def _result(self, future: Future[Any], then: Callable[[Any], Any] | None = None) -> Any:
        """``future``'s result, or ``then`` of it; in the state's own way."""
        raise NotImplementedError

    def _variable(self, name: str) -> Variable:
        """Raises `ProgramError` if the variable does not exist."""
        interpreter = self._interpreter
        variable = interpreter.variables.get(name)
        if variable is not None:
            return variable
        if interpreter.failure is not None:
            self._reported(interpreter.failure)
            raise interpreter.failure
        known = ", ".join(map(repr, interpreter.variables)) or "none"
        raise ProgramError(f"no variable {name!r} has been set in this state (set so far: {known})", site=call_site())

    def _ask(self, question: Callable[[Transcript], Any]) -> Any:
        return self._result(self._interpreter.ask(question, call_site()))

    def _reported(self, error: BaseException) -> None:
        self._interpreter.session.reported(error)

    # -- reading -------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        """The variable's value. Raises `ProgramError` if it does not exist or could not be set."""
        return self._result(self._variable(name).future)

    get_var = __getitem__

    def meta(self, name: str) -> Any:
        """How the variable was set: ``finish_reason``, ``prompt_tokens``, ``cached_tokens``, ``cache`` (hit tokens, and
        why not more), logprobs if requested. A list where the variable is one."""
        variable = self._variable(name)
        return self._result(variable.future, lambda _: variable.meta)

    get_meta_info = meta

    def text(self) -> Any:
        """All text, as str."""
        return self._ask(Transcript.text)

    def messages(self) -> Any:
        """The conversation, as a list of dicts with ``role`` and ``content``."""
        return self._ask(lambda transcript: [{"role": one.role, "content": one.content} for one in transcript.turns()])

    def sync(self) -> Any:
        """Waits until everything appended so far is done."""
        return self._ask(lambda _: None)

    @property
    def ret_value(self) -> Any:
        """What the program's function returned. Raises `ProgramError` if the run failed."""
        finished = self._interpreter.finished
        if not finished.done():
            return None
        if (error := finished.exception()) is not None:
            self._reported(error)
        return finished.result()

    def __contains__(self, name: str) -> bool:
        return name in self._interpreter.variables

    # -- appending -----------------------------------------------------------------------------------------------------

    def __iadd__(self: S, body: Body) -> S:
        site = call_site()
        for expr in parts(body):
            self._interpreter.append(expr, site)
        return self

    def __add__(self, body: Body) -> NoReturn:
        raise TypeError("a state is appended to in place: write s += ..., not s + ...")

    def fork(self: S, size: int = 1, position_ids_offset: Any = None) -> Group[S]:
        """``size`` states that continue from this one independently. Copies and computes nothing.

        ``position_ids_offset`` exists for SGLang's programs, where it has no effect; it must be None.
        """
        if position_ids_offset is not None:
            raise ValueError("position_ids_offset is not supported")
        return Group(self, [type(self)(one) for one in self._interpreter.fork(size, call_site())])

    def copy(self: S) -> S:
        """An independent state with the same text. As a context manager (SGLang's), it is joined at the end."""
        made = type(self)(self._interpreter.fork(1, call_site(), copy=True)[0])
        made._origin = self
        return made

    def __enter__(self: S) -> S:
        if self._origin is None:
            raise TypeError("only a copy is a context manager: with s.copy() as t")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._origin is not None:
            self._origin.join([self])

    def join(self, states: Sequence[BaseState], mode: str = "gather_variable") -> None:
        """Ends ``states`` and takes their results. ``gather_variable`` makes each variable that they set since they
        were forked a list here (in their order); ``concate_and_append`` appends their text since then, token for
        token."""
        if mode not in ("gather_variable", "concate_and_append"):
            raise ValueError(f"mode must be gather_variable or concate_and_append, got {mode!r}")
        self._interpreter.join([state._interpreter for state in states], mode, call_site())

    def set(self, name: str, value: Any) -> None:
        """Makes ``value`` the variable ``name``."""
        self._interpreter.set(name, value, call_site())

    set_var = __setitem__ = set

    def use_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Gives the model's chat template tools, in OpenAI's form. Only before the model has read a turn."""
        variables = TemplateVariables({"tools": [dict(tool) for tool in tools]} if tools else {})
        self._interpreter.ask(lambda transcript: transcript.use_variables(variables), call_site())

    @contextlib.contextmanager
    def _role(self, role: str, site: str) -> Iterator[None]:
        self._interpreter.append(RoleBegin(role), site)
        try:
            yield
        finally:
            self._interpreter.append(RoleEnd(role), site)

    def role(self, name: str, body: Body = None) -> Any:
        """``with s.role("tool"): ...``, or ``s.role("tool", text)``."""
        site = call_site()
        if body is None:
            return self._role(name, site)
        with self._role(name, site):
            for expr in parts(body):
                self._interpreter.append(expr, site)
        return None

    def system(self, body: Body = None) -> Any:
        return self.role("system", body)

    def user(self, body: Body = None) -> Any:
        return self.role("user", body)

    def assistant(self, body: Body = None) -> Any:
        return self.role("assistant", body)

    def var_scope(self, name: str) -> Any:
        """``with s.var_scope("x"): ...``: what is appended within also becomes the variable ``x``."""
        return self._scope(name, call_site())

    @contextlib.contextmanager
    def _scope(self, name: str, site: str) -> Iterator[None]:
        interpreter, variable, logs = self._interpreter, Variable(name, site), list[list[Item]]()

        async def begin() -> None:
            logs.append((await interpreter.writer.open()).log())

        async def end() -> None:
            (await interpreter.writer.open()).unlog(logs[0])
            variable.set("".join(getattr(item, "text", "") for item in logs[0]))

        interpreter.put(Operation(begin, site))
        yield
        interpreter.define(variable)
        interpreter.put_for(variable, end)

    # -- streaming -----------------------------------------------------------------------------------------------------

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """The text (of one variable, or all of it) as it is generated, in a run that streams. ``return_meta_data``:
        pairs of text and meta; the last one has the variable's meta."""
        if var_name is not None and self._follows:
            await asyncio.wrap_future(self._interpreter.arrival(var_name))
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[str | None] = asyncio.Queue()
        stream = self._stream(var_name)
        stream.subscribe(lambda piece: _put(loop, inbox, piece))
        while (piece := await inbox.get()) is not None:
            yield (piece, {}) if return_meta_data else piece
        if stream.error is not None:
            self._reported(stream.error)
            raise stream.error
        if return_meta_data and var_name is not None:
            yield "", self._variable(var_name).meta

    def _stream(self, name: str | None) -> ReplayStream:
        stream = self._interpreter.writer.stream if name is None else self._variable(name).stream
        if not self._interpreter.session.streams:
            problem = "this run was not started with stream=True: there is nothing to stream"
        elif name is None and (stream is None or not (self._follows or stream.ended)):
            problem = "a program cannot stream all of a state that it still writes: name a variable, or read text()"
        elif stream is None:
            problem = f"the model does not write {name!r}: read it instead"
        else:
            return stream
        raise ProgramError(problem, site=call_site())


class State(BaseState):
    """A state whose reads block. For ordinary functions, on any thread but the loop's."""

    def _result(self, future: Future[Any], then: Callable[[Any], Any] | None = None) -> Any:
        if not future.done():
            self._check_thread()
        try:
            value = future.result()
        except ProgramError as error:
            self._reported(error)
            raise
        return value if then is None else then(value)

    def _variable(self, name: str) -> Variable:
        if self._follows:
            self._result(self._interpreter.arrival(name))
        return super()._variable(name)

    def _ask(self, question: Callable[[Transcript], Any]) -> Any:
        self._await_program()
        return super()._ask(question)

    def _await_program(self) -> None:
        finished = self._interpreter.finished
        if self._follows and not finished.done():
            self._check_thread()
            finished.exception()

    @property
    def ret_value(self) -> Any:
        self._await_program()
        return super().ret_value

    def error(self) -> BaseException | None:
        """The error that ended this state, once everything appended so far is done; None if there is none."""
        try:
            self.sync()
        except ProgramError as error:
            return error
        return None

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The text (of one variable, or all of it) as it is generated, in a run with ``stream=True``."""
        if var_name is not None:
            self._variable(var_name)
        inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stream = self._stream(var_name)
        stream.subscribe(inbox.put)
        while (piece := inbox.get()) is not None:
            yield piece
        if stream.error is not None:
            self._reported(stream.error)
            raise stream.error

    @property
    def aio(self) -> AsyncState:
        """The same state, awaitable."""
        return AsyncState(self._interpreter)

    def run_here(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` on the state's loop and waits for it."""
        self._check_thread()
        return asyncio.run_coroutine_threadsafe(work, self._interpreter.session.loop).result()

    def _check_thread(self) -> None:
        if self._interpreter.session.on_loop:
            raise ProgramError("a blocking read on the event loop: use an `async def` program", site=call_site())


class AsyncState(BaseState):
    """A state whose reads are awaited: ``await s["x"]``, ``await s.text()``."""

    async def _result(self, future: Future[Any], then: Callable[[Any], Any] | None = None) -> Any:
        try:
            value = await asyncio.wrap_future(future)
        except ProgramError as error:
            self._reported(error)
            raise
        return value if then is None else then(value)

    async def error(self) -> BaseException | None:
        """See `State.error`."""
        try:
            await self.sync()
        except ProgramError as error:
            return error
        return None

    text_iter = BaseState.text_async_iter


def _put(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[str | None], piece: str | None) -> None:
    with contextlib.suppress(RuntimeError):  # the reader's loop was closed
        loop.call_soon_threadsafe(inbox.put_nowait, piece)


class Group(Generic[S]):
    """States forked at one point. Appending to the group appends to each: one value for all, a list with one for each,
    or a function of the branch's number."""

    def __init__(self, parent: S, states: Sequence[S]) -> None:
        self.parent = parent
        self.states = list(states)

    def __iadd__(self, each: Each) -> Group[S]:
        site = call_site()
        if callable(each):
            bodies = [each(i) for i in range(len(self.states))]
        elif isinstance(each, (list, tuple)):
            if len(each) != len(self.states):
                raise ValueError(f"{len(each)} values for {len(self.states)} branches")
            bodies = list(each)
        else:
            bodies = [each] * len(self.states)
        for state, body in zip(self.states, bodies, strict=True):
            for expr in parts(body):
                state._interpreter.append(expr, site)
        return self

    def __getitem__(self, key: Any) -> Any:
        """The i-th state; for a name, that variable of every state (an awaitable of the list in async programs)."""
        if not isinstance(key, str):
            return self.states[key]
        values = [state[key] for state in self.states]
        return asyncio.gather(*values) if isinstance(self.parent, AsyncState) else values

    def __setitem__(self, i: int, state: S) -> None:
        """Called by ``forks[i] += ...``."""
        if self.states[i] is not state:
            raise TypeError("a branch of a group can be appended to, not replaced")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[S]:
        return iter(self.states)

    def join(self, mode: str = "gather_variable") -> None:
        """See `BaseState.join`: into the state this group was forked from."""
        self.parent.join(self.states, mode)
