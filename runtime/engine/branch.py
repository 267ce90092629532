"""Branches of an engine in process: `Engine.branch` and, awaitable, `AsyncEngine.branch`."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import EngineDead, InvalidRequest
from ..limits import check_token_ids
from ..messages import BranchOp, BranchRun, ControlReply, Delta, Piece
from ..sampling_params import SamplingParams, validate
from ..scheduler.branches.scores import Score, ScoreCollector
from ..tokenizer.pieces import chat_piece, encode_message, tokens_from_bytes, tokens_to_bytes
from .engine import BranchPiece, EngineBase, Prompt
from .inbox import AsyncInbox
from .request_output import Collector, RequestOutput, StreamChunk, error_of


class _Handle:
    """What both kinds share: the engine, the branch's name, and how operations become messages."""

    def __init__(self, engine: EngineBase, id: str) -> None:
        self._engine = engine
        self.id = id

    # -- messages ------------------------------------------------------------------------------------------------------

    def _operation(self, what: Any, **fields: Any) -> BranchOp:
        return BranchOp(0, what, ("", ""), self.id, **fields)

    def _extension(self, piece: Prompt, parse_special: bool) -> BranchOp:
        return self._operation("extend", piece=_piece(self._engine, piece, parse_special))

    def _generation(
        self, params: SamplingParams | None, extend: Prompt | None, parse_special: bool, priority: int
    ) -> BranchRun:
        params = self._engine.default_params() if params is None else params
        validate(params, _vocab_size(self._engine))
        piece = None if extend is None else _piece(self._engine, extend, parse_special)
        return self._numbered(BranchRun([], self.id, ("", ""), params, piece, priority=priority), params.n)

    def _scoring(self, continuations: Sequence[Prompt], parse_special: bool, unconditional: bool) -> BranchRun:
        if not continuations:
            raise InvalidRequest("continuations must not be empty", field="continuations")
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        pieces = [_piece(self._engine, piece, parse_special) for piece in continuations]
        run = BranchRun([], self.id, ("", ""), params, continuations=pieces, unconditional=unconditional)
        return self._numbered(run, len(pieces) * (1 + unconditional))

    def _numbered(self, run: BranchRun, requests: int) -> BranchRun:
        run.ids = [next(self._engine._ids) for _ in range(requests)]
        encode_message(self._engine.tokenizer, run)
        return run

    def _submit(self, run: BranchRun, sink: Callable[[Delta], None]) -> None:
        branches = self._engine._core.branches
        self._engine._on_thread(lambda: branches.take(run), dict.fromkeys(run.ids, sink))


class Branch(_Handle):
    """A prompt that the engine remembers, to be gone on from. Every use renews its life; close it when done.

    Errors are `InvalidRequest`, with ``status`` 410 once it has expired or was closed, 409 while it generates, 429 when
    there are too many.
    """

    @classmethod
    def create(cls, engine: EngineBase, prompt: BranchPiece, cache_salt: str, ttl: float | None) -> Branch:
        return cls(engine, _ask(engine, _creation(engine, prompt, cache_salt, ttl))["id"])

    def fork(self, n: int = 1) -> list[Branch]:
        """``n`` branches that begin as this one is now. Nothing is copied."""
        return [Branch(self._engine, id) for id in _ask(self._engine, self._operation("fork", n=n))["ids"]]

    def extend(self, piece: Prompt, *, parse_special: bool = False) -> int:
        """Appends text, tokenized by itself, or token ids. Returns its length in tokens.

        ``parse_special``: special tokens such as ``<|im_start|>`` may be spelled out in the text.
        """
        return int(_ask(self._engine, self._extension(piece, parse_special))["num_tokens"])

    def generate(
        self,
        params: SamplingParams | None = None,
        *,
        extend: Prompt | None = None,
        parse_special: bool = False,
        priority: int = 0,
        stream: bool = False,
    ) -> Any:
        """Appends ``extend`` and then what is generated; returns a `RequestOutput`, or with ``stream`` an iterator of
        `StreamChunk`. Of several samples the first one stays.

        The branch then ends where the text returned ends: stop tokens and stop strings are not kept.
        """
        if stream:
            return self.stream(params, extend=extend, parse_special=parse_special, priority=priority)
        collector: Collector | None = None
        inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        run = self._generation(params, extend, parse_special, priority)
        self._submit(run, inbox.put)
        collector = Collector(run.ids)
        try:
            while not collector.done:
                collector.feed(inbox.get())
        except BaseException:
            self._engine._abort(run.ids)
            raise
        return collector.result

    def stream(
        self,
        params: SamplingParams | None = None,
        *,
        extend: Prompt | None = None,
        parse_special: bool = False,
        priority: int = 0,
    ) -> Iterator[StreamChunk]:
        """`generate`, bit by bit. Leaving the loop early ends it; what has been generated by then stays."""
        inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        run = self._generation(params, extend, parse_special, priority)
        self._submit(run, inbox.put)
        collector = Collector(run.ids)
        try:
            while not collector.done:
                yield collector.feed(inbox.get())
        finally:
            if not collector.done:
                self._engine._abort(run.ids)

    def score(
        self, continuations: Sequence[Prompt], *, parse_special: bool = False, unconditional: bool = False
    ) -> list[Score]:
        """Logprobs of every continuation's tokens after the branch, which stays as it is. All are computed together,
        and what they share once. ``unconditional``: also those of the same tokens by themselves."""
        run = self._scoring(continuations, parse_special, unconditional)
        collector, open_ids = ScoreCollector(len(run.ids), unconditional=unconditional), set(run.ids)
        inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._submit(run, inbox.put)
        try:
            while open_ids:
                _feed(collector, open_ids, run.ids[0], inbox.get())
        except BaseException:
            self._engine._abort(run.ids)
            raise
        return collector.scores

    @property
    def tokens(self) -> list[int]:
        return _tokens(self.info(tokens=True))

    @property
    def text(self) -> str:
        """Of everything in it, special tokens included."""
        return _text(self._engine, self.info(tokens=True))

    def info(self, *, tokens: bool = False) -> dict[str, Any]:
        """``num_tokens``; of them ``resident_tokens`` are in the cache now and ``held_tokens`` kept from eviction;
        ``pending_text`` comes after them and has no tokens yet; ``generating``; ``expires_in`` seconds."""
        return dict(_ask(self._engine, self._operation("get", tokens=tokens)))

    def close(self) -> None:
        """Ends it, and what it is generating. Closing it again is not an error."""
        with _gone_is_fine():
            _ask(self._engine, self._operation("delete"))

    def __enter__(self) -> Branch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncBranch(_Handle):
    """`Branch` for asyncio: the same methods, awaitable; ``await branch.tokens()`` and ``text()`` are methods here."""

    @classmethod
    async def create(cls, engine: EngineBase, prompt: BranchPiece, cache_salt: str, ttl: float | None) -> AsyncBranch:
        return cls(engine, (await _aask(engine, _creation(engine, prompt, cache_salt, ttl)))["id"])

    async def fork(self, n: int = 1) -> list[AsyncBranch]:
        ids = (await _aask(self._engine, self._operation("fork", n=n)))["ids"]
        return [AsyncBranch(self._engine, id) for id in ids]

    async def extend(self, piece: Prompt, *, parse_special: bool = False) -> int:
        return int((await _aask(self._engine, self._extension(piece, parse_special)))["num_tokens"])

    def generate(
        self,
        params: SamplingParams | None = None,
        *,
        extend: Prompt | None = None,
        parse_special: bool = False,
        priority: int = 0,
        stream: bool = False,
    ) -> Any:
        """An awaitable of a `RequestOutput`; with ``stream`` an asynchronous iterator of `StreamChunk`."""
        make = self.stream if stream else self._generate
        return make(params, extend=extend, parse_special=parse_special, priority=priority)

    async def _generate(self, params: SamplingParams | None, **options: Any) -> RequestOutput:
        run = self._generation(params, options["extend"], options["parse_special"], options["priority"])
        collector = Collector(run.ids)
        async for delta in self._deltas(run):
            collector.feed(delta)
        return collector.result

    async def stream(
        self,
        params: SamplingParams | None = None,
        *,
        extend: Prompt | None = None,
        parse_special: bool = False,
        priority: int = 0,
    ) -> AsyncIterator[StreamChunk]:
        run = self._generation(params, extend, parse_special, priority)
        collector = Collector(run.ids)
        async for delta in self._deltas(run):
            yield collector.feed(delta)

    async def score(
        self, continuations: Sequence[Prompt], *, parse_special: bool = False, unconditional: bool = False
    ) -> list[Score]:
        run = self._scoring(continuations, parse_special, unconditional)
        collector, open_ids = ScoreCollector(len(run.ids), unconditional=unconditional), set(run.ids)
        async for delta in self._deltas(run):
            _feed(collector, open_ids, run.ids[0], delta)
        return collector.scores

    async def _deltas(self, run: BranchRun) -> AsyncIterator[Delta]:
        """Until every request of the run has ended; leaving before aborts it."""
        open_ids = set(run.ids)
        async with AsyncInbox() as inbox:
            self._submit(run, inbox.put)
            try:
                while open_ids:
                    delta = await inbox.get()
                    if delta.finish is not None:
                        open_ids.discard(delta.id)
                    yield delta
            finally:
                if open_ids:
                    self._engine._abort(run.ids)

    async def tokens(self) -> list[int]:
        return _tokens(await self.info(tokens=True))

    async def text(self) -> str:
        return _text(self._engine, await self.info(tokens=True))

    async def info(self, *, tokens: bool = False) -> dict[str, Any]:
        return dict(await _aask(self._engine, self._operation("get", tokens=tokens)))

    async def close(self) -> None:
        with _gone_is_fine():
            await _aask(self._engine, self._operation("delete"))

    async def __aenter__(self) -> AsyncBranch:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def _creation(engine: EngineBase, prompt: BranchPiece, cache_salt: str, ttl: float | None) -> BranchOp:
    piece = None if not isinstance(prompt, str) and not len(prompt) else _first_piece(engine, prompt)
    return BranchOp(0, "create", ("", cache_salt), piece=piece, ttl=ttl)


def _first_piece(engine: EngineBase, prompt: Any) -> Piece:
    if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
        return chat_piece(engine.tokenizer, prompt)
    return _piece(engine, prompt, parse_special=True)


def _piece(engine: EngineBase, piece: Prompt, parse_special: bool) -> Piece:
    if isinstance(piece, str):
        return Piece(piece, parse_special=parse_special)
    ids = piece.tolist() if isinstance(piece, np.ndarray) else list(piece)
    if ids:
        check_token_ids(ids, _vocab_size(engine), "input_ids")
    return Piece(tokens=tokens_to_bytes(np.array(ids, np.int32)))


def _vocab_size(engine: EngineBase) -> int:
    return engine._core.scheduler.limits.vocab_size


def _send(engine: EngineBase, op: BranchOp, waiter: Callable[[ControlReply], None]) -> None:
    """``waiter`` hears the answer on the engine's thread, unless the engine dies. Text is tokenized here, on the
    caller's thread."""
    op.id = next(engine._ids)
    encode_message(engine.tokenizer, op)
    branches = engine._core.branches

    def job() -> None:
        branches.waiters[op.id] = waiter
        branches.take(op)

    engine._on_thread(job)


def _ask(engine: EngineBase, op: BranchOp) -> Any:
    answer: queue.SimpleQueue[ControlReply] = queue.SimpleQueue()
    _send(engine, op, answer.put)
    while True:
        try:
            return _value(answer.get(timeout=1.0))
        except queue.Empty:
            if engine._dead is not None:
                raise EngineDead(engine._dead) from None


async def _aask(engine: EngineBase, op: BranchOp) -> Any:
    """`_ask` without blocking the loop."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[ControlReply] = loop.create_future()

    def tell(reply: ControlReply) -> None:
        if not answer.done():
            answer.set_result(reply)

    def waiter(reply: ControlReply) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to tell
            loop.call_soon_threadsafe(tell, reply)

    _send(engine, op, waiter)
    while True:
        done, _ = await asyncio.wait((answer,), timeout=1.0)
        if done:
            return _value(answer.result())
        if engine._dead is not None:
            raise EngineDead(engine._dead)


def _value(reply: ControlReply) -> Any:
    if not reply.ok:
        raise InvalidRequest(reply.error or "", field=reply.error_field, status=reply.status)
    return reply.value


def _feed(collector: ScoreCollector, open_ids: set[int], first: int, delta: Delta) -> None:
    if delta.finish is not None:
        open_ids.discard(delta.id)
        if delta.finish.reason == "error":
            raise error_of(delta.finish)
        if delta.finish.reason == "abort":
            raise InvalidRequest("the branch was deleted while it was scored", field="branch", status=410)
    collector.feed(delta.id - first, delta)


def _tokens(info: Mapping[str, Any]) -> list[int]:
    return list(tokens_from_bytes(info["tokens"]).tolist())


def _text(engine: EngineBase, info: Mapping[str, Any]) -> str:
    return engine.tokenizer.decode(_tokens(info), skip_special_tokens=False) + str(info["pending_text"])


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        if error.status != 410:
            raise
