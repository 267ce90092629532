"""The interpreter: one state's operations, done one after the other on the loop. An idle strand costs no task.

Appending puts an operation on the strand's queue and returns. Variables are there, unset, as soon as they are appended.
The first failure ends the strand: what was appended after it fails with the same error.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from ...runtime.errors import BranchwiseError
from .backend import Backend, GenerationRequest
from .errors import ProgramError
from .expressions import Chain, Expr, Gen, RoleBegin, RoleEnd, Select, Text
from .generate import run_gen
from .scoring import run_select
from .session import Path, Session
from .slots import Feed, Slot
from .transcript import Close, Item, Open, Out, Run, Transcript


class Waiter(Protocol):
    """Who is told when an operation will not be done."""

    def fail(self, error: BaseException) -> None: ...


class Op:
    """One thing to do. ``run`` either finishes at once or returns what to await."""

    __slots__ = ("run", "site", "slot")

    def __init__(self, run: Callable[[], Awaitable[None] | None], site: str, slot: Waiter | None = None) -> None:
        self.run = run
        self.site = site
        self.slot = slot


class Interpreter:
    """One state: what it says, what it is still to do, what it has found out."""

    def __init__(self, session: Session, path: Path = ()) -> None:
        self.session = session
        self.path = path
        self.slots: dict[str, Slot] = {}
        self.inherited: dict[str, Slot] = {}
        self.transcript: Transcript | None = None
        self.handle: Any = None
        self.birth_log: list[Item] | None = None  # what a fork has said since it was forked
        self.uncomputed = 0  # tokens handed over that no request has computed
        self.failure: ProgramError | None = None
        self.waits_for: list[Interpreter] = []  # joined into this one, by operations not yet done
        self.feed = Feed() if session.streams and not path else None  # of a run's own state
        self.ended = False
        self.returned = False  # of a run's own state: the run has ended well, and
        self.value: Any = None  # this is what the program's function returned
        self._ops: deque[Op] = deque()
        self._busy = False
        self._told = False  # the loop has been asked to look at the queue
        self._counts: Counter[str | None] = Counter()
        self._forks = 0
        self._fed = 0

    # -- appending (any thread) ----------------------------------------------------------------------------------------

    def append(self, expr: Expr, site: str) -> None:
        """Never blocks. Raises `ProgramError` if this state has been joined or its run is over."""
        self.check_open(site)
        match expr:
            case Chain(parts):
                for part in parts:
                    self.append(part, site)
            case Text(text, is_special):
                self.put(Op(lambda: self._say(Run(text, is_special)), site))
            case RoleBegin(role):
                self.put(Op(lambda: self._say(Open(role)), site))
            case RoleEnd(role):
                self.put(Op(lambda: self._say(Close(role)), site))
            case Gen():
                slot = self._slot(expr.name, expr.site or site)
                seed = self._next_seed(expr)
                self.put(Op(lambda: run_gen(self, expr, slot, seed), expr.site or site, slot))
            case Select():
                slot = self._slot(expr.name, expr.site or site)
                self.put(Op(lambda: run_select(self, expr, slot), expr.site or site, slot))
            case _:
                raise TypeError(f"a state takes text and expressions, not {type(expr).__name__}")

    def check_open(self, site: str) -> None:
        if self.ended:
            raise ProgramError("this state has been joined or closed; nothing can be appended to it", site=site)

    def put(self, op: Op) -> None:
        if self.failure is not None:
            if op.slot is not None:
                op.slot.fail(self.failure)
            return
        self._ops.append(op)
        if self.session.on_loop:
            self._look()
        elif not self._told:
            self._told = True
            self.session.loop.call_soon_threadsafe(self._look)

    def set(self, name: str, value: Any, site: str) -> None:
        self.slots[name] = Slot.of(name, site, value)

    def _slot(self, name: str | None, site: str) -> Slot:
        slot = Slot(name or "", site, Feed() if self.session.streams else None)
        if name is not None:
            self.slots[name] = slot
        return slot

    def _next_seed(self, expr: Gen) -> int | None:
        occurrence = self._counts[expr.name]
        self._counts[expr.name] += 1
        return self.session.seed_of(self.path, expr.name, occurrence)

    # -- forking and joining (any thread) ------------------------------------------------------------------------------

    def fork(self, n: int, site: str, *, copy: bool = False) -> list[Interpreter]:
        """Children that go on from here. Raises `ProgramError` if this state is known to have failed."""
        self.check_open(site)
        if n < 1:
            raise ProgramError(f"fork needs at least one branch, got {n}", site=site)
        if self.failure is not None:
            self.session.seen(self.failure)
            raise self._heir(site)
        children = [Interpreter(self.session, (*self.path, self._forks, i)) for i in range(n)]
        self._forks += 1
        for child in children:
            child.slots = dict(self.slots)
            child.inherited = dict(self.slots)
        ready: list[Future[None]] = [Future() for _ in children]
        for child, born in zip(children, ready, strict=True):
            child.put(Op(partial(child._be_born, self, born, site), site))
        self.put(Op(lambda: self._fork(children, ready, site, copy), site, _Births(ready)))
        return children

    def _heir(self, site: str) -> ProgramError:
        cause = self.failure
        if cause is None:
            raise RuntimeError("an heir of no failure")
        error = ProgramError(f"this state was forked from one that failed: {cause}", variable=None, site=site)
        error.__cause__ = cause
        return error

    async def _be_born(self, parent: Interpreter, born: Future[None], site: str) -> None:
        try:
            await asyncio.wrap_future(born)
        except ProgramError:
            error = parent._heir(site)
            parent.session.seen(parent.failure)
            raise error from parent.failure

    async def _fork(self, children: list[Interpreter], ready: list[Future[None]], site: str, copy: bool) -> None:
        transcript = await self.written()
        if not transcript.as_messages:
            await self.hand_over(transcript.take_settled())
            if len(children) > 1 and self.uncomputed and self.backend.capabilities.prefill:
                await self.prefill()
        handles = await self.backend.fork(self.handle, len(children))
        for child, handle in zip(children, handles, strict=True):
            child.transcript = transcript.fork()
            child.own(handle)
            child.uncomputed = self.uncomputed
            child.birth_log = None if copy else child.transcript.log()
        for born in ready:
            born.set_result(None)

    def join(self, strands: Sequence[Interpreter], mode: str, site: str) -> None:
        """Appends the joining of ``strands``; variables they have set since they were forked are here at once."""
        self.check_open(site)
        for strand in strands:
            strand.check_open(site)
            if strand.session is not self.session:
                raise ProgramError("a state of another run cannot be joined", site=site)
            if strand is self or strand._reaches(self):
                raise ProgramError("a cycle in join: each of these states would wait for the other", site=site)
        self.waits_for += strands
        gathered: dict[str, Slot] = {}
        if mode == "gather_variable":
            names = dict.fromkeys(
                name for one in strands for name, slot in one.slots.items() if one.inherited.get(name) is not slot
            )
            for name in names:
                gathered[name] = self._slot(name, site)
        for strand in strands:
            strand.ended = True
        self.put(Op(lambda: self._join(strands, gathered, mode), site, _Gathered(gathered)))

    def _reaches(self, other: Interpreter) -> bool:
        seen: set[int] = set()
        stack = list(self.waits_for)
        while stack:
            strand = stack.pop()
            if strand is other:
                return True
            if id(strand) not in seen:
                seen.add(id(strand))
                stack += strand.waits_for
        return False

    async def _join(self, strands: Sequence[Interpreter], gathered: dict[str, Slot], mode: str) -> None:
        for strand in strands:
            await strand.done()
            if strand.failure is not None:
                self.session.seen(strand.failure)
                raise strand.failure
        if mode == "concate_and_append":
            transcript = await self.written()
            for strand in strands:
                for item in strand.birth_log or ():
                    transcript.add(item)
        for name, slot in gathered.items():
            holders = [one.slots[name] for one in strands if name in one.slots]
            values = [await asyncio.wrap_future(holder.future) for holder in holders]
            slot.set(values, [holder.meta for holder in holders])
        for strand in strands:
            await self.session.release(strand.handle)
        self.waits_for = [one for one in self.waits_for if one not in strands]

    def ask(self, name: str, question: Callable[[Transcript], Any], site: str) -> Slot:
        """What ``question`` finds when all that was appended before has been done. Any thread."""
        slot = Slot(name, site)

        async def answer() -> None:
            slot.set(question(await self.written()))

        self.put(Op(answer, site, slot))
        return slot

    async def done(self) -> None:
        """Until this strand has nothing to do."""
        if self._ops or self._busy:
            barrier: asyncio.Future[None] = self.session.loop.create_future()
            self._ops.append(Op(lambda: None if barrier.done() else barrier.set_result(None), "", _Barrier(barrier)))
            self._look()
            await barrier

    # -- the loop's side -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self._told = False
        if not self._busy and self._ops:
            self._busy = True
            self.session.spawn(self._work())

    async def _work(self) -> None:
        try:
            while self._ops:
                op = self._ops.popleft()
                if self.failure is not None:
                    if op.slot is not None:
                        op.slot.fail(self.failure)
                    continue
                try:
                    waiting = op.run()
                    if waiting is not None:
                        await waiting
                    elif self.transcript is None:
                        await self.written()
                except asyncio.CancelledError:
                    ended = ProgramError("the program ended before this was done", site=op.site)
                    self._fail(op, self.failure or ended)
                    raise
                except ProgramError as error:
                    self._fail(op, error)
                except BranchwiseError as error:
                    self._fail(op, self._wrapped(op, str(error)), error)
                except Exception as error:  # a fault of ours or of a method given to `select`: whoever reads is told
                    self._fail(op, self._wrapped(op, f"{type(error).__name__}: {error}"), error)
        finally:
            self._busy = False
            if self._ops and self.failure is None:
                self._look()
            while self._ops and self.failure is not None:
                op = self._ops.popleft()
                if op.slot is not None:
                    op.slot.fail(self.failure)

    def _wrapped(self, op: Op, message: str) -> ProgramError:
        variable = op.slot.name if isinstance(op.slot, Slot) and op.slot.name else None
        return ProgramError(message, variable=variable, site=op.site, backend=self.backend.name)

    def _fail(self, op: Op, error: ProgramError, cause: BaseException | None = None) -> None:
        if cause is not None:
            error.__cause__ = cause
        self.failure = self.failure or error
        self.session.failed(error)
        if op.slot is not None:
            op.slot.fail(error)
        if self.feed is not None:
            self.feed.end(error)

    @property
    def backend(self) -> Backend:
        return self.session.backend

    def own(self, handle: Any) -> None:
        self.handle = handle
        self.session.adopt(self, handle)

    async def written(self) -> Transcript:
        """The transcript, made when first needed."""
        if self.transcript is None:
            await self.session.opened.get()
            self.transcript = Transcript(self.session.turns, self.backend.name, chats=self.session.codec is None)
            self.own(await self.backend.create())
        return self.transcript

    def _say(self, item: Item) -> Awaitable[None] | None:
        if self.transcript is None:
            return self._say_first(item)
        self.transcript.add(item)
        return None

    async def _say_first(self, item: Item) -> None:
        (await self.written()).add(item)

    async def hand_over(self, outs: Sequence[Out]) -> None:
        """Text and tokens into the handle: runs of text that meet are encoded as one."""
        await self.extend(await self.encoded(outs))
        self.show()

    async def encoded(self, outs: Sequence[Out]) -> list[int] | str:
        codec = self.session.codec
        if codec is None:
            return "".join(out.text for out in outs)
        ids: list[int] = []
        runs: list[Run] = []
        for out in [*outs, None]:
            if isinstance(out, Run):
                runs.append(out)
                continue
            opening = not ids and self.handle.length == 0
            size = sum(len(run.text) for run in runs)
            if size > _LONG:
                ids += await asyncio.to_thread(codec.encode, runs, opening=opening)
            elif runs:
                ids += codec.encode(runs, opening=opening)
            runs = []
            if out is not None:
                ids += out.ids
        return ids

    async def extend(self, piece: list[int] | str) -> None:
        if piece:
            await self.backend.extend(self.handle, piece)
            self.uncomputed += len(piece)

    async def prefill(self) -> None:
        """Computes what has been handed over, so that no two branches compute it twice."""
        await self.backend.generate(self.handle, GenerationRequest({"max_tokens": 0}))
        self.uncomputed = 0

    def show(self) -> None:
        """What has been handed over goes to those who read along."""
        if self.feed is not None and self.transcript is not None:
            text = self.transcript.shown()
            self.feed.put(text[self._fed :])
            self._fed = len(text)

    def show_delta(self, text: str) -> None:
        if self.feed is not None:
            self.feed.put(text)
            self._fed += len(text)

    async def end(self) -> None:
        """The run is over: readers along get the rest."""
        if self.feed is not None:
            if self.failure is None:
                self.feed.put((await self.written()).text()[self._fed :])
            self.feed.end(self.failure)


_LONG = 20_000  # characters: what takes longer to encode than the loop should be kept waiting


class _Barrier:
    """Stands for a waiter where an operation's variable would: a strand that has failed is done, too."""

    def __init__(self, barrier: asyncio.Future[None]) -> None:
        self._barrier = barrier

    def fail(self, error: BaseException) -> None:
        if not self._barrier.done():
            self._barrier.set_result(None)


class _Births:
    """Children of a state that failed before it could fork."""

    def __init__(self, ready: list[Future[None]]) -> None:
        self._ready = ready

    def fail(self, error: BaseException) -> None:
        for born in self._ready:
            if not born.done():
                born.set_exception(error)


class _Gathered:
    """The variables a join was to set."""

    def __init__(self, slots: dict[str, Slot]) -> None:
        self._slots = slots

    def fail(self, error: BaseException) -> None:
        for slot in self._slots.values():
            slot.fail(error)
