"""What a program holds: a state to append to and read from, blocking or awaitable, and groups of forked states."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from .chat import Variables
from .errors import ProgramError, call_site
from .expressions import RoleBegin, RoleEnd, parts
from .interpreter import Interpreter, Op
from .slots import Feed, Slot
from .transcript import Transcript

S = TypeVar("S", bound="BaseState")
T = TypeVar("T")
Body = Any  # what can be appended: text, an expression, a list of them
Each = Any  # one body for all branches, a list with one for each, or a function of the branch's number
_LOOK_AGAIN = 0.005  # seconds: for a variable that the program has not come to yet


class Run(Protocol):
    """A run that whoever holds its state may follow while it goes on."""

    def done(self) -> bool: ...


class BaseState:
    """Appending, forking, joining: the part that never blocks and so is the same for both kinds."""

    def __init__(self, strand: Interpreter, run: Run | None = None) -> None:
        self._strand = strand
        self._run = run
        self._origin: BaseState | None = None  # what it is a copy of

    @property
    def ret_value(self) -> Any:
        """What the program's function returned. Raises `ProgramError` if the run failed."""
        strand = self._strand
        if strand.failure is not None and not strand.returned:
            self._told(strand.failure)
            raise strand.failure
        return strand.value

    def __iadd__(self: S, body: Body) -> S:
        site = call_site()
        for expr in parts(body):
            self._strand.append(expr, site)
        return self

    def __add__(self, body: Body) -> NoReturn:
        raise TypeError("a state is appended to in place: write s += ..., not s + ...")

    def fork(self: S, size: int = 1, position_ids_offset: Any = None) -> Group[S]:
        """``size`` states that go on from here, each on its own. Costs no copy and no computation.

        ``position_ids_offset`` is there for SGLang's programs, where it never meant anything; it must be None.
        """
        if position_ids_offset is not None:
            raise ValueError("position_ids_offset is not supported")
        made = self._strand.fork(size, call_site())
        return Group(self, [type(self)(strand) for strand in made])

    def copy(self: S) -> S:
        """A state of its own that says the same. As a context manager, as SGLang has it, it is joined at the end."""
        made = type(self)(self._strand.fork(1, call_site(), copy=True)[0])
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
        """Ends ``states`` and takes what they found: ``gather_variable`` makes each variable they set since they were
        forked a list here (in their order), ``concate_and_append`` appends what they said since, token for token."""
        if mode not in ("gather_variable", "concate_and_append"):
            raise ValueError(f"mode must be gather_variable or concate_and_append, got {mode!r}")
        self._strand.join([state._strand for state in states], mode, call_site())

    def set(self, name: str, value: Any) -> None:
        """Makes ``value`` the variable ``name``."""
        self._strand.set(name, value, call_site())

    set_var = __setitem__ = set

    def use_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Tools in OpenAI's shape, for the model's own chat template to write. Before the model has read a turn."""
        variables = Variables({"tools": [dict(tool) for tool in tools]} if tools else {})
        self._strand.ask("tools", lambda transcript: transcript.use_variables(variables), call_site())

    def __contains__(self, name: str) -> bool:
        return name in self._strand.slots

    @contextlib.contextmanager
    def _role(self, role: str, site: str) -> Iterator[None]:
        self._strand.append(RoleBegin(role), site)
        try:
            yield
        finally:
            self._strand.append(RoleEnd(role), site)

    def role(self, name: str, body: Body = None) -> Any:
        """``with s.role("tool"): ...``, or ``s.role("tool", text)``."""
        site = call_site()
        if body is None:
            return self._role(name, site)
        with self._role(name, site):
            for expr in parts(body):
                self._strand.append(expr, site)
        return None

    def system(self, body: Body = None) -> Any:
        return self.role("system", body)

    def user(self, body: Body = None) -> Any:
        return self.role("user", body)

    def assistant(self, body: Body = None) -> Any:
        return self.role("assistant", body)

    def var_scope(self, name: str) -> Any:
        """``with s.var_scope("x"): ...``: what is appended within becomes the variable ``x``, too."""
        return self._scope(name, call_site())

    @contextlib.contextmanager
    def _scope(self, name: str, site: str) -> Iterator[None]:
        slot = Slot(name, site)
        log: list[Any] = []

        async def begin() -> None:
            log.append((await self._strand.written()).log())

        async def end() -> None:
            (await self._strand.written()).unlog(log[0])
            slot.set("".join(getattr(item, "text", "") for item in log[0]))

        self._strand.put(Op(begin, site))
        yield
        self._strand.slots[name] = slot
        self._strand.put(Op(end, site, slot))

    async def text_async_iter(self, var_name: str | None = None, return_meta_data: bool = False) -> AsyncIterator[Any]:
        """The text (of one variable, or all of it) as it comes, in a run that streams; ``return_meta_data``: pairs of
        text and meta (the variable's, on the last one)."""
        while var_name is not None and self._is_to_come(var_name):
            await asyncio.sleep(_LOOK_AGAIN)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[str | None] = asyncio.Queue()
        feed = self._feed(var_name)
        feed.subscribe(lambda chunk: _tell(loop, inbox, chunk))
        while (chunk := await inbox.get()) is not None:
            yield (chunk, {}) if return_meta_data else chunk
        if feed.error is not None:
            self._told(feed.error)
            raise feed.error
        if return_meta_data and var_name is not None:
            yield "", self._find(var_name).meta

    def _is_to_come(self, name: str | None) -> bool:
        """Whether the program goes on and has not come to the variable yet; None: whether it goes on."""
        return self._run is not None and not self._run.done() and (name is None or name not in self)

    def _find(self, name: str) -> Slot:
        slot = self._strand.slots.get(name)
        if slot is None and self._strand.failure is not None:
            self._told(self._strand.failure)
            raise self._strand.failure
        if slot is None:
            known = ", ".join(map(repr, self._strand.slots)) or "none"
            raise ProgramError(
                f"no variable {name!r} has been set in this state (set so far: {known})",
                variable=None,
                site=call_site(),
            )
        return slot

    def _everything(self, question: Callable[[Transcript], T]) -> Slot:
        return self._strand.ask("", question, call_site())

    def _told(self, error: BaseException) -> None:
        self._strand.session.seen(error)

    def _feed(self, name: str | None) -> Feed:
        feed = self._strand.feed if name is None else self._find(name).feed
        if not self._strand.session.streams:
            problem = "this run was not started with stream=True: there is nothing to follow"
        elif name is None and (feed is None or (self._run is None and not feed.ended)):
            problem = "a program cannot follow all of a state that it still writes: name a variable, or read text()"
        elif feed is None:
            problem = f"the model does not write {name!r}: read it instead"
        else:
            return feed
        raise ProgramError(problem, site=call_site())


def _all_text(transcript: Transcript) -> str:
    return transcript.text()


def _all_messages(transcript: Transcript) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in transcript.messages()]


class State(BaseState):
    """A state whose reads block. For ordinary functions, on any thread but the loop's. Outside of a program that goes
    on (``stream=True``) they wait for the program, too."""

    @property
    def ret_value(self) -> Any:
        self._until(None)
        return super().ret_value

    def __getitem__(self, name: str) -> Any:
        """The variable's value, once it is there. Raises `ProgramError` if it never will be."""
        self._until(name)
        return self._wait(self._find(name).future)

    get_var = __getitem__

    def meta(self, name: str) -> Any:
        """How the variable came about: ``finish_reason``, ``prompt_tokens``, ``cached_tokens``, ``cache`` (hit tokens,
        and why not more), logprobs if asked for. A list where the variable is one."""
        self._until(name)
        slot = self._find(name)
        self._wait(slot.future)
        return slot.meta

    get_meta_info = meta

    def text(self) -> str:
        self._until(None)
        return self._wait(self._everything(_all_text).future)

    def messages(self) -> list[dict[str, str]]:
        """The conversation as roles and contents."""
        self._until(None)
        return self._wait(self._everything(_all_messages).future)

    def sync(self) -> None:
        """Until everything appended so far is done."""
        self._until(None)
        self._wait(self._everything(lambda _: None).future)

    def error(self) -> BaseException | None:
        """What ended this state, once everything appended so far is done; None if nothing did."""
        try:
            self.sync()
        except ProgramError as error:
            return error
        return None

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The text (of one variable, or all of it) as it comes, in a run with ``stream=True``."""
        if var_name is not None:
            self._until(var_name)
        inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        feed = self._feed(var_name)
        feed.subscribe(inbox.put)
        while (chunk := inbox.get()) is not None:
            yield chunk
        if feed.error is not None:
            self._told(feed.error)
            raise feed.error

    def _until(self, name: str | None) -> None:
        while self._is_to_come(name):
            time.sleep(_LOOK_AGAIN)

    @property
    def aio(self) -> AsyncState:
        """The same state, awaitable."""
        return AsyncState(self._strand)

    def run_here(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` on the state's loop and waits for it."""
        self._not_on_loop()
        return asyncio.run_coroutine_threadsafe(work, self._strand.session.loop).result()

    def _wait(self, future: Future[T]) -> T:
        if not future.done():
            self._not_on_loop()
        try:
            return future.result()
        except ProgramError as error:
            self._told(error)
            raise

    def _not_on_loop(self) -> None:
        if self._strand.session.on_loop:
            raise ProgramError("a blocking read on the event loop: use an `async def` program", site=call_site())


class AsyncState(BaseState):
    """A state whose reads are awaited: ``await s["x"]``."""

    def __getitem__(self, name: str) -> Awaitable[Any]:
        return self._wait(self._find(name).future)

    get_var = __getitem__

    async def meta(self, name: str) -> Any:
        slot = self._find(name)
        await self._wait(slot.future)
        return slot.meta

    get_meta_info = meta

    def text(self) -> Awaitable[str]:
        return self._wait(self._everything(_all_text).future)

    def messages(self) -> Awaitable[list[dict[str, str]]]:
        return self._wait(self._everything(_all_messages).future)

    def sync(self) -> Awaitable[None]:
        return self._wait(self._everything(lambda _: None).future)

    async def error(self) -> BaseException | None:
        try:
            await self.sync()
        except ProgramError as error:
            return error
        return None

    text_iter = BaseState.text_async_iter

    async def _wait(self, future: Future[T]) -> T:
        try:
            return await asyncio.wrap_future(future)
        except ProgramError as error:
            self._told(error)
            raise


def _tell(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[str | None], chunk: str | None) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to tell
        loop.call_soon_threadsafe(inbox.put_nowait, chunk)


class Group(Generic[S]):
    """States forked at one point. What is appended to the group goes to each: one value for all, a list with one for
    each, or a function of the branch's number."""

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
                state._strand.append(expr, site)
        return self

    def __getitem__(self, key: Any) -> Any:
        """The i-th state; or, for a name, that variable of every state (an awaitable of the list in async programs)."""
        if not isinstance(key, str):
            return self.states[key]
        values = [state[key] for state in self.states]  # type: ignore[index]
        return asyncio.gather(*values) if isinstance(self.parent, AsyncState) else values

    def __setitem__(self, i: int, state: S) -> None:
        """What ``forks[i] += ...`` ends with."""
        if self.states[i] is not state:
            raise TypeError("a branch of a group stays what it is: it can be appended to, not replaced")

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[S]:
        return iter(self.states)

    def join(self, mode: str = "gather_variable") -> None:
        """See `BaseState.join`: into the state this group was forked from."""
        self.parent.join(self.states, mode)
